"""Bootstrap intervals of scores: percentiles over resampled cases."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

RESAMPLES = 2_000
LEVEL = 0.95
_CELLS = 1_000_000  # draws x cases in memory at once: 8 MB


def intervals(
    sums: Float[np.ndarray, "N K"], counts: Float[np.ndarray, "N K"], *, seed: int = 0
) -> Float[np.ndarray, "2 K"]:
    """Percentile bootstrap intervals of K ratios, over N cases drawn with replacement.

    A figure is the sum of `sums` over the cases divided by the sum of `counts`: the mean over cases if all
    counts are 1, the mean over turns if they are the cases' turns. Whole cases are drawn, because the turns
    of a dialogue are not independent.

    Args:
      sums: contribution of each case to the numerator of each figure.
      counts: contribution to the denominator; no column may be all 0.
      seed: of the draws; the same seed gives the same intervals.

    Returns:
      Lower and upper ends of the central 95 %; NaN with fewer than two cases. A draw with a denominator of 0
      is left out.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    cases, figures = sums.shape
    if cases < 2:
        return np.full((2, figures), np.nan)
    rng = np.random.default_rng(seed)
    ratios = np.empty((RESAMPLES, figures))
    rows = max(1, _CELLS // cases)
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, RESAMPLES, rows):
            size = min(rows, RESAMPLES - start)
            drawn = rng.multinomial(cases, np.full(cases, 1 / cases), size=size)
            ratios[start : start + size] = (drawn @ sums) / (drawn @ counts)
    ratios[~np.isfinite(ratios)] = np.nan
    tail = 100 * (1 - LEVEL) / 2
    return np.nanpercentile(ratios, [tail, 100 - tail], axis=0)


def interval_list(ends: Float[np.ndarray, "2 K"]) -> list[list[float] | None]:
    """Intervals for JSON: [low, high] of each figure, None for an unknown one."""
    return [None if np.isnan(pair).any() else pair.tolist() for pair in ends.T]
