"""Did it get better, and by more than the noise? Means of paired differences over scenario cards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from mapo_jax.reporting.folder import SavedBatch, SavedDialogue

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference between two sets of dialogues over the same cards."""

    before: float
    after: float
    change: float
    low: float  # ends of the 95 % interval of the change; infinite with a single card
    high: float
    cards: int

    @property
    def verdict(self) -> str:
        """`up`, `down`, or `unclear` where the interval holds zero."""
        return "up" if self.low > 0 else "down" if self.high < 0 else "unclear"


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the two ends of its 95 % interval by Student's t (Gosset 1908), n - 1 degrees of freedom.

    Infinite ends for a single value.

    Raises:
      ValueError: no values.
    """
    values = np.asarray(differences, float)
    if not values.size:
        raise ValueError("an interval needs at least one value")
    mean = float(values.mean())
    if values.size == 1:
        return mean, -np.inf, np.inf
    error = float(values.std(ddof=1)) / np.sqrt(values.size)
    reach = float(stdtrit(values.size - 1, (1 + CONFIDENCE) / 2)) * error
    return mean, mean - reach, mean + reach


def compare(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> Difference | None:
    """Compares values by card. Cards are the units: dialogues of one card are not independent.

    Args:
      before: card -> a value per dialogue.
      after: the same, of the other set.

    Returns:
      The difference over the cards that both have; None if they share none.
    """
    shared = [card for card in before if card in after and len(before[card]) and len(after[card])]
    if not shared:
        return None
    one = [float(np.mean(before[card])) for card in shared]
    other = [float(np.mean(after[card])) for card in shared]
    change, low, high = interval([b - a for a, b in zip(one, other, strict=True)])
    return Difference(float(np.mean(one)), float(np.mean(other)), change, low, high, len(shared))


def by_card(batch: SavedBatch, value: Callable[[int, SavedDialogue], float | None]) -> dict[str, list[float]]:
    """Values of a batch's dialogues by card; `value` gets the index and the dialogue, None is left out."""
    values = defaultdict(list)
    for index, dialogue in enumerate(batch.dialogues):
        if (found := value(index, dialogue)) is not None:
            values[dialogue.scenario].append(found)
    return dict(values)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the `window` values around each, fewer at the ends."""
    reach = window // 2
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


def running_band(values: Sequence[float], window: int) -> list[tuple[float, float]]:
    """Running mean minus and plus one standard deviation of the values around; within the values' range."""
    reach = window // 2
    least, most = min(values), max(values)
    bands = []
    for i in range(len(values)):
        near = values[max(0, i - reach) : i + reach + 1]
        mean, deviation = float(np.mean(near)), float(np.std(near))
        bands.append((max(least, mean - deviation), min(most, mean + deviation)))
    return bands
