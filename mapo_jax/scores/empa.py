"""EPM-Q: the nine indices of the EMPA benchmark, from a dialogue's start state and the judge's levels.

No model is needed, so saved dialogues can be scored again. The trajectory of the indices includes the start
row, in which nothing moves. An index is capped at 100 only if its formula says so.

Source: EMPA (arXiv 2603.00552).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mapo_jax.algorithm.rewards import distance, incremental
from mapo_jax.environment import state
from mapo_jax.errors import UserError
from mapo_jax.json_files import read_rows
from mapo_jax.scores.bootstrap import interval_list, intervals

OUTCOME = ("RDI", "E_total", "S_net")
EFFICIENCY = ("rho", "S_proj", "tau")
STABILITY = ("R_pos", "Align", "Pen")
PARTS = {"outcome": OUTCOME, "efficiency": EFFICIENCY, "stability": STABILITY}
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
      levels: per turn the judge's six levels; None for an unscored turn, which counts as a turn without
        movement.

    Returns:
      The names of `SCORES` and their values.

    Raises:
      ValueError: no turns, a level outside its scale, a start that is not three finite numbers, or a start at
        rest (D = 0).
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
    start_distance, end_distance = distance([positions[0], positions[-1]]).tolist()
    if start_distance == 0:
        raise ValueError(f"a dialogue that starts at {tuple(start)} starts at rest and cannot be scored")
    energy = sum(gains)
    level_sum = sum(sum(turn) for turn in levels if turn is not None)
    harm_sum = sum(abs(harm) for turn in levels if turn is not None for harm in turn[1::2])
    moves = zip(gains[1:], increments, strict=True)
    cosines = [gain / state.norm(v) if v is not None and any(v) else 0.0 for gain, v in moves]
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
    for part, names in PARTS.items():
        scores[part] = sum(scores[name] for name in names) / len(names)
    scores["epm_q"] = 0.4 * scores["outcome"] + 0.2 * scores["efficiency"] + 0.4 * scores["stability"]
    return scores


@dataclass(frozen=True)
class Case:
    """One dialogue and its scores."""

    model: str
    name: str  # of the card; several dialogues may have the same card
    start: state.Vector
    turns: int
    passed: bool  # ended with success
    rewards: tuple[float, ...]  # incremental distance of each scored turn, in points
    scores: Mapping[str, float]  # the names of SCORES
    domain: str | None = None


def make_case(row: Mapping[str, Any], place: str) -> Case | None:
    """Scores one saved dialogue.

    Args:
      row: `model`, `start` and `levels`; `case` and `domain` if known; `outcome` if the dialogue followed
        other rules than the benchmark's, which otherwise decide whether it passed. Other keys are ignored.
      place: of the row, for error messages.

    Returns:
      The scores; None for a dialogue that ended in an `error` or has no scored turn.

    Raises:
      UserError: a key is missing, or the row cannot be scored; names the place, the model and the case.
    """
    for key in ("model", "start", "levels"):
        if key not in row:
            raise UserError(f"{place} has no `{key}`; it needs model, start and levels")
    name = str(row.get("case", place))
    start, levels, outcome = row["start"], row["levels"], row.get("outcome")
    try:
        if outcome == "error" or (levels and all(turn is None for turn in levels)):
            return None
        scores = score_case(start, levels)
        increments = [None if turn is None else state.points(turn) for turn in levels]
        if outcome is None:
            ending = state.ending(tuple(start), increments, PUBLISHED_LIMITS)
            outcome = ending.outcome if ending else None
    except (ValueError, TypeError, OverflowError) as error:
        which = f"model {row['model']}" + (f", case {name}" if "case" in row else "")
        raise UserError(f"{place} ({which}) cannot be scored: {error}") from error
    rewards = incremental(distance(state.trajectory(start, increments))).tolist()
    return Case(
        model=str(row["model"]),
        name=name,
        start=tuple(start),
        turns=len(levels),
        passed=outcome == "success",
        rewards=tuple(r for v, r in zip(increments, rewards, strict=True) if v is not None),
        scores=scores,
        domain=None if row.get("domain") is None else str(row["domain"]),
    )


def read_cases(path: str | Path) -> list[Case | None]:
    """Scores the saved dialogues of a JSON-lines file (see `make_case`).

    Raises:
      UserError: the file cannot be read, has no rows, or a line cannot be scored (its number is named).
    """
    return [make_case(row, place) for place, row in read_rows(path, "trajectories")]


DIFFICULTIES = (("up to 27", 27.0), ("27 to 32", 32.0), ("32 to 36", 36.0), ("above 36", math.inf))
"""Bands of |P_0|, the deficit at the start; the benchmark balances its cases over them."""

GROUPINGS: dict[str, Callable[[Case], str | None]] = {
    "difficulty": lambda case: next(name for name, most in DIFFICULTIES if state.norm(case.start) <= most),
    "strongest_axis": lambda case: min(state.AXES, key=dict(zip(state.AXES, case.start, strict=True)).get),
    "domain": lambda case: case.domain,
}

FIGURES = (*SCORES, "pass_rate", "turns", "idr_mean")


def summarize_cases(cases: Sequence[Case], *, seed: int = 0) -> dict[str, Any]:
    """The figures of one model's dialogues.

    Args:
      cases: at least one. The bootstrap draws dialogues with the same card together.
      seed: of the bootstrap.

    Returns:
      `cases` (cards) and `dialogues`; the mean over dialogues of each name in SCORES; `passed` and
      `pass_rate`; `turns`, the mean; `idr_mean` and `idr_std`, mean and population deviation of the
      incremental distance over scored turns, in points; `intervals`, `{figure: [low, high]}` (95 %) for each
      of FIGURES, None with a single card; `groups`, `{grouping: {group: the same figures without groups}}`
      for every grouping that all cases have.
    """
    figures = _figures(cases, seed)
    figures["groups"] = {}
    for grouping, group_of in GROUPINGS.items():
        groups = {group_of(case) for case in cases}
        if not groups & {None, ""}:
            ordered = sorted(groups, key=_GROUP_ORDER.get(grouping, sorted(groups)).index)
            members = {group: [case for case in cases if group_of(case) == group] for group in ordered}
            figures["groups"][grouping] = {group: _figures(members[group], seed) for group in ordered}
    return figures


_GROUP_ORDER = {"difficulty": [name for name, _ in DIFFICULTIES], "strongest_axis": state.AXES}


def _figures(cases: Sequence[Case], seed: int) -> dict[str, Any]:
    names = sorted({case.name for case in cases})  # makes the draws independent of the order of rows
    sums, counts = np.zeros((len(names), len(FIGURES))), np.zeros((len(names), len(FIGURES)))
    for case in cases:
        row = names.index(case.name)
        values = [*(case.scores[name] for name in SCORES), float(case.passed), case.turns, sum(case.rewards)]
        sums[row] += values
        counts[row] += [*(1,) * (len(FIGURES) - 1), len(case.rewards)]
    means = sums.sum(0) / counts.sum(0)
    ends = interval_list(intervals(sums, counts, seed=seed))
    return {
        "cases": len(names),
        "dialogues": len(cases),
        **dict(zip(FIGURES, means.tolist(), strict=True)),
        "passed": sum(case.passed for case in cases),
        "idr_std": float(np.std([reward for case in cases for reward in case.rewards])),
        "intervals": dict(zip(FIGURES, ends, strict=True)),
    }


def summarize_models(cases: Iterable[Case | None], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`summarize_cases` of every model, in the order of their first dialogues.

    Raises:
      UserError: no dialogue can be scored.
    """
    by_model: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case is not None:
            by_model[case.model].append(case)
    if not by_model:
        raise UserError("no dialogue can be scored: each ended in an error or has no scored turn")
    return {model: summarize_cases(chosen, seed=seed) for model, chosen in by_model.items()}


def _tortuosity(positions: Sequence[state.Vector]) -> float:
    """Path length over displacement; a closed path counts as 0, no path at all as 1."""
    path = sum(math.dist(one, other) for one, other in itertools.pairwise(positions))
    displacement = math.dist(positions[0], positions[-1])
    if displacement > 1e-6:
        return path / displacement
    return 1.0 if path <= 1e-6 else 0.0
