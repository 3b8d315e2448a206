"""Automatic checks of a run: ways in which a rising return can mislead, each with its figures.

The thresholds are rules of thumb (docs/metrics.md). A check points at something to look at; it is no proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mapo_jax.reporting.charts import counted_share, format_value
from mapo_jax.reporting.comparison import Difference
from mapo_jax.reporting.diversity import Diversity
from mapo_jax.reporting.folder import SavedRun, is_number
from mapo_jax.settings import value_at

FINE, LOOK, ALARM, UNKNOWN = "fine", "look", "alarm", "unknown"
_ORDER = (ALARM, LOOK, UNKNOWN, FINE)

T = TypeVar("T")
Part = tuple[float, int]
"""A share, and what it is of; 0 for an unknown number."""


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    state: str  # FINE, LOOK, ALARM or UNKNOWN
    figure: str
    meaning: str


def ends(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and of the last fifth of a series; None for fewer than two values."""
    if len(values) < 2:
        return None
    first, last = fifths(values)
    return float(np.mean(first)), float(np.mean(last))


def fifths(values: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The first and the last fifth of a series, at least one value each."""
    fifth = max(1, len(values) // 5)
    return values[:fifth], values[-fifth:]


def together(parts: Sequence[Part]) -> str:
    """Several shares as one, with its count."""
    total = sum(number for _, number in parts)
    if not total:
        return format_value(float(np.mean([share for share, _ in parts])), "share")
    return counted_share(sum(round(share * number) for share, number in parts) / total, total)


def _parts(run: SavedRun, name: str, *, turns: bool = True) -> list[Part]:
    """A logged share of turns, or of dialogues, step by step, without what other figures leave out."""

    def number(key: str, default: float, row: Mapping[str, float]) -> float:
        return row[key] if is_number(row.get(key)) else default

    sizes = [value_at(run.config, f"rollout.{size}") for size in ("scenarios", "rollouts")]
    size = math.prod(sizes) if all(map(is_number, sizes)) else 0
    parts = []
    for row in run.steps:
        if is_number(row.get(name)):
            dialogues = round(size * (1 - number("dialogues/left_out", 0, row)))
            parts.append((row[name], round(dialogues * (number("turns/mean", 0, row) if turns else 1))))
    return parts


def check_run(run: SavedRun, diversity: Sequence[Diversity], change: Difference | None) -> list[Check]:
    """All checks, the worst result first.

    Args:
      run: the run folder's content.
      diversity: of the training batches, by step.
      change: of the validation return, before to after.
    """
    checks = [
        _entropy(run),
        _length(run),
        _templates(run, diversity),
        _variety(diversity),
        _judge(run),
        _sampler(run),
        _gradients(run),
        _reward_against_score(run, change),
        _early_ends(run),
    ]
    return sorted(checks, key=lambda check: _ORDER.index(check.state))


def _unknown(name: str, meaning: str, figure: str = "not logged") -> Check:
    return Check(name, UNKNOWN, figure, meaning)


def _check(name: str, state: str, figure: str, fine: str, trouble: str) -> Check:
    return Check(name, state, figure, fine if state == FINE else trouble)


def _grade(look: bool, alarm: bool = False) -> str:
    return ALARM if alarm else LOOK if look else FINE


def _entropy(run: SavedRun) -> Check:
    pair = ends(run.series("actor/entropy")[1])
    if pair is None:
        return _unknown("Entropy", "the policy's spread over tokens")
    first, last = pair
    state = _grade(last < 0.35 * first, last < 0.1 * first or last < 0.02)
    trouble = {
        LOOK: "it has fallen to about a third or less: the policy is settling early",
        ALARM: "it is nearly gone: the policy has collapsed onto few replies",
    }
    figure = f"{first:.2f} → {last:.2f} nats per token"
    return _check("Entropy", state, figure, "it falls slowly or not at all", trouble.get(state, ""))


def _length(run: SavedRun) -> Check:
    pair, cut = ends(run.series("response_length/mean")[1]), run.series("response_length/truncated")[1]
    if pair is None:
        return _unknown("Reply length", "whether replies grow")
    first, last = pair
    share = float(np.mean(fifths(cut)[1])) if cut else 0.0
    state = _grade(last > 1.3 * first or share > 0.05, last > 2 * first or share > 0.25)
    figure = f"{first:.1f} → {last:.1f} tokens"
    figure += f", {together(fifths(_parts(run, 'response_length/truncated'))[1])} cut" if cut else ""
    trouble = "replies grow or are cut: is length what is rewarded?"
    return _check("Reply length", state, figure, "no steady growth", trouble)


def _templates(run: SavedRun, diversity: Sequence[Diversity]) -> Check:
    if not diversity:
        return _unknown("Templates", "how often replies open alike", "no dialogues")
    openings = [(e.openings[0].share if e.openings else 0.0, e.replies) for e in diversity]
    repeats = fifths([(entry.own_repeats, entry.replies) for entry in diversity])[1]
    last, again = (float(np.mean([share for share, _ in part])) for part in (fifths(openings)[1], repeats))
    kind, worst = (_parts(run, "kind/most") or [(0.0, 0)])[-1:], max(last, again)
    state = _grade(worst > 0.3 or kind[0][0] > 0.5, worst > 0.6 or kind[0][0] > 0.8)
    figure = (
        f"commonest opening {' → '.join(map(together, fifths(openings)))} of replies; "
        f"{together(repeats)} open like an earlier one of their dialogue"
    )
    trouble = "many replies open with the same words: read some, and see what they cost below"
    if kind[0][0] > 0.5:
        figure += f"; {together(kind)} are of one kind"
        trouble = "many replies are alike: read some, and see what they cost below"
    return _check("Templates", state, figure, "no opening dominates", trouble)


def _variety(diversity: Sequence[Diversity]) -> Check:
    pair = ends([entry.distinct[2] for entry in diversity if entry.distinct[2] is not None])
    repeats = ends([entry.own_repeats for entry in diversity])
    if pair is None or repeats is None:
        return _unknown("Variety", "whether replies become alike", "too few dialogues")
    (first, last), (before, after) = pair, repeats
    shares = fifths([(entry.own_repeats, entry.replies) for entry in diversity])
    state = _grade(last < 0.7 * first or after > before + 0.2, last < 0.4 * first or after > before + 0.5)
    figure = f"distinct-3 {first:.2f} → {last:.2f}; replies that repeat their dialogue "
    figure += " → ".join(map(together, shares))
    trouble = "replies become alike, or repeat what they said: read some of the last steps"
    return _check("Variety", state, figure, "replies stay as different as they were", trouble)


def _judge(run: SavedRun) -> Check:
    failed = run.series("judge/failure_rate")[1]
    if not failed:
        return _unknown("Judge", "turns that the judge failed to score")
    worst = max([*failed, *run.series("dialogues/left_out")[1]])
    parts = _parts(run, "judge/failure_rate")
    figure = f"{together(parts)} of turns unscored, {together([max(parts)])} in the worst step"
    trouble = "unscored turns are in no statistic; are they the hard ones?"
    return _check(
        "Judge", _grade(worst > 0.02, worst > 0.2), figure, "nearly every turn has a score", trouble
    )


def _sampler(run: SavedRun) -> Check:
    # Weights of an earlier version spoke where there is staleness: there the difference is no error.
    stale = dict(zip(*run.series("sampler/staleness"), strict=True))
    gaps = [
        gap for step, gap in zip(*run.series("sampler/logprob_diff_mean"), strict=True) if not stale.get(step)
    ]
    if not gaps:
        return _unknown("Sampler and trainer", "whether both compute the same log-probabilities")
    bound = 2e-2 if value_at(run.config, "model.dtype") == "bfloat16" else 1e-4
    state = _grade(max(gaps) > bound, max(gaps) > 10 * bound)
    trouble = "more than rounding: the weights or the graphs are not the same"
    return _check(
        "Sampler and trainer", state, f"at most {format_value(max(gaps))} per token", "rounding only", trouble
    )


def _gradients(run: SavedRun) -> Check:
    norms = run.series("actor/grad_norm")[1]
    if not norms:
        return _unknown("Gradients", "whether updates explode")
    skipped = sum(run.series("actor/skipped")[1])
    middle, top = float(np.median(norms)), max(norms)
    state = _grade(top > 10 * middle, skipped > 0 or top > 100 * middle)
    figure = f"norm {middle:.2f} in the middle, {top:.2f} at most"
    figure += f", {skipped:.0f} updates refused" if skipped else ""
    return _check("Gradients", state, figure, "no explosion", "an update stands out: see the curve")


def _reward_against_score(run: SavedRun, change: Difference | None) -> Check:
    """A return that rises while the benchmark's score does not suggests reward hacking."""
    name, scores = "Return and score", run.evaluated("epm_q")[1]
    if change is None or len(scores) < 2:
        return _unknown(name, "whether EPM-Q rises with the return", "fewer than two evaluations")
    gain = scores[-1] - scores[0]
    state = _grade(change.verdict == "up" and gain <= 0)
    figure = f"return {change.change:+.2f}, EPM-Q {gain:+.1f} in validation"
    trouble = "the return rose and EPM-Q did not: reward hacking?"
    return _check(name, state, figure, "both tell the same story", trouble)


def _early_ends(run: SavedRun) -> Check:
    name = "How dialogues end"
    failures, turns = ends(run.series("outcome/failure")[1]), ends(run.series("turns/mean")[1])
    if failures is None or turns is None:
        return _unknown(name, "whether dialogues fail and end early")
    worse = failures[1] > failures[0] + 0.1
    state = _grade(worse, worse and failures[1] > 0.5)
    shares = " → ".join(map(together, fifths(_parts(run, "outcome/failure", turns=False))))
    figure = f"failures {shares}, turns {turns[0]:.1f} → {turns[1]:.1f}"
    return _check(name, state, figure, "no more failures than before", "more dialogues fail, and early")
