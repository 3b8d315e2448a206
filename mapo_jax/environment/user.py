"""The user's side of a dialogue, as the rest of the program sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mapo_jax.environment.dialogue import DialogueState
    from mapo_jax.environment.scenario import Scenario


class User(Protocol):
    """Speaks as the person on the card."""

    async def open(self, scenario: Scenario, seed: int) -> str:
        """The first message; the rollouts of a scenario share it.

        Raises:
          RoleFailure: the call failed for good.
        """
        ...

    async def reply(self, state: DialogueState) -> str:
        """The next message, after a judged turn; `state.turns[-1].action` holds the director's guidance.

        Raises:
          RoleFailure: the call failed for good.
        """
        ...
