"""The credit of every turn of a saved step, computed by the functions of training (`learning/credit.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mapo_jax.config import AlgorithmConfig, updated
from mapo_jax.learning.credit import turn_advantages, turn_returns, turn_rewards
from mapo_jax.reporting.folder import SavedBatch, SavedDialogue

MAX_FAILED_SHARE = 0.5  # of the configuration's default, where a run's own is unknown


@dataclass(frozen=True)
class Credit:
    """Per turn of one dialogue; None where the turn has none."""

    rewards: tuple[float | None, ...]
    returns: tuple[float | None, ...]
    turn_level: tuple[float | None, ...] = ()  # advantages: empty in a validation dialogue
    batch_level: tuple[float | None, ...] = ()
    advantages: tuple[float | None, ...] = ()  # those of the run's estimator

    @property
    def first_return(self) -> float | None:
        """The dialogue's return."""
        return self.returns[0] if self.returns else None


def credit_batch(
    batch: SavedBatch,
    algorithm: AlgorithmConfig,
    *,
    scenarios: int = 1,
    rollouts: int = 1,
    max_turns: int = 1,
    max_failed_share: float = MAX_FAILED_SHARE,
) -> list[Credit]:
    """Credit of each of a batch's dialogues, in their order.

    A dialogue whose row is missing is as one that was left out: the statistics then differ from training's.

    Args:
      batch: a step's dialogues; of an evaluation only rewards and returns are given.
      algorithm: of the run.
      scenarios: S of the run (more if the batch has more).
      rollouts: R, likewise.
      max_turns: T, likewise.
      max_failed_share: a dialogue with a larger share of unscored turns is left out.
    """
    if not batch.dialogues:
        return []
    # Places in the order of the saved indices: a damaged row may hold any index, and arrays must stay small.
    rows, columns = (sorted({d.place[axis] for d in batch.dialogues}) for axis in (0, 1))
    places = [(rows.index(d.place[0]), columns.index(d.place[1])) for d in batch.dialogues]
    scenarios, rollouts = max(scenarios, len(rows)), max(rollouts, len(columns))
    turns = max(max_turns, max(len(d.turns) for d in batch.dialogues))
    positions = np.zeros((scenarios, rollouts, turns + 1, 3), np.float32)
    valid = np.zeros((scenarios, rollouts, turns), bool)
    scored = np.zeros_like(valid)
    exists = np.zeros_like(valid)
    judged = np.zeros_like(valid)
    for place, dialogue in zip(places, batch.dialogues, strict=True):
        path, count = dialogue.positions, len(dialogue.turns)
        positions[place] = np.asarray([*path, *[path[-1]] * (turns - count)], np.float32)
        exists[place][:count] = True
        judged[place][:count] = dialogue.scored
        if learned_from(dialogue, max_failed_share):
            valid[place][:count] = True
            scored[place][:count] = dialogue.scored
    # Advantages are over what training learned from; rewards and returns of what it left out are shown too.
    shown = turn_rewards(positions, judged, algorithm=algorithm)
    shown_returns = turn_returns(shown, exists, judged, algorithm=algorithm)
    rewards = turn_rewards(positions, scored, algorithm=algorithm)
    returns = turn_returns(rewards, valid, scored, algorithm=algorithm)
    advantages = [
        turn_advantages(rewards, returns, valid, scored, algorithm=updated(algorithm, {"estimator": name}))
        for name in ("turn", "batch", algorithm.estimator)
    ]
    shown, shown_returns, *advantages = map(np.asarray, (shown, shown_returns, *advantages))
    return [
        Credit(
            _cells(shown[place], judged[place], dialogue),
            _cells(shown_returns[place], exists[place] & judged[place].any(), dialogue),
            *(
                ()
                if batch.validation
                else (_cells(array[place], scored[place], dialogue) for array in advantages)
            ),
        )
        for place, dialogue in zip(places, batch.dialogues, strict=True)
    ]


def learned_from(dialogue: SavedDialogue, max_failed_share: float) -> bool:
    """Whether training uses it: as `rollout.collect.Dialogue.usable` says."""
    return dialogue.counts and dialogue.unscored_turns <= max_failed_share * len(dialogue.turns)


def _cells(values: np.ndarray, mask: np.ndarray, dialogue: SavedDialogue) -> tuple[float | None, ...]:
    count = len(dialogue.turns)
    pairs = zip(values[:count].tolist(), mask[:count], strict=True)
    return tuple(value if keep else None for value, keep in pairs)
