"""The user, played by a language model from the card, the story so far, and the director's guidance."""

from __future__ import annotations

from collections.abc import Sequence

from mapo_jax.environment.card_schema import PERIODS
from mapo_jax.environment.dialogue import Action, DialogueState, RoleFailure, Turn
from mapo_jax.environment.live.calls import Complete
from mapo_jax.environment.live.forms import spoken
from mapo_jax.environment.live.prompts import Messages, chat, needs, render
from mapo_jax.environment.scenario import Scenario


class LiveUser:
    """Knows what has been revealed, not what is still to come."""

    def __init__(self, complete: Complete) -> None:
        """Args: complete: the model that plays the user."""
        self._complete = complete

    async def open(self, scenario: Scenario, seed: int) -> str:
        """The first message."""
        return await self._say(scenario, (), seed)

    async def reply(self, state: DialogueState) -> str:
        """The next message; one that has been said before is no message."""
        return await self._say(state.scenario, state.turns, state.seed)

    async def _say(self, card: Scenario, turns: Sequence[Turn], seed: int) -> str:
        earlier = {turn.user for turn in turns}

        def check(text: str) -> str:
            words = spoken(text)
            if words in earlier:
                raise RoleFailure("malformed", "it has been said before, word for word", text)
            return words

        text = await self._complete(
            user_messages(card, turns),
            seed=seed,
            check=check,
            repair=lambda problem: render(card.language, "user_repair", problem=problem),
        )
        return check(text)


def user_messages(card: Scenario, turns: Sequence[Turn]) -> Messages:
    """What the model that plays the user is asked."""
    actions = [turn.action for turn in turns if turn.action is not None]
    told, memories = revealed(actions)
    return chat(
        render(card.language, "user_system", card=card, needs=needs(card)),
        render(
            card.language,
            "user_turn",
            card=card,
            turns=turns,
            stages=[card.story.stages[index] for index in sorted(told)],
            memories=[card.history[PERIODS.index(period)] for period in memories],
            events=[action.guidance for action in actions[:-1] if action.kind == "turning_point"],
            note=actions[-1].guidance if actions else "",
        ),
    )


def revealed(actions: Sequence[Action]) -> tuple[set[int], list[str]]:
    """(stages that may be told, the first one always; periods of life, in the order they came up)."""
    stages = {0} | {int(a.target or 0) for a in actions if a.kind == "reveal_stage"}
    periods = [a.target for a in actions if a.kind == "reveal_memory" and a.target is not None]
    return stages, list(dict.fromkeys(periods))
