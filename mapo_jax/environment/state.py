"""The calculator of a dialogue: computes the user's state from the judge's levels, and the end of the
dialogue.

The user's latent state is a point `P = (C, A, P)`: the cognitive, affective and proactive support that is
still lacking, as negative numbers; the origin is equilibrium. All functions are pure functions of plain
numbers, so that live dialogues and later re-scoring of saved ones share the code.

Source: EMPA (arXiv 2603.00552), whose state and rules MAPO (arXiv 2603.06194) trains in.
"""

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

COLLAPSE_WINDOW = 5  # consecutive turns that lose energy
STAGNATION_WINDOW = 5  # turns over which |P| is stagnant: deviation below STAGNATION_DEVIATION
STAGNATION_DEVIATION = 0.5
REGRESSION_WINDOW = 8  # turns of which more than REGRESSION_SHARE lose energy, in sum below REGRESSION_ENERGY
REGRESSION_SHARE = 0.7
REGRESSION_ENERGY = -1.0


@dataclass(frozen=True)
class Limits:
    """When a dialogue may and must end."""

    min_turns: int  # success and failure are possible from this turn on
    max_turns: int  # a dialogue with this many turns ends
    tolerance: float = 0.05  # `a` of the success rule: distance that counts as arrival, as a share of |P_0|


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
    increment = []
    for axis, progress, harm in zip(AXES, levels[::2], levels[1::2], strict=True):
        if progress not in PROGRESS_POINTS:
            raise ValueError(f"{axis} progress is {progress!r}; it must be 0, 1 or 2")
        if harm not in HARM_POINTS[axis]:
            raise ValueError(f"{axis} harm is {harm!r}; it must be 0, -1 or -2")
        increment.append(float(PROGRESS_POINTS[progress] + HARM_POINTS[axis][harm]))
    return tuple(increment)


def move(position: Vector, increment: Vector | None) -> Vector:
    """`P_t = P_{t-1} + v_t`; an unscored turn (None) does not change the state."""
    if increment is None:
        return tuple(position)
    return tuple(p + v for p, v in zip(position, increment, strict=True))


def trajectory(start: Vector, increments: Sequence[Vector | None]) -> list[Vector]:
    """The positions `P_0 .. P_T`: one more than there are turns."""
    positions = [tuple(float(p) for p in start)]
    for increment in increments:
        positions.append(move(positions[-1], increment))
    return positions


def norm(position: Vector) -> float:
    """`|P|`, the Euclidean length."""
    return math.sqrt(_dot(position, position))


def ideal_direction(start: Vector) -> Vector:
    """`v* = -P_0/|P_0|`, the direction from the start to the origin.

    Raises:
      ValueError: the start is the origin.
    """
    length = norm(start)
    if length == 0:
        raise ValueError("a dialogue cannot start at the origin: the user already has all support")
    return tuple(-p / length for p in start)


def energy_increments(start: Vector, increments: Sequence[Vector | None]) -> list[float]:
    """`dE_t = v_t . v*` for every turn; 0 for unscored turns. Their sum is the energy `E`."""
    ideal_direction(start)  # raises at the origin
    length = norm(start)
    # Division comes last: points are whole numbers, so a turn perpendicular to v* gets exactly 0, and not a
    # rounding error that counts as dE > 0 or dE < 0.
    return [0.0 if v is None else -_dot(v, start) / length for v in increments]


def energy(start: Vector, position: Vector) -> float:
    """`E = (P_t - P_0) . v* = sum_t v_t . v*`: progress towards the origin, in points."""
    return _dot([p - s for p, s in zip(position, start, strict=True)], ideal_direction(start))


def ending(start: Vector, increments: Sequence[Vector | None], limits: Limits) -> Ending | None:
    """How the dialogue ends with its last turn; None if it continues.

    Success, from the minimum turn on: `E >= |P_0|` (its condition on the position, `|P_t| <= a|P_0|` or `P_t
    . v* >= -a|P_0|`, then always holds and only distinguishes `near` from `past`). Failure, from the minimum
    turn on: `collapse`, five consecutive turns with dE < 0; or `regression`, the sample deviation of the last
    five |P| below 0.5 while more than 70 % of the last eight dE are negative and sum to less than -1. Timeout
    at the maximum turn. Success takes precedence over failure, failure over timeout.

    Unscored turns count as turns; the windows skip them. The published rules have one more failure, of
    oscillation, without a definition: it is left out.

    Args:
      start: `P_0`.
      increments: `v_1 .. v_t` of all turns so far; None for an unscored turn.
      limits: shortest and longest dialogue, and the tolerance `a`.

    Raises:
      ValueError: the start is the origin.
    """
    turns = len(increments)
    if turns >= limits.min_turns:
        position = trajectory(start, increments)[-1]
        # E >= |P_0|, computed on whole numbers so that rounding cannot miss an exact arrival:
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
