"""Time limits for any role, and the maximum failure rate."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from mapo_jax.environment.allowance import waiting
from mapo_jax.environment.dialogue import DialogueState, RoleFailure
from mapo_jax.environment.live.calls import CallLog
from mapo_jax.environment.live.guard import WINDOW, Guarded, Watch, WorldFailing
from mapo_jax.environment.live.limits import PerMinute
from mapo_jax.environment.roles import Roles
from mapo_jax.environment.scenario import load_scenarios

CARD = load_scenarios()[0]


class Slow:
    """All three roles; each call takes `seconds`, or fails."""

    def __init__(self, seconds=0.0, failure=None):
        self.seconds, self.failure = seconds, failure

    async def score(self, state, reply):
        await asyncio.sleep(self.seconds)
        if self.failure:
            raise RoleFailure(self.failure, "no luck")
        return "scored"

    open = act = reply = score


def guard(role, share=1.0, dialogue=10.0, step=10.0, **options):
    log = CallLog()
    return Guarded(
        Roles(role, role, role), Watch(share), log, dialogue_seconds=dialogue, step_seconds=step, **options
    ), log


def state(seed=1):
    return DialogueState(CARD, seed, (), "Hm.")


def test_what_goes_well_passes():
    guarded, log = guard(Slow())
    assert asyncio.run(guarded.score(state(), "Yes.")) == "scored" and not log.lost


@pytest.mark.parametrize("limit", ["dialogue", "step"])
def test_a_hanging_role_is_cut_off(limit):
    guarded, log = guard(Slow(30), **{limit: 0.1})
    started = time.monotonic()
    with pytest.raises(RoleFailure, match=f"timeout: the time of the {limit}"):
        asyncio.run(guarded.score(state(), "Yes."))
    assert time.monotonic() - started < 10 and log.lost == {"timeout": 1}
    assert log["judge"].failures == {"timeout": 1}


def test_a_dialogues_time_adds_up_and_is_its_own():
    guarded, _ = guard(Slow(0.6), dialogue=1.7)

    async def run():
        await guarded.score(state(), "a")
        await guarded.score(state(), "b")
        with pytest.raises(RoleFailure, match="dialogue"):
            await guarded.score(state(), "c")
        assert await guarded.score(state(seed=2), "a") == "scored"
        guarded.begin()
        assert await guarded.score(state(), "a") == "scored"

    asyncio.run(run())


def test_failures_are_counted_by_kind():
    guarded, log = guard(Slow(failure="malformed"))
    with pytest.raises(RoleFailure, match="no luck"):
        asyncio.run(guarded.score(state(), "Yes."))
    assert log.lost == {"malformed": 1}


def test_the_watch_trips_above_the_share_of_a_window():
    watch, problem = Watch(0.2), RoleFailure("timeout", "slow")
    for _ in range(20):
        watch.note("judge", problem)
    for _ in range(79):
        watch.note("user", None)
    with pytest.raises(WorldFailing, match=r"21 of the last 100 calls .*judge timeout 21.*slow"):
        watch.note("judge", problem)
    watch.clear()
    # Old failures leave the window: with 100 good calls in between, 20 more are accepted.
    for _ in range(20):
        watch.note("judge", problem)
    for _ in range(WINDOW):
        watch.note("user", None)
    for _ in range(20):
        watch.note("judge", problem)


def test_the_watch_looks_back_beyond_a_step():
    """Steps of thirty calls, nine of them failures: a window spans four steps."""
    good, bad = Slow(), Slow(failure="timeout")
    log, watch = CallLog(), Watch(0.2)
    by_role = {
        role: Guarded(Roles(role, role, role), watch, log, dialogue_seconds=10, step_seconds=10)
        for role in (good, bad)
    }

    async def run():
        for step in range(4):
            for guarded in by_role.values():
                guarded.begin()
            for index in range(30):
                try:
                    await by_role[bad if index < 9 else good].score(state(index), "Yes.")
                except RoleFailure:
                    continue
                except WorldFailing as failing:
                    return step, index, str(failing)

    # 9, 18 and then, with the third one of the third step, 21.
    step, index, text = asyncio.run(run())
    assert (step, index) == (2, 2) and "21 of the last 63 calls" in text


def test_what_a_limit_cut_off_does_not_trip_the_watch():
    guarded, log = guard(Slow(30), share=0.0, dialogue=0.01)

    async def run():
        calls = [guarded.score(state(seed), "a") for seed in range(30)]
        return await asyncio.gather(*calls, return_exceptions=True)

    assert all(isinstance(failure, RoleFailure) for failure in asyncio.run(run()))
    assert log.lost == {"timeout": 30}


def test_a_defect_of_a_role_is_not_hidden():
    class Broken(Slow):
        async def score(self, state, reply):
            return SimpleNamespace().levels

    guarded, _ = guard(Broken())
    with pytest.raises(AttributeError):
        asyncio.run(guarded.score(state(), "Yes."))


class Limited(Slow):
    """A role with a limit of one request per minute; each call then takes `seconds` of a clock."""

    def __init__(self, seconds, clock, sleep, samples=1):
        super().__init__(seconds)
        self.clock, self.samples = clock, samples
        self.gate = PerMinute(1, clock=clock, sleep=sleep)

    async def score(self, state, reply):
        async def sample():
            await self.gate.take()
            self.clock.now += self.seconds
            await asyncio.sleep(0)  # a call without time left ends here

        await asyncio.gather(*[sample() for _ in range(self.samples)])
        return "scored"

    open = act = reply = score


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        await asyncio.sleep(0)
        self.now += seconds


@pytest.mark.parametrize("samples", [1, 3])
def test_waits_for_a_limit_per_minute_are_not_the_dialogues_time(samples):
    """Eight turns of 2 s, each after a minute's wait or three: only the former fit into 20 s, or do not."""
    clock = Clock()
    guarded, log = guard(Limited(2.0, clock, clock.sleep, samples), dialogue=20.0, step=1e6, clock=clock)

    async def run():
        for _ in range(8):
            assert await guarded.score(state(), "Yes.") == "scored"

    asyncio.run(run())
    assert clock.now > 7 * 60 and not log.lost

    clock = Clock()
    guarded, log = guard(Limited(21.0, clock, clock.sleep), dialogue=20.0, step=1e6, clock=clock)

    async def work_too_long():
        with pytest.raises(RoleFailure, match="the time of the dialogue"):
            for _ in range(2):
                await guarded.score(state(), "Yes.")

    asyncio.run(work_too_long())


@pytest.mark.parametrize("which", ["dialogue", "step"])
def test_after_a_wait_a_hanging_role_is_cut_off_and_the_step_ends_a_wait(which):
    class Waits(Slow):
        async def score(self, state, reply):
            with waiting():
                await asyncio.sleep(0.3 if which == "dialogue" else 30)
            began.append(True)
            await asyncio.sleep(30)

    began = []
    guarded, log = guard(Waits(), dialogue=0.1, step=10.0 if which == "dialogue" else 0.3)
    with pytest.raises(RoleFailure, match=f"timeout: the time of the {which}"):
        asyncio.run(guarded.score(state(), "Yes."))
    assert began == [True] * (which == "dialogue") and log.lost == {"timeout": 1}


def test_a_sample_that_outlives_its_call_disturbs_nothing():
    class Leaves(Slow):
        async def score(self, state, reply):
            async def sample():
                with waiting():
                    await go_on.wait()
                return "late"

            left.append(asyncio.ensure_future(sample()))
            await asyncio.sleep(0)
            return "scored"

    left, go_on = [], asyncio.Event()

    async def run():
        guarded, _ = guard(Leaves())
        assert await guarded.score(state(), "Yes.") == "scored"
        go_on.set()
        return await left[0]

    assert asyncio.run(run()) == "late"
