"""Chats answered by an engine: batches, schemas, answers that cannot be used. The engine is a stand-in."""

import asyncio
from dataclasses import dataclass, field

import pytest

from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.rollout.chat import ChatFormat
from mapo_jax.rollout.completion import EngineModel
from mapo_jax.rollout.engine import Reply


@dataclass
class Echo:
    """Says one word to every chat, a chat a block; cut where the limit says so."""

    chat: ChatFormat
    slots: int = 3
    length: int = 400
    asked: list = field(default_factory=list)
    line: list = field(default_factory=list)
    most: int = 0

    @property
    def busy(self):
        return bool(self.line)

    def submit(self, request):
        assert request.start and request.slot not in {r.slot for r in self.line}
        self.asked.append(request)
        self.line.append(request)
        self.most = max(self.most, len(self.line))

    def advance(self):
        request = self.line.pop(0)
        word = self.chat.tokenizer.encode("Nothing", add_special_tokens=False)
        ids = (*word, self.chat.end_of_turn[0])
        cut = request.limit < len(ids)
        return {request.slot: Reply(ids[: request.limit], (0.0,) * len(ids), cut)}


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


def test_as_many_chats_are_under_way_as_the_engine_has_slots(engine):
    answers = ask(engine, [say(f"Number {i}.") for i in range(7)])
    assert [answer.text for answer in answers] == ["Nothing"] * 7
    assert len(engine.asked) == 7 and engine.most == 3
    assert answers[0].input_tokens == len(engine.chat.prompt(say("Number 0.")))
    assert answers[0].output_tokens == len(engine.chat.tokenizer.encode("Nothing")) + 1


def test_a_chat_that_is_given_up_frees_its_slot_when_it_is_answered(engine):
    async def run():
        model = EngineModel(engine, engine.chat)
        chat = lambda i: model(say(f"{i}"), seed=1, schema=None, max_tokens=20)  # noqa: E731
        tasks = [asyncio.ensure_future(chat(i)) for i in range(5)]
        await asyncio.sleep(0)
        for task in tasks[:4]:  # three under way, one that waits
            task.cancel()
        return await asyncio.gather(*tasks, *[chat(i) for i in range(5, 9)], return_exceptions=True)

    answers = asyncio.run(run())
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[:4])
    assert [answer.text for answer in answers[4:]] == ["Nothing"] * 5


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
    (failure,) = ask(engine, [say("One.")])
    assert isinstance(failure, ValueError)
