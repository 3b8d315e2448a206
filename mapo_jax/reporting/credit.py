"""Credit of every turn of a saved step, computed by the functions of training (`learning/credit.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mapo_jax.config import AlgorithmConfig, updated
from mapo_jax.learning.credit import turn_advantages, turn_returns, turn_rewards
from mapo_jax.reporting.dialogues import SavedBatch, SavedDialogue, extended

MAX_FAILED_SHARE = 0.5  # the configuration's default, for runs whose own value is unknown


@dataclass(frozen=True)
class Credit:
    """Per turn of one dialogue; None where the turn has no value."""

    rewards: tuple[float | None, ...]
    returns: tuple[float | None, ...]
    turn_level: tuple[float | None, ...] = ()  # advantages: empty in a validation dialogue
    batch_level: tuple[float | None, ...] = ()
    advantages: tuple[float | None, ...] = ()  # of the run's estimator

    @property
    def first_return(self) -> float | None:
        """The dialogue's return."""
        return self.returns[0] if self.returns else None


CreditedBatch = tuple[SavedBatch, Sequence[Credit]]
"""A batch and the credit of each of its dialogues."""


def credit_batch(
    batch: SavedBatch,
    algorithm: AlgorithmConfig,
    *,
    scenarios: int = 1,
    rollouts: int = 1,
    max_turns: int = 1,
    max_failed_share: float = MAX_FAILED_SHARE,
) -> list[Credit]:
    """Credit of each dialogue of a batch, in the batch's order.

    A dialogue whose row is missing counts as left out; the statistics then differ from training's.

    Args:
      batch: dialogues of one step; for an evaluation only rewards and returns are computed.
      algorithm: settings of the run.
      scenarios: S of the run; raised if the batch has more.
      rollouts: R, likewise.
      max_turns: T, likewise.
      max_failed_share: a dialogue with a larger share of unscored turns is left out of the statistics.
    """
    if not batch.dialogues:
        return []
    # Ranks instead of the saved indices: a damaged row may have any index, and arrays must stay small.
    rows, columns = (sorted({d.place[axis] for d in batch.dialogues}) for axis in (0, 1))
    cells = [(rows.index(d.place[0]), columns.index(d.place[1])) for d in batch.dialogues]
    turns = max(max_turns, *(len(d.turns) for d in batch.dialogues))
    shape = max(scenarios, len(rows)), max(rollouts, len(columns)), turns
    positions = np.zeros((*shape[:2], turns + 1, 3), np.float32)
    exists, judged, valid, scored = np.zeros((4, *shape), bool)
    for cell, dialogue in zip(cells, batch.dialogues, strict=True):
        count = len(dialogue.turns)
        positions[cell] = extended(dialogue.state.positions, turns + 1)
        exists[cell][:count] = True
        judged[cell][:count] = [turn.scored for turn in dialogue.turns]
        if dialogue.state.usable(max_failed_share):
            valid[cell], scored[cell] = exists[cell], judged[cell]
    # Advantages come from the dialogues that training used; rewards and returns are shown for all.
    rewards = turn_rewards(positions, judged, algorithm=algorithm)
    returns = turn_returns(rewards, exists, judged, algorithm=algorithm)
    used_rewards = turn_rewards(positions, scored, algorithm=algorithm)
    used_returns = turn_returns(used_rewards, valid, scored, algorithm=algorithm)
    advantages = [
        np.asarray(
            turn_advantages(
                used_rewards, used_returns, valid, scored, algorithm=updated(algorithm, {"estimator": name})
            )
        )
        for name in (() if batch.validation else ("turn", "batch", algorithm.estimator))
    ]
    rewards, returns = np.asarray(rewards), np.asarray(returns)
    return [
        Credit(
            _turn_values(rewards[cell], judged[cell], dialogue),
            _turn_values(returns[cell], exists[cell] & judged[cell].any(), dialogue),
            *(_turn_values(values[cell], scored[cell], dialogue) for values in advantages),
        )
        for cell, dialogue in zip(cells, batch.dialogues, strict=True)
    ]


def _turn_values(values: np.ndarray, mask: np.ndarray, dialogue: SavedDialogue) -> tuple[float | None, ...]:
    count = len(dialogue.turns)
    pairs = zip(values[:count].tolist(), mask[:count], strict=True)
    return tuple(value if keep else None for value, keep in pairs)
