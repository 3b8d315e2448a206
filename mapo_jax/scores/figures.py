"""What a set of dialogues came to, in the figures that a run reports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.scores.empa import score_case

OUTCOMES = ("success", "failure", "timeout", "ended")


def summarize(states: Sequence[DialogueState], discount: float) -> dict[str, float]:
    """The mean figures of some dialogues.

    Args:
      states: dialogues that have ended; those with outcome `error` or without a scored turn are left out.
      discount: per turn, of `return/mean`.

    Returns:
      `reward/mean` and `reward/std`, the incremental distance of a scored turn, in points; `return/mean`, the
      mean over dialogues of the discounted return of the first turn, unscored turns counted as their
      dialogue's mean reward; `epm_q`, EMPA's score; `turns/{mean,min,max}`; `outcome/*`, shares of how the
      dialogues ended; `judge/failure_rate`, the share of unscored turns; `dialogues/left_out`, the share of
      those that no other figure counts. Empty of all but the last where nothing can be counted.
    """
    counted = [state for state in states if state.outcome != "error" and any(t.scored for t in state.turns)]
    figures = {"dialogues/left_out": 1 - len(counted) / len(states) if states else 0.0}
    if not counted:
        return figures
    rewards = [reward for state in counted for reward in state.rewards if reward is not None]
    returns = [_discounted(state.rewards, discount) for state in counted]
    lengths = [state.turn_count for state in counted]
    levels = [[turn.judgement.levels if turn.judgement else None for turn in s.turns] for s in counted]
    scores = [
        score_case(state.scenario.start_position, level)["epm_q"]
        for state, level in zip(counted, levels, strict=True)
    ]
    figures |= {
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        "return/mean": float(np.mean(returns)),
        "epm_q": float(np.mean(scores)),
        "turns/mean": float(np.mean(lengths)),
        "turns/min": float(min(lengths)),
        "turns/max": float(max(lengths)),
        "judge/failure_rate": 1 - len(rewards) / sum(lengths),
    }
    for outcome in OUTCOMES:
        figures[f"outcome/{outcome}"] = float(np.mean([state.outcome == outcome for state in counted]))
    return figures


def _discounted(rewards: Sequence[float | None], discount: float) -> float:
    scored = [reward for reward in rewards if reward is not None]
    mean = sum(scored) / len(scored)
    return sum(discount**t * (mean if reward is None else reward) for t, reward in enumerate(rewards))
