"""The director, as the rest of the program sees it: decides how the story goes on; only the user hears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mapo_jax.environment.dialogue import Action, DialogueState


class Director(Protocol):
    """Picks one of dialogue.ACTIONS after every judged turn that does not end the dialogue."""

    async def act(self, state: DialogueState) -> Action:
        """The action; its guidance reaches the user's next message.

        Raises:
          RoleFailure: the call failed for good.
        """
        ...
