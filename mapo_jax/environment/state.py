"""The calculator of a dialogue: from a judge's levels to the moved state and, some day, its end.

The user's latent state is a point `P = (C, A, P)`: the cognitive, affective and proactive support that is
still lacking, as negative numbers; the origin is equilibrium. Everything here is a pure function of plain
numbers, so that the live loop and a later re-scoring of saved dialogues run the same lines.

Source: EMPA (arXiv 2603.00552), whose state and rules MAPO (arXiv 2603.06194) trains in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Vector = tuple[float, float, float]
"""A position or a movement on the axes C, A, P."""

Levels = Sequence[int]
"""A judge's six levels: C progress, C harm, A progress, A harm, P progress, P harm."""

AXES = ("C", "A", "P")
PROGRESS_POINTS = {0: 0, 1: 1, 2: 3}
HARM_POINTS = {
    "C": {0: 0, -1: -2, -2: -4},
    "A": {0: 0, -1: -2, -2: -5},
    "P": {0: 0, -1: -2, -2: -5},
}

COLLAPSE_WINDOW = 5  # turns running that lose energy
STAGNATION_WINDOW = 5  # turns whose |P| hardly changes ...
STAGNATION_DEVIATION = 0.5
REGRESSION_WINDOW = 8  # ... while most of these lose energy
REGRESSION_SHARE = 0.7
REGRESSION_ENERGY = -1.0


@dataclass(frozen=True)
class Limits:
    """When a dialogue may and must end."""

    min_turns: int  # success and failure are decided from this turn on
    max_turns: int  # a dialogue that has this many turns ends
    tolerance: float = 0.05  # `a` of the success rule: how near the origin counts as there


class Ending(NamedTuple):
    """How a dialogue ended."""

    outcome: str  # success, failure or timeout
    rule: str  # success: near or past; failure: collapse or regression; timeout: max_turns


def points(levels: Levels) -> Vector:
    """The movement `v_t` of one turn: per axis, progress points plus harm points.

    Progress 0, 1, 2 is worth 0, +1, +3; harm 0, -1, -2 costs 0, 2, 4 on C and 0, 2, 5 on A and P.

    Args:
      levels: six whole numbers in the order of `Levels`.

    Raises:
      ValueError: another count of levels, or one outside its scale.
    """
    if len(levels) != 2 * len(AXES):
        raise ValueError(f"a judgement has {2 * len(AXES)} levels, not {len(levels)}")
    moved = []
    for axis, progress, harm in zip(AXES, levels[::2], levels[1::2], strict=True):
        if progress not in PROGRESS_POINTS:
            raise ValueError(f"{axis} progress is {progress!r}; it must be 0, 1 or 2")
        if harm not in HARM_POINTS[axis]:
            raise ValueError(f"{axis} harm is {harm!r}; it must be 0, -1 or -2")
        moved.append(float(PROGRESS_POINTS[progress] + HARM_POINTS[axis][harm]))
    return tuple(moved)


def move(position: Vector, increment: Vector | None) -> Vector:
    """`P_t = P_{t-1} + v_t`; a turn without a score (None) leaves the state where it was."""
    if increment is None:
        return tuple(position)
    return tuple(p + v for p, v in zip(position, increment, strict=True))


def trajectory(start: Vector, increments: Sequence[Vector | None]) -> list[Vector]:
    """The positions `P_0 .. P_T`, the start included: one more than there are turns."""
    positions = [tuple(float(p) for p in start)]
    for increment in increments:
        positions.append(move(positions[-1], increment))
    return positions


def norm(position: Vector) -> float:
    """`|P|`, the Euclidean length."""
    return math.sqrt(_dot(position, position))


def ideal_direction(start: Vector) -> Vector:
    """`v* = -P_0/|P_0|`, from the start straight to the origin.

    Raises:
      ValueError: the start is the origin, from which there is nowhere to go.
    """
    length = norm(start)
    if length == 0:
        raise ValueError("a dialogue cannot start at the origin: the user already has all support")
    return tuple(-p / length for p in start)


def energy_increments(start: Vector, increments: Sequence[Vector | None]) -> list[float]:
    """`dE_t = v_t . v*` for every turn; 0 where a turn has no score. Their sum is the energy `E`."""
    ideal_direction(start)  # raises at the origin
    length = norm(start)
    # Divided last: on the whole numbers that points are, a turn across the direct way then has exactly 0,
    # and rounding cannot make it one of the turns with dE > 0 or dE < 0.
    return [0.0 if v is None else -_dot(v, start) / length for v in increments]


def energy(start: Vector, increments: Sequence[Vector | None]) -> float:
    """`E = sum_t v_t . v*`: the way made towards the origin, in points."""
    return energy_from_position(start, trajectory(start, increments)[-1])


def energy_from_position(start: Vector, position: Vector) -> float:
    """`E = (P_t - P_0) . v*`, the same sum from where the way has led."""
    ideal = ideal_direction(start)
    return _dot([p - s for p, s in zip(position, start, strict=True)], ideal)


def ending(start: Vector, increments: Sequence[Vector | None], limits: Limits) -> Ending | None:
    """Says whether the dialogue ends with its last turn, and how; None if it goes on.

    Success, from the minimum turn on: `E >= |P_0|` (its condition on the position, `|P_t| <= a|P_0|` or
    `P_t . v* >= -a|P_0|`, then always holds and only tells `near` from `past`). Failure, from the minimum
    turn on: `collapse`, five turns running with dE < 0; or `regression`, the sample deviation of the last
    five |P| below 0.5 while more than 70 % of the last eight dE are negative and sum to less than -1.
    Time-out at the maximum turn. Success goes before failure, failure before time-out.

    Turns without a score count as turns and are passed over by the windows. The published rules have one
    more failure, of oscillation, whose text is not published: it is left out.

    Args:
      start: `P_0`.
      increments: `v_1 .. v_t` up to the turn that has just been played; None for a turn without a score.
      limits: shortest and longest dialogue, and the tolerance `a`.

    Raises:
      ValueError: the start is the origin.
    """
    turns = len(increments)
    if turns >= limits.min_turns:
        position = trajectory(start, increments)[-1]
        # E >= |P_0| on the whole numbers it comes from, where rounding cannot miss an exact arrival:
        # E = |P_0| + P_t . v*, so the condition is P_t . v* >= 0, that is P_t . P_0 <= 0.
        if _dot(position, start) <= 0:
            near = norm(position) <= limits.tolerance * norm(start)
            return Ending("success", "near" if near else "past")
        if rule := _failure(start, increments):
            return Ending("failure", rule)
    if turns >= limits.max_turns:
        return Ending("timeout", "max_turns")
    return None


def _failure(start: Vector, increments: Sequence[Vector | None]) -> str | None:
    scored = [v for v in increments if v is not None]
    gains = energy_increments(start, scored)
    collapse = gains[-COLLAPSE_WINDOW:]
    if len(collapse) == COLLAPSE_WINDOW and max(collapse) < 0:
        return "collapse"
    recent = gains[-REGRESSION_WINDOW:]
    if len(recent) == REGRESSION_WINDOW:
        lengths = [norm(p) for p in trajectory(start, scored)[-STAGNATION_WINDOW:]]
        stagnant = statistics.stdev(lengths) < STAGNATION_DEVIATION
        losing = sum(gain < 0 for gain in recent) / REGRESSION_WINDOW > REGRESSION_SHARE
        if stagnant and losing and sum(recent) < REGRESSION_ENERGY:
            return "regression"
    return None


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
