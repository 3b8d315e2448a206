"""Many tasks, one engine: who gives up, what breaks. The engine is a stand-in."""

import asyncio
import time
from dataclasses import dataclass, field

import pytest

from mapo_jax.rollout.dispatch import SHORT_BLOCK, Dispatcher
from mapo_jax.rollout.requests import Reply, Request


@dataclass
class Counting:
    """A reply of as many tokens as its slot's number, one for each block."""

    left: dict = field(default_factory=dict)
    blocks: int = 0
    broken_from: int = 1000
    lanes: int = 2
    most: list = field(default_factory=list)  # steps of each block at most

    def submit(self, request):
        assert request.slot not in self.left
        self.left[request.slot] = request.slot

    def sampled(self, slot, start):
        given = slot - self.left[slot]
        return Reply((slot,) * (given - start), (0.0,) * (given - start), False)

    def cancel(self, slot):
        self.left.pop(slot, None)

    @property
    def busy(self):
        return bool(self.left)

    def advance(self, most=None):
        self.blocks += 1
        self.most.append(most)
        if self.blocks >= self.broken_from:
            raise ValueError("out of order")
        self.left = {slot: left - 1 for slot, left in self.left.items()}
        ended = [slot for slot, left in self.left.items() if left <= 0]
        for slot in ended:
            del self.left[slot]
        return {slot: Reply((slot,) * slot, (0.0,) * slot, False) for slot in ended}


def ask(desk, slot):
    return asyncio.ensure_future(desk.reply(Request(slot, (1,), key=(0, 0, slot), turn=0, start=True)))


def run(engine, work):
    async def both():
        desk = Dispatcher(engine)
        serving = asyncio.ensure_future(desk.serve())
        try:
            return await asyncio.wait_for(work(desk), 20)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    return asyncio.run(both())


def test_everybody_gets_their_own():
    async def work(desk):
        return await asyncio.gather(*(ask(desk, slot) for slot in (5, 1, 3, 2)))

    engine = Counting()
    assert [len(reply.ids) for reply in run(engine, work)] == [5, 1, 3, 2]
    assert engine.blocks == 5


def test_who_gives_up_stops_nobody():
    """Before and while the engine works on it; the slot then takes another request."""

    async def work(desk):
        early, late, other = (ask(desk, slot) for slot in (1, 3, 6))
        await asyncio.sleep(0)
        early.cancel()
        while engine.blocks < 2:
            await asyncio.sleep(0.001)
        late.cancel()
        assert len((await other).ids) == 6
        return await ask(desk, 3)

    engine = Counting()
    assert len(run(engine, work).ids) == 3


def test_a_broken_engine_reaches_everybody():
    async def work(desk):
        return await asyncio.gather(*(ask(desk, slot) for slot in (1, 4, 5)), return_exceptions=True)

    first, *others = run(Counting(broken_from=3), work)
    assert first.ids == (1,)
    assert [str(error) for error in others] == ["out of order"] * 2


def test_a_block_under_way_ends_before_the_desk_does():
    """Else the engine would still be at work in its thread when its weights are replaced."""
    engine, ended = Counting(), []
    advance = engine.advance

    def slow():
        time.sleep(0.1)
        ended.append(True)
        return advance()

    engine.advance = slow

    async def work(desk):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(ask(desk, 9)), 0.03)

    run(engine, work)
    assert ended


def parts(desk, slot):
    return desk.stream(Request(slot, (1,), key=(0, 0, slot), turn=0, start=True))


def test_a_stream_gives_what_is_new_after_every_block():
    async def work(desk):
        other = ask(desk, 2)
        sizes = [len(part.ids) async for part in parts(desk, 4)]
        return sizes, await other

    sizes, other = run(Counting(), work)
    assert sizes == [1, 1, 1, 1] and len(other.ids) == 2


def test_blocks_are_short_where_lanes_are_free_and_a_stream_has_come_or_gone():
    """So that who comes next does not wait for a whole block beside an empty lane."""

    async def work(desk):
        async for part in parts(desk, 9):
            if engine.blocks == 3:
                other = asyncio.ensure_future(anext(stream := parts(desk, 3)))
            if engine.blocks == 9:
                await other, await stream.aclose()
            assert part.ids == (9,)

    engine = Counting()
    run(engine, work)
    # The first stream; the other comes and both lanes are taken; it ends three blocks later.
    assert engine.most[0] == SHORT_BLOCK and engine.most[1:3] == [None, None]
    assert engine.most.count(SHORT_BLOCK) == 2 and engine.most.index(SHORT_BLOCK, 1) > 5


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_a_stream_that_is_left_frees_its_slot(blocks):
    """Before, in the middle, and with its last block; another reply takes the slot from its first token."""

    async def work(desk):
        other = ask(desk, 9)
        await asyncio.sleep(0)
        stream = parts(desk, 3)
        for _ in range(blocks):
            await anext(stream)
        if not blocks:
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            waiting.cancel()
        await desk.cancel(3)
        assert 3 not in engine.left
        again = [part async for part in parts(desk, 3)]
        return sum(len(part.ids) for part in again), len((await other).ids)

    engine = Counting()
    assert run(engine, work) == (3, 9)


def test_a_broken_engine_ends_every_stream():
    async def work(desk):
        with pytest.raises(ValueError, match="out of order"):
            async for _ in parts(desk, 9):
                pass

    run(Counting(broken_from=3), work)


def test_a_slot_that_was_left_is_free_when_the_engine_breaks():
    """Else it would never be given to another request."""
    engine, advance = Counting(broken_from=2), Counting.advance

    def slow(most=None):
        time.sleep(0.05)
        return advance(engine, most)

    engine.advance = slow

    async def work(desk):
        stream = parts(desk, 9)
        await anext(stream)
        await asyncio.sleep(0.01)  # the second block is under way
        await asyncio.wait_for(desk.cancel(9), 5)

    run(engine, work)
