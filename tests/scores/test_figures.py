"""The figures of a set of dialogues, against hand calculation."""

import math

import pytest

from mapo_jax.algorithm.rewards import distance
from mapo_jax.environment.dialogue import DialogueState, Judgement, Turn
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.state import move, points
from mapo_jax.scores.figures import summarize

NONE = ("",) * 6
SCENARIO = load_scenarios()[0]


def dialogue(levels, outcome="timeout"):
    """A dialogue with these judgements; None is a turn whose judge failed."""
    position, turns = SCENARIO.start_position, []
    for level in levels:
        judgement = None if level is None else Judgement(level, NONE, NONE)
        position = position if level is None else move(position, points(level))
        failure = "timeout" if level is None else None
        turns.append(Turn("u", "r", judgement, failure, position, None))
    return DialogueState(SCENARIO, 0, tuple(turns), "", outcome)


GOOD, BAD = (1, 0, 2, 0, 0, 0), (0, -1, 0, 0, 0, -2)


def test_means_over_dialogues_and_turns_by_hand():
    states = [dialogue([GOOD, BAD]), dialogue([GOOD, None, GOOD], "success")]
    figures = summarize(states, discount=0.5)

    start = SCENARIO.start_position
    after_good = (start[0] + 1, start[1] + 3, start[2])
    after_bad = (after_good[0] - 2, after_good[1], after_good[2] - 5)
    twice_good = (start[0] + 2, start[1] + 6, start[2])
    good = distance(start) - distance(after_good)
    bad = distance(after_good) - distance(after_bad)
    better = distance(after_good) - distance(twice_good)

    assert figures["reward/mean"] == pytest.approx((good + bad + good + better) / 4)
    imputed = (good + better) / 2  # the unscored turn counts as its dialogue's mean
    assert figures["return/mean"] == pytest.approx(
        ((good + 0.5 * bad) + (good + 0.5 * imputed + 0.25 * better)) / 2
    )
    assert (figures["turns/mean"], figures["turns/min"], figures["turns/max"]) == (2.5, 2, 3)
    assert figures["judge/failure_rate"] == pytest.approx(1 / 5)
    assert figures["judge/harm"] == pytest.approx(1 / 4)  # of the scored turns
    assert figures["outcome/success"] == figures["outcome/timeout"] == 0.5
    assert figures["dialogues/left_out"] == 0


def test_failed_dialogues_touch_no_figure():
    good = dialogue([GOOD, BAD])
    broken = [dialogue([BAD, BAD], outcome="error"), dialogue([None, None])]
    figures = summarize([good, *broken], discount=0.9)
    alone = summarize([good], discount=0.9)
    assert figures.pop("dialogues/left_out") == pytest.approx(2 / 3)
    assert alone.pop("dialogues/left_out") == 0
    assert figures == alone
    assert all(math.isfinite(value) for value in figures.values())


def test_nothing_to_count_gives_nothing_but_the_count():
    assert summarize([dialogue([None])], 0.9) == {"dialogues/left_out": 1.0}
    assert summarize([], 0.9) == {"dialogues/left_out": 0.0}
