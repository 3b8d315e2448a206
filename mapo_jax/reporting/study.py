"""A run and what is computed from it: credit, diversity, changes, checks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from mapo_jax.reporting import charts
from mapo_jax.reporting.behaviour import Behaviour, behaviour
from mapo_jax.reporting.charts import format_value, signed
from mapo_jax.reporting.checks import ALARM, LOOK, UNKNOWN, Check, check_run
from mapo_jax.reporting.comparison import Difference, compare, mean
from mapo_jax.reporting.credit import Credit, CreditedBatch, credit_batch
from mapo_jax.reporting.dialogues import SavedBatch, SavedDialogue
from mapo_jax.reporting.diversity import Diversity, analyse
from mapo_jax.reporting.folder import SavedRun, counted
from mapo_jax.reporting.payload import Group
from mapo_jax.settings import value_at

# Credit of a dialogue -> its contribution to a metric; None if it does not count.
_VALUES: dict[str, Callable[[SavedDialogue, Credit], float | None]] = {
    "return/mean": lambda d, c: c.first_return,
    "reward/mean": lambda d, c: mean(c.rewards),
    "epm_q": lambda d, c: d.epm_q,
    "outcome/success": lambda d, c: float(d.outcome == "success"),
    "turns/mean": lambda d, c: float(len(d.turns)),
    "distance/start": lambda d, c: d.distances[0],
    "distance/end": lambda d, c: d.distances[-1],
}
COMPARED = tuple(name for name in _VALUES if name != "turns/mean")


@dataclass(frozen=True)
class Study:
    """A run and what is computed from it."""

    number: int
    run: SavedRun
    training: tuple[CreditedBatch, ...]
    validation: tuple[CreditedBatch, ...]
    diversity: tuple[Diversity, ...]  # of the training batches

    @classmethod
    def of(cls, number: int, run: SavedRun) -> Study:
        """Computes the credit of every dialogue and the diversity of every step."""
        sizes = {
            name: value_at(run.config, f"rollout.{name}") for name in ("scenarios", "rollouts", "max_turns")
        }
        shape = {name: size for name, size in sizes.items() if isinstance(size, int) and 0 < size < 10_000}
        share = value_at(run.config, "environment.max_failed_share")
        if isinstance(share, (int, float)):
            shape["max_failed_share"] = share
        cards = max((len({d.place[0] for d in b.dialogues}) for b in run.validation), default=1)
        shape["scenarios"] = max(shape.get("scenarios", 1), cards)  # one shape, one compilation
        training, validation = (
            tuple((batch, tuple(credit_batch(batch, run.algorithm, **shape))) for batch in batches)
            for batches in (run.training, run.validation)
        )
        diversity = analyse(run.training, [credits for _, credits in training])
        return cls(number, run, training, validation, tuple(diversity))

    @property
    def colour(self) -> str:
        """Of its curves."""
        return f"series-{self.number + 1}"

    @property
    def dash(self) -> str:
        """Of its curves, so that colour is not the only difference."""
        return charts.DASHES[self.number % len(charts.DASHES)]

    @property
    def first(self) -> CreditedBatch | None:
        """The evaluation before training, if there is one."""
        return self.validation[0] if len(self.validation) > 1 else None

    @property
    def last(self) -> CreditedBatch | None:
        """The latest evaluation."""
        return self.validation[-1] if self.validation else None

    @cached_property
    def changes(self) -> dict[str, Difference]:
        """Validation before and after, by metric of COMPARED."""
        if self.first is None or self.last is None:
            return {}
        differences = {
            name: compare(*(values_by_card(*side, name) for side in (self.first, self.last)))
            for name in COMPARED
        }
        return {name: difference for name, difference in differences.items() if difference is not None}

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and validation return of the best evaluation, if it is not the last one."""
        steps, returns = self.run.evaluated("return/mean")
        if len(steps) < 2 or max(returns) == returns[-1]:
            return None
        return steps[returns.index(max(returns))], max(returns)

    @cached_property
    def behaviour(self) -> Behaviour | None:
        """What the policy learnt to do."""
        return behaviour(self.run, self.first, self.last) if self.first and self.last else None

    @cached_property
    def checks(self) -> list[Check]:
        """Automatic checks for suspicious figures."""
        return check_run(self.run, self.diversity, self.changes.get("return/mean"))

    @property
    def groups(self) -> list[Group]:
        """Every batch with its credit."""
        return [Group(self.number, *batch) for batch in (*self.training, *self.validation)]

    @cached_property
    def verdict(self) -> tuple[str, str, str]:
        """Whether the policy improved: headline, sentence, and state (good, bad, unclear)."""
        change = self.changes.get("return/mean")
        if change is None:
            return "Not known yet", "Fewer than two evaluations are there to compare.", "unclear"
        margin = f" (95 % interval {signed(change.low)} to {signed(change.high)})" if change.cards > 1 else ""
        sentence = (
            f"On {counted(change.cards, 'card')} that training never saw, the return of a dialogue went from "
            f"{format_value(change.before)} to {format_value(change.after)}: {signed(change.change)}{margin}."
        )
        word, state = {
            "up": ("It got better", "good"),
            "down": ("It got worse", "bad"),
            "unclear": ("No clear change", "unclear"),
        }[change.verdict]
        return word, f"{sentence} {self._net_help()}".strip(), state

    @property
    def suspicion(self) -> tuple[str, str]:
        """A sentence about the checks, and the state of the worst one."""
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
        checked = counted(len(self.checks) - len(blind), "check")
        return f"Nothing looks suspicious in {checked}.{unknown}", worst

    def _net_help(self) -> str:
        """Whether users end better off than they began: a better return may only mean less harm."""
        start, end = self.changes.get("distance/start"), self.changes.get("distance/end")
        if start is None or end is None:
            return ""
        was, now = end.before - start.before, end.after - start.after
        lack = f"{format_value(start.after)} points at the start and {format_value(end.after)} at the end"
        if now <= 0:
            return f"Users lack {lack}: they are helped."
        less = ", though by less than before" if now < was else ""
        return f"Users lack {lack}: they still end worse off than they began{less}."


def values_of(metric: str) -> Callable[[SavedDialogue, Credit], float | None]:
    """A dialogue's contribution to a metric; None for a dialogue that statistics do not count."""
    value = _VALUES[metric]
    return lambda dialogue, credit: value(dialogue, credit) if dialogue.state.counts else None


def values_by_card(batch: SavedBatch, credits: Sequence[Credit], metric: str) -> dict[str, list[float]]:
    """Contributions of the dialogues to a metric, by card; dialogues that do not count are left out."""
    value, values = values_of(metric), defaultdict(list)
    for dialogue, credit in zip(batch.dialogues, credits, strict=True):
        if (figure := value(dialogue, credit)) is not None:
            values[dialogue.card].append(figure)
    return dict(values)
