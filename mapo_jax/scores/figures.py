"""The figures that a run reports about a set of dialogues."""

from collections.abc import Sequence

import numpy as np

from mapo_jax.algorithm.rewards import distance, incremental
from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.scores.empa import score_case

OUTCOMES = ("success", "failure", "timeout", "ended")


def summarize(states: Sequence[DialogueState], discount: float) -> dict[str, float]:
    """Mean figures of the dialogues.

    Args:
      states: finished dialogues; those with outcome `error` or without a scored turn are left out.
      discount: per turn, of `return/mean`.

    Returns:
      `reward/mean` and `reward/std`, the incremental distance of a scored turn, in points; `return/mean`, the
      mean discounted return of the first turn, where an unscored turn has its dialogue's mean reward;
      `epm_q`, EMPA's score; `turns/{mean,min,max}`; `outcome/*`, share of each outcome; `judge/failure_rate`,
      the share of unscored turns; `judge/harm`, the share of scored turns that harm on any axis;
      `dialogues/left_out`, the share of dialogues that no other figure counts. Only the last if none counts.
    """
    counted = [state for state in states if state.counts]
    figures = {"dialogues/left_out": 1 - len(counted) / len(states) if states else 0.0}
    if not counted:
        return figures
    by_dialogue = [dialogue_rewards(state) for state in counted]
    rewards = [reward for rewards in by_dialogue for reward in rewards if reward is not None]
    returns = [_discounted(rewards, discount) for rewards in by_dialogue]
    lengths = [state.turn_count for state in counted]
    levels = [[turn.levels for turn in state.turns] for state in counted]
    starts = [state.scenario.start_position for state in counted]
    scores = [score_case(start, turns)["epm_q"] for start, turns in zip(starts, levels, strict=True)]
    figures |= {
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        "return/mean": float(np.mean(returns)),
        "epm_q": float(np.mean(scores)),
        "turns/mean": float(np.mean(lengths)),
        "turns/min": float(min(lengths)),
        "turns/max": float(max(lengths)),
        "judge/failure_rate": 1 - len(rewards) / sum(lengths),
        "judge/harm": float(np.mean([min(six[1::2]) < 0 for turns in levels for six in turns if six])),
    }
    for outcome in OUTCOMES:
        figures[f"outcome/{outcome}"] = float(np.mean([state.outcome == outcome for state in counted]))
    return figures


def dialogue_rewards(state: DialogueState) -> tuple[float | None, ...]:
    """The incremental distance of each turn, in points; None for unscored turns."""
    rewards = incremental(distance(state.positions)).tolist()
    return tuple(reward if turn.scored else None for turn, reward in zip(state.turns, rewards, strict=True))


def _discounted(rewards: Sequence[float | None], discount: float) -> float:
    scored = [reward for reward in rewards if reward is not None]
    mean = sum(scored) / len(scored)
    return sum(discount**t * (mean if reward is None else reward) for t, reward in enumerate(rewards))
