"""The judge, played by a language model: 18 fields for one reply, each level after its evidence."""

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mapo_jax.environment import state as calculator
from mapo_jax.environment.dialogue import DialogueState, Judgement, RoleFailure, Turn
from mapo_jax.environment.live.calls import Complete, ask
from mapo_jax.environment.live.forms import ReplyForm, findings, read
from mapo_jax.environment.live.prompts import Messages, chat, needs, render
from mapo_jax.environment.scenario import Scenario

SCHEMA = ReplyForm.model_json_schema()
_SEED_STEP = 0x9E3779B1  # between the seeds of the samples of one reply


@dataclass(frozen=True)
class LiveJudge:
    """Scores the last reply; with several samples the median of each level."""

    complete: Complete
    samples: int = 1  # judgements per reply
    # Called with the range of the samples' points of v_t, if there are several.
    on_spread: Callable[[float], None] = lambda spread: None

    async def score(self, state: DialogueState, reply: str) -> Judgement:
        """The judgement; with several samples, that of the successful ones."""
        card = state.scenario
        messages = judge_messages(card, state.turns, state.user, reply)
        replies = "\n".join([*(turn.reply for turn in state.turns), reply])

        def parse(text: str) -> Judgement:
            return to_judgement(read(text, ReplyForm, silent=not reply.strip(), quoted=replies))

        seeds = [(state.seed + index * _SEED_STEP) % 2**32 for index in range(self.samples)]
        calls = [ask(self.complete, card, messages, parse, seed=seed, schema=SCHEMA) for seed in seeds]
        samples = await asyncio.gather(*calls, return_exceptions=True)
        judgements = [sample for sample in samples if isinstance(sample, Judgement)]
        for sample in samples:
            if isinstance(sample, BaseException) and not (judgements and isinstance(sample, RoleFailure)):
                raise sample
        if len(judgements) > 1:
            totals = [sum(calculator.points(judgement.levels)) for judgement in judgements]
            self.on_spread(max(totals) - min(totals))
        return median(judgements)


def judge_messages(card: Scenario, turns: Sequence[Turn], message: str, reply: str) -> Messages:
    """The prompt of the model that plays the judge, about `reply` to `message`."""
    values = {"card": card, "needs": needs(card), "turns": turns, "message": message, "reply": reply}
    return chat(render(card.language, "judge_system"), render(card.language, "judge_turn", **values))


def to_judgement(form: ReplyForm) -> Judgement:
    """The judgement that a form holds."""
    return Judgement(*zip(*((f.level, f.evidence, f.reason) for f in findings(form)), strict=True))


def median(judgements: Sequence[Judgement]) -> Judgement:
    """The median of each level (the lower one of two), with the texts of the first judgement that has it."""

    def choose(index: int) -> tuple[int, str, str]:
        level = statistics.median_low(judgement.levels[index] for judgement in judgements)
        source = next(judgement for judgement in judgements if judgement.levels[index] == level)
        return level, source.evidence[index], source.reasons[index]

    return Judgement(*zip(*map(choose, range(6)), strict=True))
