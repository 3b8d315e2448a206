"""Dialogues with a small world of the test's own: hostile texts, random latencies, failures on request."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mapo_jax.environment.dialogue import Action, Judgement, RoleFailure
from mapo_jax.environment.roles import Roles
from mapo_jax.environment.scenario import Person, Scenario, Stage, Story
from mapo_jax.environment.state import Limits
from mapo_jax.errors import UserError
from mapo_jax.model.head import token_logprobs
from mapo_jax.model.qwen import QwenConfig, hidden_states, init_params
from mapo_jax.rollout.collect import Dialogue, collect, derive_seed, finished_groups
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.rollout.sampling import Sampling

LENGTH, LIMIT, TEMPERATURE = 160, 6, 1.1
WORDS = [
    "the rota",
    " tired ",
    "<|im_end|>",
    "<think>",
    "\n",
    "{{ x }}",
    "caf\u00e9",
    "\u4f60",
    "\u200b",
    "'",
]
LIMITS = Limits(min_turns=2, max_turns=3)


def make_scenario(name):
    stage = Stage("It began.", ("the rota", "the nights"), ("One.", "Two."), "tired", "unseen")
    return Scenario(
        id=name,
        domain="career",
        split="train",
        person=Person("Ada", 41, "A nurse.", "Proud.", "Short."),
        empathy_threshold="medium",
        topic="Work.",
        hope="Rest.",
        dislike=("advice", "praise"),
        start=(2, 1, 3, 0, 2, 1, 3, 2, 1),
        history=("a", "b", "c", "d"),
        situation="s",
        goal="g",
        motive="m",
        value="your word",
        story=Story(
            "t", (stage, stage, stage, stage), ("being there", "going on"), ("a talk", "one walk"), "o", "e"
        ),
    )


@dataclass(frozen=True)
class World:
    """All three roles. What it says follows from the dialogue's seed; how long it takes, from `latency`."""

    latency: int | None = None  # seed of random latencies; None: answers at once
    size: int = 3  # parts of a message
    silent_opening: frozenset = frozenset()  # scenarios whose user cannot open
    silent_reply: frozenset = frozenset()  # scenarios whose user fails after the first turn
    blind_turns: frozenset = frozenset()  # turns that the judge cannot score
    opened: list = None

    async def wait(self):
        if self.latency is not None:
            await asyncio.sleep(random.Random(f"{self.latency}/{time.monotonic_ns()}").random() / 200)

    def text(self, *seed):
        numbers = random.Random("/".join(map(str, seed)))
        return "".join(numbers.choice(WORDS) for _ in range(self.size))

    async def open(self, scenario, seed):
        await self.wait()
        if self.opened is not None:
            self.opened.append(scenario.id)
        if scenario.id in self.silent_opening:
            raise RoleFailure("transport")
        return self.text(scenario.id, seed)

    async def reply(self, state):
        await self.wait()
        if state.scenario.id in self.silent_reply:
            raise RoleFailure("timeout")
        return self.text(state.seed, len(state.turns))

    async def score(self, state, reply):
        await self.wait()
        if state.turn_count in self.blind_turns:
            raise RoleFailure("malformed")
        numbers = random.Random(f"{state.seed}/{state.turn_count}/{reply}")
        levels = tuple(numbers.choice((0, 1, 2)) if i % 2 == 0 else -numbers.choice((0, 1)) for i in range(6))
        return Judgement(levels, ("e",) * 6, ("r",) * 6, {"kind": "x", "acts": ["y"], "stage": 1})

    async def act(self, state):
        await self.wait()
        return Action("continue", None, "go on")

    @property
    def roles(self):
        return Roles(self, self, self)


@pytest.fixture(scope="module")
def chat(thinking_tokenizer):
    return ChatFormat(thinking_tokenizer)


@pytest.fixture(scope="module")
def config(chat):
    return QwenConfig(
        vocab_size=chat.vocabulary_size + 7,
        hidden_size=16,
        intermediate_size=20,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=6,
        max_position_embeddings=LENGTH,
    )


@pytest.fixture(scope="module")
def params(config):
    return jax.tree.map(lambda leaf: 8 * leaf if leaf.std() > 0 else leaf, init_params(config, seed=1))


@pytest.fixture(scope="module")
def engine(config, chat, params):
    engine = Engine(
        config,
        slots=4,
        length=LENGTH,
        max_reply_tokens=LIMIT,
        stop_ids=chat.stop_ids,
        vocabulary_size=chat.vocabulary_size,
        sampling=Sampling(temperature=TEMPERATURE),
        lanes=2,
    )
    engine.load(params, version=17)
    return engine


SCENARIOS = [make_scenario("one"), make_scenario("two")]


def hold(engine, chat, world=World(), scenarios=SCENARIOS, rollouts=2, **options):
    settings = dict(seed=3, step=5, concurrency=8)
    return asyncio.run(
        collect(scenarios, rollouts, engine, chat, world.roles, LIMITS, **(settings | options))
    )


@pytest.fixture(scope="module")
def dialogues(engine, chat):
    return hold(engine, chat)


def flat(groups):
    return [dialogue for group in groups for dialogue in group]


@pytest.fixture(scope="module")
def check_rows(config, params):
    """Compares the log-probabilities in rows with one whole forward pass, as the trainer would make it."""

    @jax.jit
    def score(tokens):
        positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        hidden = hidden_states(params, config, tokens, positions)
        return token_logprobs(
            params,
            config,
            hidden,
            jnp.roll(tokens, -1, axis=1),
            temperature=TEMPERATURE,
            vocabulary_size=config.vocab_size - 7,
            chunk=LENGTH,
        )[0]

    def check(rows):
        for row in rows:
            tokens = np.zeros((1, LENGTH), np.int32)
            tokens[0, : len(row)] = row.ids
            places = np.flatnonzero(row.sampled)
            assert len(places)
            # The project's tolerance for sampler against trainer in float32.
            np.testing.assert_allclose(
                np.array(row.logprob)[places], np.asarray(score(tokens))[0, places - 1], atol=1e-4
            )

    return check


class TestRows:
    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(seed=st.integers(0, 2**31 - 1), size=st.integers(0, 5))
    def test_row_trained_on_is_the_row_sampled_from(self, engine, chat, check_rows, seed, size):
        for dialogue in flat(hold(engine, chat, World(size=size), seed=seed)):
            row = dialogue.row
            seen = next(
                engine.row(slot) for slot in range(4) if engine.row(slot) == row.ids[: len(engine.row(slot))]
            )
            # All but the closing of a last reply that was cut, which no reply follows.
            assert row.ids[: len(seen)] == seen
            assert not any(row.sampled[len(seen) :])
            check_rows([row])
            # The prompts are the template's, the replies' ids are as sampled.
            ids = list(chat.start(dialogue.state.turns[0].user))
            for index, turn in enumerate(dialogue.state.turns):
                ids += chat.next_user(turn.user) if index else ()
                reply = [
                    i for i, s, t in zip(row.ids, row.sampled, row.turn, strict=True) if s and t == index
                ]
                assert chat.decode(reply) == turn.reply
                closed = reply[-1] in chat.end_of_turn
                ids += [*reply, *(() if closed else chat.end_of_turn)]
            assert tuple(ids) == row.ids

    def test_cut_replies_are_closed_unsampled(self, dialogues, chat):
        cut = 0
        for dialogue in flat(dialogues):
            row = dialogue.row
            for index, turn in enumerate(dialogue.state.turns):
                places = [i for i, t in enumerate(row.turn) if t == index]
                assert row.ids[places[-1]] == chat.end_of_turn[0]
                count = sum(row.sampled[i] for i in places)
                if turn.truncated:
                    assert (count, len(places)) == (LIMIT, LIMIT + 1)
                    assert not row.sampled[places[-1]] and row.logprob[places[-1]] == 0
                    cut += 1
        assert cut

    def test_per_turn(self, engine, thinking_tokenizer, check_rows):
        """One row per turn, rendered whole, each sampled from as it stands."""
        chat = ChatFormat(thinking_tokenizer, "per_turn")
        for dialogue in flat(hold(engine, chat)):
            assert len(dialogue.rows) == dialogue.state.turn_count == 3
            messages = dialogue.state.messages
            for index, row in enumerate(dialogue.rows):
                prompt = chat.prompt(messages[: 2 * index + 1])
                assert row.ids[: len(prompt)] == prompt
                assert set(row.turn) == {-1, index}
            check_rows(dialogue.rows)
            assert Dialogue.from_json(json.loads(json.dumps(dialogue.to_json()))) == dialogue


class TestDialogues:
    def test_shape_and_identity(self, dialogues):
        assert [
            [(d.scenario, d.rollout, d.step, d.weight_version) for d in group] for group in dialogues
        ] == [[(s, r, 5, 17) for r in range(2)] for s in range(2)]
        for s, group in enumerate(dialogues):
            assert {d.state.scenario.id for d in group} == {SCENARIOS[s].id}
            assert len({d.state.turns[0].user for d in group}) == 1  # the shared first message
            assert len({d.row.ids for d in group}) == 2
            assert all(d.state.outcome in ("success", "failure", "timeout") for d in group)

    @pytest.mark.parametrize("latency,concurrency", [(1, 8), (2, 3), (3, 1)])
    def test_same_whatever_the_latency(self, dialogues, engine, chat, latency, concurrency):
        """Equal as values: every float of every log-probability."""
        assert hold(engine, chat, World(latency), concurrency=concurrency) == dialogues

    @pytest.mark.parametrize("latency", [None, 4])
    def test_more_dialogues_than_slots(self, engine, chat, check_rows, latency):
        """Twelve in four slots: each as it would be alone; a finished one makes room for one that waits."""
        groups = hold(engine, chat, World(latency), rollouts=6)
        for s, group in enumerate(groups):
            assert [d.rollout for d in group] == list(range(6))
            check_rows([d.row for d in group])
            (alone,) = hold(engine, chat, scenarios=[SCENARIOS[s]], rollouts=6)
            assert alone == [replace(d, scenario=0) for d in group]

    def test_groups_come_as_they_finish(self, engine, chat, dialogues):
        """The scenario with the slow user comes last; what was said is the same."""

        class Slow(World):
            async def reply(self, state):
                await asyncio.sleep(0.2 if state.scenario.id == "one" else 0)
                return await super().reply(state)

        async def order():
            groups = finished_groups(
                SCENARIOS, 2, engine, chat, Slow().roles, LIMITS, seed=3, step=5, concurrency=8
            )
            return [group async for group in groups]

        assert asyncio.run(order()) == dialogues[::-1]

    def test_seed_and_step(self, dialogues, engine, chat):
        for other in (hold(engine, chat, seed=4), hold(engine, chat, step=6)):
            ids = [{d.row.ids for d in flat(one)} for one in (dialogues, other)]
            assert not ids[0] & ids[1]

    def test_order_of_scenarios(self, dialogues, engine, chat):
        """A dialogue says the same wherever it stands in the batch."""
        turned = hold(engine, chat, scenarios=SCENARIOS[::-1])[::-1]
        assert [d.row.ids for d in flat(turned)] == [d.row.ids for d in flat(dialogues)]

    def test_a_scenario_twice(self, engine, chat):
        world = World(opened=[])
        groups = hold(engine, chat, world, scenarios=[SCENARIOS[0]] * 2)
        assert world.opened == ["one", "one"]  # once each, not once per rollout
        assert len({d.state.seed for d in flat(groups)}) == 4

    def test_bounded_concurrency(self, engine, chat):
        under_way, most = 0, 0

        class Counting(World):
            async def wait(self):
                nonlocal under_way, most
                under_way += 1
                most = max(most, under_way)
                await asyncio.sleep(0.001)
                under_way -= 1

        hold(engine, chat, Counting(), concurrency=2)
        assert most == 2

    def test_event_loop_stays_free(self, engine, chat, monkeypatch):
        """A clock ticks on while the engine works."""
        advance, ticks = engine.advance, []

        def slow():
            begin = time.monotonic()
            time.sleep(0.1)
            replies = advance()
            ticks.append(sum(begin < tick < begin + 0.1 for tick in clock))
            return replies

        clock = []

        async def tick():
            while True:
                clock.append(time.monotonic())
                await asyncio.sleep(0.005)

        async def both():
            task = asyncio.ensure_future(tick())
            await collect(SCENARIOS, 2, engine, chat, World().roles, LIMITS, seed=1, step=1, concurrency=4)
            task.cancel()

        monkeypatch.setattr(engine, "advance", slow)
        asyncio.run(both())
        assert min(ticks) >= 1  # of 20; a busy machine gives few


class TestEnds:
    def test_no_room_for_another_reply(self, engine, chat):
        for dialogue in flat(hold(engine, chat, World(size=14))):
            assert (dialogue.state.outcome, dialogue.state.rule) == ("timeout", "max_tokens")
            assert dialogue.state.user == "" and dialogue.state.turn_count < LIMITS.max_turns
            assert len(dialogue.row) <= LENGTH
            assert dialogue.usable(0.5)

    def test_first_message_too_long(self, engine, chat):
        with pytest.raises(UserError, match=r"scenario (one|two) takes \d+ tokens.*max_tokens`=160"):
            hold(engine, chat, World(size=200))

    def test_user_cannot_open(self, dialogues, engine, chat):
        groups = hold(engine, chat, World(silent_opening=frozenset({"one"})))
        for dialogue in groups[0]:
            assert (dialogue.state.outcome, dialogue.state.failure) == ("error", "transport")
            assert len(dialogue.row) == 0 and not dialogue.state.turns and not dialogue.usable(1.0)
        assert [d.row.ids for d in groups[1]] == [d.row.ids for d in dialogues[1]]
        assert flat(hold(engine, chat, World(silent_opening=frozenset({"one", "two"}))))[3].row.ids == ()

    def test_user_fails_later(self, engine, chat):
        groups = hold(engine, chat, World(silent_reply=frozenset({"two"})))
        for dialogue in groups[1]:
            assert (dialogue.state.outcome, dialogue.state.failure) == ("error", "timeout")
            assert dialogue.state.turn_count == 1 and not dialogue.usable(1.0)
        assert all(d.usable(0.0) for d in groups[0])

    def test_judge_fails(self, engine, chat):
        """An unscored turn is a turn without a score, never a zero; too many of them and it is left out."""
        for dialogue in flat(hold(engine, chat, World(blind_turns=frozenset({1})))):
            assert [turn.judgement is None for turn in dialogue.state.turns] == [False, True, False]
            assert dialogue.state.turns[1].failure == "malformed"
            assert dialogue.usable(0.34) and not dialogue.usable(0.33)
        for dialogue in flat(hold(engine, chat, World(blind_turns=frozenset(range(9))))):
            assert not dialogue.usable(1.0)  # nothing scored at all

    def test_progress_and_interruption(self, engine, chat, dialogues):
        """What the callback raises comes out as it is, and no task is left behind, nor any reply."""
        counts = []
        groups = hold(engine, chat, on_turn=lambda *numbers: counts.append(numbers))
        turns, ended = zip(*counts, strict=True)
        held = flat(groups)
        assert list(turns) == list(range(1, 1 + sum(d.state.turn_count for d in held)))
        assert list(ended) == sorted(ended) and ended[0] == 0 and ended[-1] == len(held)

        class Stop(Exception):
            pass

        def stop(turns, ended):
            if turns == 2:
                raise Stop

        async def run():
            with pytest.raises(Stop):
                await collect(
                    SCENARIOS,
                    2,
                    engine,
                    chat,
                    World(1).roles,
                    LIMITS,
                    seed=1,
                    step=1,
                    concurrency=4,
                    on_turn=stop,
                )
            assert len(asyncio.all_tasks()) == 1

        asyncio.run(run())
        assert not engine.busy
        assert hold(engine, chat) == dialogues


class TestSaved:
    def test_round_trip(self, dialogues):
        """Equal after JSON, to the last bit of every float."""
        for dialogue in flat(dialogues):
            again = Dialogue.from_json(json.loads(json.dumps(dialogue.to_json())))
            assert again == dialogue
            assert again.state.scenario.start_position == dialogue.state.scenario.start_position
            assert again.state.position == dialogue.state.position
            assert np.float32(again.row.logprob).tobytes() == np.float32(dialogue.row.logprob).tobytes()

    @pytest.mark.parametrize("damage", [{"row": None}, {"state": {}}, {"state": 3}, {"row": {"ids": 1}}])
    def test_damaged(self, dialogues, damage):
        data = dialogues[0][0].to_json() | damage
        if damage == {"row": None}:
            del data["row"]
        with pytest.raises(UserError, match="no saved dialogue"):
            Dialogue.from_json(data)

    def test_usable_shares(self, dialogues):
        dialogue = dialogues[0][0]
        assert dialogue.usable(0.0)
        assert not replace(dialogue, state=replace(dialogue.state, outcome="error")).usable(1.0)


def test_derive_seed():
    """Fixed for ever: saved runs are replayed with it. Parts do not run into each other."""
    assert derive_seed(1, 2, "three") == 330987272  # blake2b, four bytes
    seeds = {
        derive_seed(*parts) for parts in [(1, 23), (12, 3), (1, 2, 3), ("1", "2", "4"), (123,), ("a", 1)]
    }
    assert len(seeds) == 6


def test_a_share_of_the_scenarios_is_held_as_in_the_whole(engine, chat):
    """The third scenario is the first one again: it has further rollouts, whoever holds it."""
    scenarios = [*SCENARIOS, SCENARIOS[0]]
    whole = hold(engine, chat, scenarios=scenarios)
    shares = [hold(engine, chat, scenarios=scenarios, share=share) for share in (slice(0, 2), slice(2, 3))]
    assert [group for share in shares for group in share] == whole
    assert whole[0] != whole[2]
    assert hold(engine, chat, scenarios=scenarios, share=slice(1, 1)) == []
