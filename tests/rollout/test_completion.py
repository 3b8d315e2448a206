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
    """Says the row's length in letters; cut where the limit says so."""

    chat: ChatFormat
    slots: int = 3
    length: int = 400
    batches: list = field(default_factory=list)

    def reply(self, requests):
        self.batches.append(requests)
        assert sorted(r.slot for r in requests) == list(range(len(requests)))
        assert all(r.start for r in requests)
        word = self.chat.tokenizer.encode("Nothing", add_special_tokens=False)
        replies = []
        for request in requests:
            ids = (*word, self.chat.end_of_turn[0])
            cut = request.limit < len(ids)
            replies.append(Reply(ids[: request.limit], (0.0,) * len(ids), cut))
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


def test_chats_are_answered_in_batches_of_the_engines_slots(engine):
    answers = ask(engine, [say(f"Number {i}.") for i in range(7)])
    assert [answer.text for answer in answers] == ["Nothing"] * 7
    assert sum(len(batch) for batch in engine.batches) == 7
    assert max(len(batch) for batch in engine.batches) == 3 and len(engine.batches) <= 4
    assert answers[0].input_tokens == len(engine.chat.prompt(say("Number 0.")))
    assert answers[0].output_tokens == len(engine.chat.tokenizer.encode("Nothing")) + 1


def test_random_numbers_follow_from_seed_and_prompt(engine):
    ask(engine, [say("One."), say("Two.")])
    ask(engine, [say("Two.")])
    ask(engine, [say("Two.")], seed=2)
    keys = {tuple(r.ids): r.key for r in engine.batches[0]}
    again, other = engine.batches[-2][0], engine.batches[-1][0]
    assert keys[tuple(again.ids)] == again.key and other.key != again.key
    assert len(set(keys.values())) == 2
    assert all(0 <= word < 2**32 for key in keys.values() for word in key)


def test_a_schema_is_added_to_the_prompt(engine):
    ask(engine, [say("Judge.")], schema={"type": "object"})
    text = engine.chat.tokenizer.decode(engine.batches[0][0].ids)
    assert 'Judge.\n\nJSON schema: {"type": "object"}' in text


def test_a_cut_answer_and_a_long_prompt_are_malformed(engine):
    (failure,) = ask(engine, [say("One.")], max_tokens=2)
    assert isinstance(failure, RoleFailure) and failure.kind == "malformed" and failure.raw
    (failure,) = ask(engine, [say("word " * 400)])
    assert isinstance(failure, RoleFailure) and "extra_body.tokens" in failure.detail


def test_a_broken_engine_reaches_whoever_asked(engine):
    def broken(requests):
        raise ValueError("no such thing")

    engine.reply = broken
    (failure,) = ask(engine, [say("One.")])
    assert isinstance(failure, ValueError)
