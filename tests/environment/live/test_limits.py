"""Limits per minute, on a simulated clock."""

import asyncio

from mapo_jax.environment.live.limits import PerMinute


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds


def pass_all(limit, amounts, pause=0.0):
    """When each amount passed."""
    clock = Clock()
    gate = PerMinute(limit, clock=clock, sleep=clock.sleep)

    async def run():
        times = []
        for amount in amounts:
            await gate.take(amount)
            times.append(clock.now)
            clock.now += pause
        return times

    return asyncio.run(run())


def test_no_minute_holds_more_than_the_limit():
    amounts = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 1, 1, 1, 7]
    for pause in (0.0, 2.5, 11.0):
        times = pass_all(10, amounts, pause)
        assert times == sorted(times)
        for start in times:
            within = sum(a for t, a in zip(times, amounts, strict=True) if start <= t < start + 60)
            assert within <= 10


def test_the_wait_is_no_longer_than_needed():
    # Two at once, the third when the first leaves the window, and so on.
    assert pass_all(2, [1, 1, 1, 1, 1]) == [0, 0, 60, 60, 120]


def test_no_limit_and_an_amount_above_the_limit():
    assert pass_all(0, [5] * 4) == [0] * 4
    assert pass_all(10, [4, 25, 4]) == [0, 60, 120]


def test_the_true_amount_replaces_the_estimate():
    clock = Clock()
    gate = PerMinute(10, clock=clock, sleep=clock.sleep)

    async def run():
        entry = await gate.take(9)
        gate.correct(entry, 2)
        await gate.take(8)
        return clock.now

    assert asyncio.run(run()) == 0
