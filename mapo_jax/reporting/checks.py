"""What is suspicious about a run: the ways in which a rising return can lie, each with its figure.

The thresholds are rules of thumb (docs/metrics.md); a check says what to look at, not what is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mapo_jax.reporting.charts import tell
from mapo_jax.reporting.comparison import Difference
from mapo_jax.reporting.diversity import Diversity
from mapo_jax.reporting.folder import SavedRun, setting

FINE, LOOK, ALARM, UNKNOWN = "fine", "look", "alarm", "unknown"
_ORDER = (ALARM, LOOK, UNKNOWN, FINE)


@dataclass(frozen=True)
class Check:
    """One thing that could be wrong."""

    name: str
    state: str  # FINE, LOOK, ALARM or UNKNOWN
    figure: str
    meaning: str


def ends(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean of the first and of the last fifth of a series; None of fewer than two values."""
    if len(values) < 2:
        return None
    part = max(1, len(values) // 5)
    return float(np.mean(values[:part])), float(np.mean(values[-part:]))


def check_run(run: SavedRun, diversity: Sequence[Diversity], change: Difference | None) -> list[Check]:
    """Every check, the worst first.

    Args:
      run: what was read.
      diversity: of the training batches, by step.
      change: of the validation return, before to after.
    """
    checks = [
        _entropy(run),
        _length(run),
        _templates(run, diversity),
        _judge(run),
        _sampler(run),
        _gradients(run),
        _reward_against_score(run, change),
        _early_ends(run),
    ]
    return sorted(checks, key=lambda check: _ORDER.index(check.state))


def _share(value: float) -> str:
    return tell(value, "share")


def _grade(look: bool, alarm: bool) -> str:
    return ALARM if alarm else LOOK if look else FINE


def _entropy(run: SavedRun) -> Check:
    name, pair = "Entropy", ends(run.series("actor/entropy")[1])
    if pair is None:
        return Check(name, UNKNOWN, "not logged", "the policy's spread over tokens")
    first, last = pair
    state = _grade(last < 0.35 * first, last < 0.1 * first or last < 0.02)
    meaning = {
        FINE: "it falls slowly or not at all",
        LOOK: "it has fallen to about a third or less: the policy is settling early",
        ALARM: "it is nearly gone: the policy has collapsed onto few replies",
    }[state]
    return Check(name, state, f"{first:.2f} → {last:.2f} nats per token", meaning)


def _length(run: SavedRun) -> Check:
    name, pair = "Reply length", ends(run.series("response_length/mean")[1])
    cut = run.series("response_length/truncated")[1]
    if pair is None:
        return Check(name, UNKNOWN, "not logged", "whether replies grow")
    first, last = pair
    share = float(np.mean(cut[-max(1, len(cut) // 5) :])) if cut else 0.0
    state = _grade(last > 1.3 * first or share > 0.05, last > 2 * first or share > 0.25)
    meaning = "no steady growth" if state == FINE else "replies grow or are cut: is length what is rewarded?"
    return Check(name, state, f"{first:.1f} → {last:.1f} tokens, {_share(share)} cut", meaning)


def _templates(run: SavedRun, diversity: Sequence[Diversity]) -> Check:
    name = "Templates"
    shares = [entry.openings[0].share if entry.openings else 0.0 for entry in diversity]
    if not shares:
        return Check(name, UNKNOWN, "no dialogues", "how often replies open alike")
    pair = ends(shares) or (shares[0], shares[0])
    most = run.series("kind/most")[1]
    kind = most[-1] if most else 0.0
    own = [entry.own_repeats for entry in diversity]
    again = (ends(own) or (own[0], own[0]))[1]
    worst = max(pair[1], again)
    state = _grade(worst > 0.3 or kind > 0.5, worst > 0.6 or kind > 0.8)
    meaning = (
        "no opening dominates"
        if state == FINE
        else "many replies open with the same words: read some, and see what they cost below"
    )
    figure = (
        f"commonest opening {_share(pair[0])} → {_share(pair[1])} of replies; "
        f"{_share(again)} open like an earlier one of their dialogue"
    )
    return Check(name, state, figure, meaning)


def _judge(run: SavedRun) -> Check:
    name, failed = "Judge", run.series("judge/failure_rate")[1]
    if not failed:
        return Check(name, UNKNOWN, "not logged", "turns that the judge failed to score")
    left = run.series("dialogues/left_out")[1]
    lost = max(left, default=0.0)
    state = _grade(max(failed) > 0.02 or lost > 0.02, max(failed) > 0.2 or lost > 0.2)
    meaning = (
        "nearly every turn has a score"
        if state == FINE
        else "unscored turns are in no statistic; are they the hard ones?"
    )
    figure = f"{_share(float(np.mean(failed)))} of turns unscored (worst step {_share(max(failed))})"
    return Check(name, state, figure, meaning)


def _sampler(run: SavedRun) -> Check:
    name, gaps = "Sampler and trainer", run.series("sampler/logprob_diff_mean")[1]
    if not gaps:
        return Check(name, UNKNOWN, "not logged", "whether both compute the same log-probabilities")
    exact = setting(run.config, "model.dtype") != "bfloat16"
    bound = 1e-4 if exact else 2e-2
    state = _grade(max(gaps) > bound, max(gaps) > 10 * bound)
    meaning = (
        "rounding only" if state == FINE else "more than rounding: the weights or the graphs are not the same"
    )
    return Check(name, state, f"at most {tell(max(gaps))} per token", meaning)


def _gradients(run: SavedRun) -> Check:
    name, norms = "Gradients", run.series("actor/grad_norm")[1]
    if not norms:
        return Check(name, UNKNOWN, "not logged", "whether updates explode")
    skipped = sum(run.series("actor/skipped")[1])
    middle, top = float(np.median(norms)), max(norms)
    state = _grade(top > 10 * middle, skipped > 0 or top > 100 * middle)
    meaning = "no explosion" if state == FINE else "an update stands out: see the curve"
    refused = f", {skipped:.0f} updates refused" if skipped else ""
    return Check(name, state, f"norm {middle:.2f} in the middle, {top:.2f} at most{refused}", meaning)


def _reward_against_score(run: SavedRun, change: Difference | None) -> Check:
    """A return that rises while the benchmark's score does not: a weak side of the reward was found."""
    name = "Return and score"
    _, scores = run.evaluated("epm_q")
    if change is None or len(scores) < 2:
        return Check(name, UNKNOWN, "fewer than two evaluations", "whether EPM-Q rises with the return")
    gain = scores[-1] - scores[0]
    apart = change.verdict == "up" and gain <= 0
    meaning = (
        "both tell the same story" if not apart else "the return rose and EPM-Q did not: reward hacking?"
    )
    return Check(
        name, _grade(apart, False), f"return {change.change:+.2f}, EPM-Q {gain:+.1f} in validation", meaning
    )


def _early_ends(run: SavedRun) -> Check:
    name = "How dialogues end"
    failures, turns = ends(run.series("outcome/failure")[1]), ends(run.series("turns/mean")[1])
    if failures is None or turns is None:
        return Check(name, UNKNOWN, "not logged", "whether dialogues fail and end early")
    worse = failures[1] > failures[0] + 0.1
    meaning = "no more failures than before" if not worse else "more dialogues fail, and early"
    figure = f"failures {_share(failures[0])} → {_share(failures[1])}, turns {turns[0]:.1f} → {turns[1]:.1f}"
    return Check(name, _grade(worse, failures[1] > 0.5 and worse), figure, meaning)
