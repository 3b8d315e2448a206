"""The judge, as the rest of the program sees it: a sensor that scores one reply and decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mapo_jax.environment.dialogue import DialogueState, Judgement


class Judge(Protocol):
    """Scores the last reply only, on six levels, with evidence and a reason for each."""

    async def score(self, state: DialogueState, reply: str) -> Judgement:
        """The judgement of `reply` to `state.user`.

        Raises:
          RoleFailure: the call failed for good; the turn then stays unscored.
        """
        ...
