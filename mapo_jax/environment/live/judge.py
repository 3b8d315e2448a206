"""The judge, played by a language model: 18 fields for one reply, each level behind its evidence."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence

from mapo_jax.environment import state as calculator
from mapo_jax.environment.dialogue import DialogueState, Judgement, RoleFailure, Turn
from mapo_jax.environment.live.calls import Complete
from mapo_jax.environment.live.forms import ReplyForm, findings, read
from mapo_jax.environment.live.prompts import Messages, chat, needs, render
from mapo_jax.environment.scenario import Scenario

SCHEMA = ReplyForm.model_json_schema()
_SEED_STEP = 0x9E3779B1  # sets the samples of one reply apart


class LiveJudge:
    """Scores the last reply; with several samples the median of each level."""

    def __init__(
        self,
        complete: Complete,
        samples: int = 1,
        on_spread: Callable[[float], None] = lambda spread: None,
    ) -> None:
        """Args:

        complete: the model that plays the judge.
        samples: judgements per reply.
        on_spread: told, where there are several, how far apart they lie: the range of the points of v_t.
        """
        self._complete, self._samples, self._on_spread = complete, samples, on_spread

    async def score(self, state: DialogueState, reply: str) -> Judgement:
        """The judgement; of several samples, those that succeeded count."""
        card = state.scenario
        messages = judge_messages(card, state.turns, state.user, reply)
        samples = await asyncio.gather(
            *[
                self._sample(card, messages, state.seed + index * _SEED_STEP, silent=not reply.strip())
                for index in range(self._samples)
            ],
            return_exceptions=True,
        )
        judgements = [sample for sample in samples if isinstance(sample, Judgement)]
        for sample in samples:
            if isinstance(sample, BaseException) and not (judgements and isinstance(sample, RoleFailure)):
                raise sample
        if len(judgements) > 1:
            totals = [sum(calculator.points(judgement.levels)) for judgement in judgements]
            self._on_spread(max(totals) - min(totals))
        return median(judgements)

    async def _sample(self, card: Scenario, messages: Messages, seed: int, *, silent: bool) -> Judgement:
        text = await self._complete(
            messages,
            seed=seed % 2**32,
            schema=SCHEMA,
            check=lambda text: read(text, ReplyForm, silent=silent),
            repair=lambda problem: render(card.language, "json_repair", problem=problem),
        )
        return to_judgement(read(text, ReplyForm, silent=silent))


def judge_messages(card: Scenario, turns: Sequence[Turn], message: str, reply: str) -> Messages:
    """What the model that plays the judge is asked about `reply` to `message`."""
    return chat(
        render(card.language, "judge_system"),
        render(
            card.language,
            "judge_turn",
            card=card,
            needs=needs(card),
            turns=turns,
            message=message,
            reply=reply,
        ),
    )


def to_judgement(form: ReplyForm) -> Judgement:
    """The form as the environment's own value."""
    found = findings(form)
    return Judgement(
        tuple(finding.level for finding in found),  # type: ignore[arg-type]
        tuple(finding.evidence for finding in found),  # type: ignore[arg-type]
        tuple(finding.reason for finding in found),  # type: ignore[arg-type]
    )


def median(judgements: Sequence[Judgement]) -> Judgement:
    """Each level's median, the lower one of two, with the words of the first judgement that gave it."""
    levels, evidence, reasons = [], [], []
    for index in range(6):
        level = statistics.median_low(judgement.levels[index] for judgement in judgements)
        source = next(judgement for judgement in judgements if judgement.levels[index] == level)
        levels.append(level)
        evidence.append(source.evidence[index])
        reasons.append(source.reasons[index])
    return Judgement(tuple(levels), tuple(evidence), tuple(reasons))  # type: ignore[arg-type]
