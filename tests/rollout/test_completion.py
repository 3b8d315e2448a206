"""Chats answered by an engine: slots, schemas, answers that cannot be used. The engine is a stand-in."""

import asyncio
import itertools
import time
from dataclasses import dataclass, field

import pytest

from mapo_jax.environment.allowance import allow
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.rollout.completion import EngineModel
from mapo_jax.rollout.requests import Reply
from mapo_jax.rollout.rows import ChatFormat


@dataclass
class Echo:
    """Says "Nothing", a token at a time; cut where the limit says so."""

    chat: ChatFormat
    slots: int = 3
    length: int = 400
    blocks: list = field(default_factory=list)  # the requests under way at each `advance`
    asked: list = field(default_factory=list)
    _under_way: dict = field(default_factory=dict)  # slot -> (request, steps)

    def submit(self, request):
        assert request.start and 0 <= request.slot < self.slots and request.slot not in self._under_way
        self._under_way[request.slot] = (request, 0)
        self.asked.append(request)

    @property
    def busy(self):
        return bool(self._under_way)

    def advance(self):
        time.sleep(0.002)
        word = self.chat.tokenizer.encode("Nothing", add_special_tokens=False)
        ids = (*word, self.chat.end_of_turn[0])
        self.blocks.append([request for request, _ in self._under_way.values()])
        replies = {}
        for slot, (request, steps) in list(self._under_way.items()):
            self._under_way[slot] = (request, steps + 1)
            if steps + 1 >= min(request.limit, len(ids)) + len(request.ids) % 3:  # some take longer
                said = ids[: request.limit]
                replies[slot] = Reply(said, (0.0,) * len(said), len(said) < len(ids))
                del self._under_way[slot]
        return replies


@pytest.fixture
def engine(plain_tokenizer):
    return Echo(ChatFormat(plain_tokenizer))


def ask(engine, chats, **options):
    options = {"seed": 1, "schema": None, "max_tokens": 20} | options

    async def run():
        model = EngineModel(engine, engine.chat)
        return await asyncio.gather(*[model(chat, **options) for chat in chats], return_exceptions=True)

    return asyncio.run(run())


def say(text):
    return [{"role": "system", "content": "Be short."}, {"role": "user", "content": text}]


def test_chats_take_the_engines_slots_as_they_come_free(engine):
    answers = ask(engine, [say(f"Number {'x ' * i}.") for i in range(7)])
    assert [answer.text for answer in answers] == ["Nothing"] * 7
    assert len(engine.asked) == 7
    assert max(len(block) for block in engine.blocks) == 3
    # Continuous: some block holds a chat that began beside one that has ended, and one that has not.
    assert any(
        set(map(id, one)) & set(map(id, next_)) and set(map(id, next_)) - set(map(id, one))
        for one, next_ in itertools.pairwise(engine.blocks)
    )
    assert answers[0].input_tokens == len(engine.chat.prompt(say("Number .")))
    assert answers[0].output_tokens == len(engine.chat.tokenizer.encode("Nothing")) + 1


def test_who_gives_up_keeps_nobody_waiting(engine):
    """The slot is handed on when the abandoned reply has ended, not before; and nobody gets another's."""

    async def run():
        model = EngineModel(engine, engine.chat)
        options = dict(seed=1, schema=None, max_tokens=20)
        calls = [asyncio.ensure_future(model(say(f"Number {i}."), **options)) for i in range(5)]
        while len(engine.asked) < 3:
            await asyncio.sleep(0)
        calls[0].cancel()
        calls[4].cancel()  # which has no slot yet
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(run())
    assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [True, *[False] * 3, True]
    assert [answer.text for answer in answers[1:4]] == ["Nothing"] * 3
    assert len(engine.asked) == 4


def test_random_numbers_follow_from_seed_and_prompt(engine):
    ask(engine, [say("One."), say("Two.")])
    ask(engine, [say("Two.")])
    ask(engine, [say("Two.")], seed=2)
    *first, again, other = engine.asked
    keys = {tuple(r.ids): r.key for r in first}
    assert keys[tuple(again.ids)] == again.key and other.key != again.key
    assert len(set(keys.values())) == 2
    assert all(0 <= word < 2**32 for key in keys.values() for word in key)


def test_a_schema_is_added_to_the_prompt(engine):
    ask(engine, [say("Judge.")], schema={"type": "object"})
    text = engine.chat.tokenizer.decode(engine.asked[0].ids)
    assert 'Judge.\n\nJSON schema: {"type": "object"}' in text


def test_a_cut_answer_and_a_long_prompt_are_malformed(engine):
    (failure,) = ask(engine, [say("One.")], max_tokens=2)
    assert isinstance(failure, RoleFailure) and failure.kind == "malformed" and failure.raw
    (failure,) = ask(engine, [say("word " * 400)])
    assert isinstance(failure, RoleFailure) and "extra_body.tokens" in failure.detail


def test_a_broken_engine_reaches_whoever_asked(engine):
    def broken():
        raise ValueError("no such thing")

    engine.advance = broken
    failures = ask(engine, [say("One."), say("Two.")])
    assert all(isinstance(failure, ValueError) for failure in failures)


def test_waiting_for_a_slot_is_no_time_of_the_call(engine):
    """One slot, four chats, and a clock that ticks with each block: every chat uses its own blocks alone."""
    engine.slots = 1

    async def run():
        model = EngineModel(engine, engine.chat)

        async def one(text):
            async with allow(1e9, 1e9, lambda: float(len(engine.blocks))) as allowance:
                await model(say(text), seed=1, schema=None, max_tokens=20)
            return allowance.used

        return await asyncio.gather(*[one(f"Hello {i}.") for i in range(4)])

    used = asyncio.run(run())
    assert sum(used) == len(engine.blocks) and max(used) < len(engine.blocks) / 2
