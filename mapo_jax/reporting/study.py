"""A run and what follows from it: credit, diversity, what changed, whether it is suspicious."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mapo_jax.reporting import charts
from mapo_jax.reporting.behaviour import Behaviour, behaviour
from mapo_jax.reporting.charts import signed, tell
from mapo_jax.reporting.checks import ALARM, LOOK, UNKNOWN, Check, check_run
from mapo_jax.reporting.comparison import Difference, by_card, compare
from mapo_jax.reporting.credit import Credit, credit_batch
from mapo_jax.reporting.diversity import Diversity, analyse
from mapo_jax.reporting.folder import SavedBatch, SavedDialogue, SavedRun, setting
from mapo_jax.reporting.payload import Group

COMPARED = ("return/mean", "reward/mean", "epm_q", "outcome/success", "distance/start", "distance/end")


@dataclass(frozen=True)
class Study:
    """A run and what follows from it."""

    number: int
    run: SavedRun
    credits: tuple[tuple[Credit, ...], ...]  # of run.training
    validation_credits: tuple[tuple[Credit, ...], ...]
    diversity: tuple[Diversity, ...]

    @classmethod
    def of(cls, number: int, run: SavedRun) -> Study:
        """Computes the credit of every dialogue and the diversity of every step."""
        shape = {
            "scenarios": setting(run.config, "rollout.scenarios"),
            "rollouts": setting(run.config, "rollout.rollouts"),
            "max_turns": setting(run.config, "rollout.max_turns"),
        }
        shape = {name: size for name, size in shape.items() if isinstance(size, int) and 0 < size < 10_000}
        share = setting(run.config, "environment.max_failed_share")
        if isinstance(share, (int, float)):
            shape["max_failed_share"] = share
        held_cards = max((len({d.place[0] for d in b.dialogues}) for b in run.validation), default=1)
        shape["scenarios"] = max(shape.get("scenarios", 1), held_cards)  # one shape, one compilation
        trained = tuple(tuple(credit_batch(b, run.algorithm, **shape)) for b in run.training)
        held = tuple(tuple(credit_batch(b, run.algorithm, **shape)) for b in run.validation)
        return cls(number, run, trained, held, tuple(analyse(run.training, trained)))

    @property
    def colour(self) -> str:
        """Of its curves."""
        return f"series-{self.number + 1}"

    @property
    def dash(self) -> str:
        """Of its curves, so that colour is not the only difference."""
        return charts.DASHES[self.number % len(charts.DASHES)]

    @property
    def first(self) -> tuple[SavedBatch, Sequence[Credit]] | None:
        """The evaluation before training, if it was held."""
        if len(self.run.validation) > 1:
            return self.run.validation[0], self.validation_credits[0]
        return None

    @property
    def last(self) -> tuple[SavedBatch, Sequence[Credit]] | None:
        """The latest evaluation."""
        if self.run.validation:
            return self.run.validation[-1], self.validation_credits[-1]
        return None

    @cached_property
    def changes(self) -> dict[str, Difference]:
        """Validation before and after, by metric of COMPARED."""
        if self.first is None or self.last is None:
            return {}
        found = {}
        for name in COMPARED:
            value = values_of(name)
            sides = [
                by_card(batch, lambda i, d, c=credits, value=value: value(d, c[i]))
                for batch, credits in (self.first, self.last)
            ]
            if (difference := compare(*sides)) is not None:
                found[name] = difference
        return found

    @cached_property
    def behaviour(self) -> Behaviour | None:
        """What it learnt to do."""
        return behaviour(self.run, self.first, self.last) if self.first and self.last else None

    @cached_property
    def checks(self) -> list[Check]:
        """What is suspicious."""
        return check_run(self.run, self.diversity, self.changes.get("return/mean"))

    @property
    def groups(self) -> list[Group]:
        """Every batch with its credit."""
        sides = [
            *zip(self.run.training, self.credits, strict=True),
            *zip(self.run.validation, self.validation_credits, strict=True),
        ]
        return [Group(self.number, batch, credits) for batch, credits in sides]

    @cached_property
    def verdict(self) -> tuple[str, str, str]:
        """Word, sentence, and state (good, bad, unclear) of whether it got better."""
        change = self.changes.get("return/mean")
        if change is None:
            return "Not known yet", "Fewer than two evaluations are there to compare.", "unclear"
        what = f"went from {tell(change.before)} to {tell(change.after)}"
        margin = f" (95 % interval {signed(change.low)} to {signed(change.high)})" if change.cards > 1 else ""
        on = f"{change.cards} {'card' if change.cards == 1 else 'cards'} that training never saw"
        sentence = f"On {on}, the return of a dialogue {what}: {signed(change.change)}{margin}."
        word, state = {
            "up": ("It got better", "good"),
            "down": ("It got worse", "bad"),
            "unclear": ("No clear change", "unclear"),
        }[change.verdict]
        return word, f"{sentence} {self._net_help()}".strip(), state

    @property
    def suspicion(self) -> tuple[str, str]:
        """Whether anything is suspicious, in a sentence, and the state of the worst check."""
        if not self.checks:
            return "", UNKNOWN
        worst = self.checks[0].state
        seen = [check.name.lower() for check in self.checks if check.state in (ALARM, LOOK)]
        blind = [check.name.lower() for check in self.checks if check.state == UNKNOWN]
        unknown = f" Could not be checked: {', '.join(blind)}." if blind else ""
        if seen:
            return f"To look at: {', '.join(seen)}.{unknown}", worst
        if len(blind) == len(self.checks):
            return "Nothing was logged that a check could look at.", worst
        fine = len(self.checks) - len(blind)
        return f"Nothing looks suspicious in {fine} {'check' if fine == 1 else 'checks'}.{unknown}", worst

    def _net_help(self) -> str:
        """Whether users end better off than they began: a better return may still be less harm."""
        start, end = self.changes.get("distance/start"), self.changes.get("distance/end")
        if start is None or end is None:
            return ""
        was, now = end.before - start.before, end.after - start.after
        lack = f"{tell(start.after)} points at the start and {tell(end.after)} at the end"
        if now <= 0:
            return f"Users lack {lack}: they are helped."
        less = ", though by less than before" if now < was else ""
        return f"Users lack {lack}: they still end worse off than they began{less}."


def values_of(name: str) -> Callable[[SavedDialogue, Credit], float | None]:
    """One dialogue's part in a metric."""

    def mean_reward(dialogue: SavedDialogue, credit: Credit) -> float | None:
        scored = [reward for reward in credit.rewards if reward is not None]
        return float(np.mean(scored)) if dialogue.counts and scored else None

    return {
        "return/mean": lambda d, c: c.first_return if d.counts else None,
        "reward/mean": mean_reward,
        "epm_q": lambda d, c: d.epm_q,
        "outcome/success": lambda d, c: float(d.outcome == "success") if d.counts else None,
        "turns/mean": lambda d, c: float(len(d.turns)) if d.counts else None,
        "distance/start": lambda d, c: d.distances[0] if d.counts else None,
        "distance/end": lambda d, c: d.distances[-1] if d.counts else None,
    }[name]


def returns_by_card(batch: SavedBatch, credits: Sequence[Credit]) -> dict[str, list[float]]:
    return by_card(batch, lambda i, d: credits[i].first_return if d.counts else None)
