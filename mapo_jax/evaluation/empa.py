"""EPM-Q: the nine indices of the EMPA benchmark, from a dialogue's start state and its judge's levels.

A dialogue needs nothing else to be scored, so that saved ones can be scored again without any model. The
"trajectory" of the indices includes the start row, in which nothing moves. An index is not capped at 100
unless its formula says so.

Source: EMPA (arXiv 2603.00552).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mapo_jax.environment import state
from mapo_jax.errors import UserError

OUTCOME = ("RDI", "E_total", "S_net")
EFFICIENCY = ("rho", "S_proj", "tau")
STABILITY = ("R_pos", "Align", "Pen")
INDICES = (*OUTCOME, *EFFICIENCY, *STABILITY)
SCORES = (*INDICES, "outcome", "efficiency", "stability", "epm_q")

PUBLISHED_LIMITS = state.Limits(min_turns=12, max_turns=45, tolerance=0.1)
"""The end-turn rules of the published result sets."""


def score_case(start: state.Vector, levels: Sequence[state.Levels | None]) -> dict[str, float]:
    """The nine indices of one dialogue, their three groups, and EPM-Q.

    With `r0 = D(P_0)`, `T` turns, `E` the energy and means over the trajectory of T + 1 rows:

      RDI     = clamp((100 (D_0 - D_T)/D_0 + 100)/2, 0, 100)
      E_total = 100 max(0, E)/(1.2 r0)
      S_net   = 100 max(0, sum of all levels)/(1.5 r0)
      rho     = 100 max(0, E/T)/2.5
      S_proj  = 100 max(0, mean dE)/2.5
      tau     = 100 max(0, 3 - max(1, tau))/2, tau = path length over displacement
      R_pos   = 100 share of rows with dE > 0
      Align   = 100 (mean cosine of v_t and v* + 1)/2, the cosine of a zero v_t being 0
      Pen     = 100 max(0, 3 - mean summed absolute harm)/3

    Outcome, Efficiency and Stability are the means of three each; EPM-Q = 0.4, 0.2 and 0.4 of them.

    Args:
      start: `P_0`, the position before the first turn.
      levels: per turn the judge's six levels; None for a turn whose judge failed, in which nothing moves
        (it counts as a turn).

    Returns:
      The names of `SCORES` and their values.

    Raises:
      ValueError: no turns, a level outside its scale, a start that is no point, or one at rest (D = 0),
        from which nothing can be won.
    """
    if not levels:
        raise ValueError("a dialogue without turns cannot be scored")
    if len(start) != len(state.AXES) or not all(math.isfinite(axis) for axis in start):
        raise ValueError(f"the start is {start!r}; it must be three finite numbers")
    increments = [None if turn is None else state.points(turn) for turn in levels]
    turns = len(increments)
    positions = state.trajectory(start, increments)
    gains = [0.0, *state.energy_increments(start, increments)]
    rows = len(gains)
    start_distance, end_distance = state.distance(positions[0]), state.distance(positions[-1])
    if start_distance == 0:
        raise ValueError(f"a dialogue that starts at {tuple(start)} starts at rest and cannot be scored")
    energy = sum(gains)
    level_sum = sum(sum(turn) for turn in levels if turn is not None)
    harm_sum = sum(abs(harm) for turn in levels if turn is not None for harm in turn[1::2])
    cosines = [
        gain / state.norm(v) if v is not None and any(v) else 0.0
        for gain, v in zip(gains[1:], increments, strict=True)
    ]
    change = 100 * (start_distance - end_distance) / start_distance

    scores = {
        "RDI": min(100.0, max(0.0, (change + 100) / 2)),
        "E_total": 100 * max(0.0, energy) / (1.2 * start_distance),
        "S_net": 100 * max(0.0, level_sum) / (1.5 * start_distance),
        "rho": 100 * max(0.0, energy / turns) / 2.5,
        "S_proj": 100 * max(0.0, energy / rows) / 2.5,
        "tau": 100 * max(0.0, 3 - max(1.0, _tortuosity(positions))) / 2,
        "R_pos": 100 * sum(gain > 0 for gain in gains) / rows,
        "Align": 100 * (sum(cosines) / rows + 1) / 2,
        "Pen": 100 * max(0.0, 3 - harm_sum / rows) / 3,
    }
    scores["outcome"] = _mean(scores[name] for name in OUTCOME)
    scores["efficiency"] = _mean(scores[name] for name in EFFICIENCY)
    scores["stability"] = _mean(scores[name] for name in STABILITY)
    scores["epm_q"] = 0.4 * scores["outcome"] + 0.2 * scores["efficiency"] + 0.4 * scores["stability"]
    return scores


def score_cases(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Scores every model's dialogues: per index the mean over its cases.

    Args:
      rows: mappings with `model`, `start` and `levels`; other keys are left alone.

    Returns:
      `{model: {"cases": count, "RDI": mean, ..., "epm_q": mean}}`, models in the order of their first row.

    Raises:
      UserError: a row lacks a key or cannot be scored; names the row, its model and its case.
    """
    cases: dict[str, list[dict[str, float]]] = {}
    for number, row in enumerate(rows, start=1):
        place = f"row {number}"
        if not isinstance(row, Mapping):
            raise UserError(f"{place} is {row!r}; it must be a mapping with model, start and levels")
        for key in ("model", "start", "levels"):
            if key not in row:
                raise UserError(f"{place} has no `{key}`; it needs model, start and levels")
        place = f"{place} (model {row['model']}, case {row.get('case', 'unnamed')})"
        try:
            scores = score_case(row["start"], row["levels"])
        except (ValueError, TypeError) as error:
            raise UserError(f"{place} cannot be scored: {error}") from error
        cases.setdefault(str(row["model"]), []).append(scores)
    return {
        model: {"cases": len(scored)} | {name: _mean(case[name] for case in scored) for name in SCORES}
        for model, scored in cases.items()
    }


def read_trajectories(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows that `score_cases` takes from a JSON-lines file; blank lines are passed over.

    Raises:
      UserError: the file cannot be read, has no rows, or a line is not JSON (its number is named).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the trajectories {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
    if not rows:
        raise UserError(f"{path} has no rows; it needs one JSON object with model, start and levels per line")
    return rows


def _tortuosity(positions: Sequence[state.Vector]) -> float:
    """Path length over displacement; a closed path counts as 0, no path at all as 1."""
    path = sum(math.dist(one, other) for one, other in itertools.pairwise(positions))
    displacement = math.dist(positions[0], positions[-1])
    if displacement > 1e-6:
        return path / displacement
    return 1.0 if path <= 1e-6 else 0.0


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
