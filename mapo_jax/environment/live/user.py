"""The user, played by a language model with the card, the revealed story, and the director's guidance."""

from collections.abc import Sequence
from dataclasses import dataclass

from mapo_jax.environment.card_schema import PERIODS
from mapo_jax.environment.dialogue import Action, DialogueState, RoleFailure, Turn
from mapo_jax.environment.live.calls import Complete, ask
from mapo_jax.environment.live.forms import spoken
from mapo_jax.environment.live.prompts import Messages, chat, needs, render
from mapo_jax.environment.scenario import Scenario


@dataclass(frozen=True)
class LiveUser:
    """Its prompt holds what has been revealed of the story, and nothing of what follows."""

    complete: Complete

    async def open(self, scenario: Scenario, seed: int) -> str:
        """The first message."""
        return await self._say(scenario, (), seed)

    async def reply(self, state: DialogueState) -> str:
        """The next message; a repetition of an earlier one is unusable."""
        return await self._say(state.scenario, state.turns, state.seed)

    async def _say(self, card: Scenario, turns: Sequence[Turn], seed: int) -> str:
        earlier = {turn.user for turn in turns}

        def parse(text: str) -> str:
            words = spoken(text)
            if words in earlier:
                raise RoleFailure("malformed", "it has been said before, word for word", text)
            return words

        return await ask(self.complete, card, user_messages(card, turns), parse, "user_repair", seed=seed)


def user_messages(card: Scenario, turns: Sequence[Turn]) -> Messages:
    """The prompt of the model that plays the user."""
    actions = [turn.action for turn in turns if turn.action is not None]
    revealed_stages, memories = revealed(actions)
    return chat(
        render(card.language, "user_system", card=card, needs=needs(card)),
        render(
            card.language,
            "user_turn",
            card=card,
            turns=turns,
            stages=[card.story.stages[index] for index in sorted(revealed_stages)],
            memories=[card.history[PERIODS.index(period)] for period in memories],
            events=[action.guidance for action in actions[:-1] if action.kind == "turning_point"],
            note=actions[-1].guidance if actions else "",
        ),
    )


def revealed(actions: Sequence[Action]) -> tuple[set[int], list[str]]:
    """(stages revealed so far, always including the first; periods of life revealed so far, in order)."""
    stages = {0} | {int(a.target or 0) for a in actions if a.kind == "reveal_stage"}
    periods = [a.target for a in actions if a.kind == "reveal_memory" and a.target is not None]
    return stages, list(dict.fromkeys(periods))
