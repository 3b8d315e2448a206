"""Raw results as JSON files, and the statistics that the experiments share."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from mapo_jax.files import write_whole

RESAMPLES = 10_000


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole, numbers as short as they were rounded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, separators=(",", ":")) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def rounded(values: Any, digits: int = 3) -> Any:
    """An array as nested lists of rounded numbers."""
    return np.round(np.asarray(values, float), digits).tolist()


def circumstances(seconds: float) -> dict[str, Any]:
    """When, where and how long something was computed."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "minutes_of_last_call": round(seconds / 60, 1),
        "command": " ".join(["python", *sys.argv]),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
    }


def interval(values: Sequence[float], share: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the bootstrap interval of the mean (percentiles over 10,000 resamples of the values)."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    means = values[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(values.mean()), float(low), float(high)


def paired(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Mean difference of paired values, its bootstrap interval, and the p value of a sign-flip test."""
    differences = np.asarray(one, float) - np.asarray(other, float)
    mean, low, high = interval(differences)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (RESAMPLES, len(differences)))
    flipped = np.abs((signs * differences).mean(axis=1))
    p = (1 + np.sum(flipped >= abs(mean) - 1e-12)) / (1 + RESAMPLES)
    return {"mean": mean, "low": low, "high": high, "p": float(p)}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction of several p values."""
    corrected, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        corrected[name] = largest
    return corrected
