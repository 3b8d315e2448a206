"""Expected numbers are computed by hand from the tables of points, or taken from published results."""

import json
import math

import pytest

from mapo_jax.algorithm.rewards import distance
from mapo_jax.environment import state
from mapo_jax.environment.state import Ending, Limits

GAIN = (3.0, 3.0, 3.0)
LOSS = (-2.0, -2.0, -2.0)
START = (-20.0, -20.0, -20.0)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((0, 0, 0, 0, 0, 0), (0, 0, 0)),
        ((1, 0, 1, 0, 1, 0), (1, 1, 1)),
        ((2, 0, 2, 0, 2, 0), (3, 3, 3)),
        ((0, -1, 0, -1, 0, -1), (-2, -2, -2)),
        ((0, -2, 0, -2, 0, -2), (-4, -5, -5)),  # the worst harm costs C one point less
        ((2, -1, 1, -2, 0, 0), (1, -4, 0)),
    ],
)
def test_points_of_levels(levels, expected):
    assert state.points(levels) == expected


@pytest.mark.parametrize("levels", [(3, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0), (-1, 0, 0, 0, 0, 0), (0,) * 5])
def test_levels_outside_their_scale_are_refused(levels):
    with pytest.raises(ValueError, match=r"must be|has 6 levels"):
        state.points(levels)


def test_the_distance_counts_only_what_is_still_lacking():
    assert distance((-4, -5, -1)) == 5.0  # 3, 4 and 0 beyond the margin of 1
    assert distance((-1, 0, 7)) == 0.0  # at the margin, at the origin, past it
    assert distance((5, -13, 2)) == 12.0  # overshoot on two axes does not compensate


def test_energy_is_the_way_made_towards_the_origin():
    start = (-3.0, 0.0, -4.0)  # v* = (0.6, 0, 0.8)
    increments = [(1.0, 9.0, 0.0), None, (0.0, 0.0, -2.0)]
    assert state.ideal_direction(start) == pytest.approx((0.6, 0, 0.8))
    assert state.energy_increments(start, increments) == pytest.approx([0.6, 0.0, -1.6])
    assert state.energy(start, state.trajectory(start, increments)[-1]) == pytest.approx(-1.0)
    assert state.trajectory(start, increments) == [start, (-2, 9, -4), (-2, 9, -4), (-2, 9, -6)]


def test_a_turn_across_the_way_has_exactly_no_energy():
    # v . P_0 = 0 on whole numbers; in floating point v . (P_0/|P_0|) may have a rounding error, which would
    # count as dE > 0 or dE < 0.
    start, increments = (-18.0, -18.0, -6.0), [(-1.0, 3.0, -6.0), (-4.0, 3.0, 3.0), (1.0, 1.0, -6.0)]
    assert state.energy_increments(start, increments) == [0.0, 0.0, 0.0]


def test_energy_and_position_say_the_same():
    """E - |P_0| = P_t . v*: by this identity the energy condition alone decides success."""
    start, increments = (-17.0, -22.0, -9.0), [(1.0, -4.0, 3.0), (3.0, 1.0, -2.0), (1.0, 1.0, 1.0)]
    end = state.trajectory(start, increments)[-1]
    along = sum(p * v for p, v in zip(end, state.ideal_direction(start), strict=True))
    assert state.energy(start, end) - state.norm(start) == pytest.approx(along)


def test_no_direction_from_the_origin():
    with pytest.raises(ValueError, match="origin"):
        state.ideal_direction((0.0, 0.0, 0.0))


def test_success_waits_for_the_minimum_turn():
    increments = [GAIN] * 7  # 7 x 3 points on axes that lack 20
    assert state.ending(START, increments, Limits(8, 15)) is None
    assert state.ending(START, increments, Limits(7, 15)) == Ending("success", "near")
    assert state.ending(START, increments[:6], Limits(1, 15)) is None


def test_exact_arrival_is_success_whatever_rounding_does():
    start, increments = (-1.0, -1.0, -5.0), [(1.0, 0.0, 3.0), (0.0, 1.0, 2.0)]  # ends at the origin exactly
    end = state.trajectory(start, increments)[-1]
    assert state.energy(start, end) < state.norm(start)  # by 9e-16, in floats
    assert state.ending(start, increments, Limits(1, 45)) == Ending("success", "near")


def test_past_the_origin_in_direction_is_success_of_the_other_kind():
    increments = [(3.0, 3.0, 0.0)] * 10  # ends at (10, 10, -20): P_t . v* = 0, far from the origin
    assert state.ending(START, increments[:9], Limits(5, 45)) is None
    assert state.ending(START, increments, Limits(5, 45)) == Ending("success", "past")


def test_collapse_is_five_turns_running_that_lose():
    limits = Limits(5, 45)
    assert state.ending(START, [LOSS] * 4, Limits(4, 45)) is None
    assert state.ending(START, [LOSS] * 5, limits) == Ending("failure", "collapse")
    assert state.ending(START, [LOSS] * 4 + [(0.0, 0.0, 0.0)], limits) is None  # no change is not a loss
    assert state.ending(START, [LOSS] * 5, Limits(6, 45)) is None


def test_unscored_turns_count_as_turns_and_are_passed_over_by_the_windows():
    limits = Limits(6, 45)
    assert state.ending(START, [LOSS, LOSS, None, LOSS, LOSS], limits) is None
    assert state.ending(START, [LOSS, LOSS, None, LOSS, LOSS, LOSS], limits) == Ending("failure", "collapse")
    assert state.ending(START, [None] * 45, Limits(12, 45)) == Ending("timeout", "max_turns")


def test_regression_needs_stagnation_and_loss_together():
    # Sideways steps hardly change |P|; six of eight lose a little: 6/8 > 0.7, their sum is below -1.
    loses, gains = (-0.3, 0.0, 0.0), (0.1, 0.0, 0.0)
    pattern = [loses, loses, loses, gains, loses, loses, loses, gains]
    assert state.ending(START, pattern, Limits(8, 45)) is None  # the sum is -0.92: not yet below -1
    deeper = [tuple(1.2 * x for x in v) for v in pattern]  # -1.11
    assert state.ending(START, deeper, Limits(8, 45)) == Ending("failure", "regression")
    jumpy = [*deeper[:-1], (12.0, -12.0, 0.0)]  # also six losing turns, but the last one changes |P| by 3
    assert state.ending(START, jumpy, Limits(8, 45)) is None
    assert state.ending(START, deeper[1:], Limits(7, 45)) is None  # fewer than eight turns


def test_success_goes_before_the_time_out():
    assert state.ending(START, [GAIN] * 7, Limits(7, 7)) == Ending("success", "near")
    assert state.ending(START, [GAIN] * 6, Limits(5, 6)) == Ending("timeout", "max_turns")


def test_published_end_turns(shared_data):
    """The rules end 349 of the 360 published dialogues at their published turn and in their published way;
    the other 11 are those that an unpublished oscillation rule ended, and no rule of ours ends them early.
    """
    limits = Limits(min_turns=12, max_turns=45, tolerance=0.1)
    reproduced = 0
    for line in (shared_data / "empa" / "published_trajectories.jsonl").read_text().splitlines():
        row = json.loads(line)
        increments = [state.points(levels) for levels in row["levels"]]
        endings = [state.ending(row["start"], increments[:t], limits) for t in range(1, len(increments) + 1)]
        assert not any(endings[:-1])
        if "Oscillation" in row["termination"]:
            assert endings[-1] is None
            continue
        outcome, rule = endings[-1]
        told = {"near": "Geometric", "past": "Positional", "timeout": "timeout", "failure": "Failure"}
        assert told[rule if outcome == "success" else outcome] in row["termination"]
        reproduced += 1
    assert reproduced == 349


def test_norm_is_euclidean():
    assert state.norm((2, 3, 6)) == 7.0
    assert math.isclose(state.norm((1, 1, 1)), math.sqrt(3))
