"""Did the policy improve by more than the noise? Paired differences over scenario cards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference between two sets of dialogues on the same cards."""

    before: float
    after: float
    change: float
    low: float  # ends of the 95 % interval of the change; infinite with a single card
    high: float
    cards: int

    @property
    def verdict(self) -> str:
        """`up`, `down`, or `unclear` if the interval contains zero."""
        return "up" if self.low > 0 else "down" if self.high < 0 else "unclear"


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of the mean by Student's t (Gosset 1908) with n - 1 degrees of freedom.

    The ends are infinite for a single value.

    Raises:
      ValueError: no values.
    """
    values = np.asarray(differences, float)
    if not values.size:
        raise ValueError("an interval needs at least one value")
    middle = float(values.mean())
    if values.size == 1:
        return middle, -np.inf, np.inf
    error = float(values.std(ddof=1)) / np.sqrt(values.size)
    reach = float(stdtrit(values.size - 1, (1 + CONFIDENCE) / 2)) * error
    return middle, middle - reach, middle + reach


def compare(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> Difference | None:
    """Compares values card by card. Cards are the units: dialogues of one card are not independent.

    Args:
      before: card -> one value per dialogue.
      after: the same for the other set.

    Returns:
      The difference over the cards in both sets; None if there are none.
    """
    shared = [card for card in before if card in after and len(before[card]) and len(after[card])]
    if not shared:
        return None
    one, other = ([float(np.mean(side[card])) for card in shared] for side in (before, after))
    change, low, high = interval([b - a for a, b in zip(one, other, strict=True)])
    return Difference(float(np.mean(one)), float(np.mean(other)), change, low, high, len(shared))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values, fewer at the ends."""
    return [float(np.mean(near)) for near in _windows(values, window)]


def running_band(values: Sequence[float], window: int) -> list[tuple[float, float]]:
    """Running mean minus and plus one standard deviation of the window, clipped to the values' range."""
    least, most = min(values), max(values)
    moments = [(float(np.mean(near)), float(np.std(near))) for near in _windows(values, window)]
    return [(max(least, middle - deviation), min(most, middle + deviation)) for middle, deviation in moments]


def _windows(values: Sequence[float], window: int) -> list[Sequence[float]]:
    reach = window // 2
    return [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
