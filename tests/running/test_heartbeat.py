"""The watchdog logs a late phase with the stacks of all threads, and can neither block nor fail a run."""

import logging
import threading
import time

import pytest

from mapo_jax.running import heartbeat
from mapo_jax.running.heartbeat import FACTOR, FIRST_SECONDS, LEAST_SECONDS, Heartbeat, stacks
from mapo_jax.running.phases import Phases


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def rollouts(phases, clock, *seconds):
    for each in seconds:
        with phases("rollout"):
            clock.seconds += each


def test_a_phase_is_late_at_a_multiple_of_its_median(clock):
    phases = Phases(clock)
    watch = Heartbeat(phases, clock)
    rollouts(phases, clock, 30, 100, 40)  # median 40
    with phases("rollout"):
        clock.seconds += FACTOR * 40 - 1
        assert watch.look() is None
        clock.seconds += 2
        said = watch.look()
        assert "phase `rollout` for 201 s" in said and "the median is 40.0 s" in said
        assert (
            "test_a_phase_is_late_at_a_multiple_of_its_median" not in said
        )  # the thread that looks is left out
        assert watch.look() is None  # said once,
        clock.seconds += 200
        assert watch.look() is None
        clock.seconds += 2
        assert "for 403 s" in watch.look()  # and again when the time has doubled
    with phases("rollout"):  # another stretch starts anew
        clock.seconds += 190
        assert watch.look() is None


def test_short_phases_and_first_ones_have_limits_of_their_own(clock):
    phases = Phases(clock)
    watch = Heartbeat(phases, clock)
    with phases("warm_up"):
        clock.seconds += FIRST_SECONDS - 1
        assert watch.look() is None
        clock.seconds += 2
        assert "for the first time" in watch.look()
    rollouts(phases, clock, 0.1, 0.1)
    with phases("rollout"):
        clock.seconds += LEAST_SECONDS - 1
        assert watch.look() is None
        clock.seconds += 2
        assert "phase `rollout`" in watch.look()


def test_a_thread_that_is_stuck_is_shown_in_the_log(clock, monkeypatch, caplog):
    monkeypatch.setattr(heartbeat, "_CHECK_SECONDS", 0.01)
    phases, release = Phases(clock), threading.Event()

    def waits_for_a_judge_that_never_answers():
        release.wait(30)

    stuck = threading.Thread(target=waits_for_a_judge_that_never_answers, name="judge", daemon=True)
    stuck.start()
    try:
        caplog.set_level(logging.WARNING, logger="mapo_jax.heartbeat")
        with Heartbeat(phases, clock), phases("rollout"):
            clock.seconds += FIRST_SECONDS + 1
            until = time.monotonic() + 10
            while not caplog.messages and time.monotonic() < until:
                time.sleep(0.01)
        (message,) = caplog.messages
        assert "`rollout`" in message and "--- thread judge ---" in message
        assert "waits_for_a_judge_that_never_answers" in message and "release.wait(30)" in message
        assert message.index("--- thread MainThread ---") < message.index("--- thread judge ---")
        assert "test_a_thread_that_is_stuck" in message
    finally:
        release.set()
        stuck.join(10)


def test_a_watch_that_fails_or_hangs_stops_nothing(clock, monkeypatch):
    monkeypatch.setattr(heartbeat, "_CHECK_SECONDS", 0.01)
    called, release = threading.Event(), threading.Event()

    def broken():
        called.set()
        raise RuntimeError("no stacks today")

    monkeypatch.setattr(heartbeat, "stacks", broken)
    phases = Phases(clock)
    with Heartbeat(phases, clock) as watch:
        clock.seconds += FIRST_SECONDS + 1
        assert called.wait(10)
        called.clear()
        clock.seconds *= 4
        assert called.wait(10)  # it goes on looking
    watch._thread.join(10)
    assert not watch._thread.is_alive()

    monkeypatch.setattr(heartbeat, "stacks", lambda: called.set() or release.wait(30) or "")
    called.clear()
    with Heartbeat(phases, clock) as watch:
        clock.seconds *= 4
        assert called.wait(10)
    assert watch._thread.is_alive() and watch._thread.daemon  # left behind, waited for by nobody
    release.set()
    watch._thread.join(10)


def test_stacks_leave_out_the_thread_that_asks():
    assert "test_stacks_leave_out" not in stacks()
