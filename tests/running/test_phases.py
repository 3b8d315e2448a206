"""Time counts for the innermost phase, and adds up."""

import pytest

from mapo_jax.running.phases import BETWEEN, Phases


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def test_every_second_belongs_to_the_innermost_phase():
    clock = Clock()
    phases = Phases(clock)
    clock.seconds += 1
    with phases("rollout"):
        clock.seconds += 10
        with phases("checkpoint"):
            assert phases.current.phase == "checkpoint" and phases.current.started == 111
            clock.seconds += 3
        clock.seconds += 20
    assert phases.current.phase == BETWEEN
    phases.add("lost", 60.0)
    assert phases.take() == {"timing_s/rollout": 30, "timing_s/checkpoint": 3, "timing_s/lost": 60}
    assert phases.take() == {}
    assert phases.stretches("rollout") == [10, 20] and phases.stretches(BETWEEN) == [1]


def test_a_phase_ends_with_an_exception_too():
    phases = Phases(Clock())
    with pytest.raises(KeyError), phases("update"):
        raise KeyError
    assert phases.current.phase == BETWEEN
