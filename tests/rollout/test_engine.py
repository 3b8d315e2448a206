"""The engine against transformers' generate, against one whole forward pass, and against itself.

The shape is tiny and nothing in it is a default: 2 layers, 4/2 heads of 6 on a width of 20, 61 embedding rows
of which 53 are tokens. Most caches have 64 tokens; where they grow, through 256, 384, 512 and 640.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mapo_jax.config import MeshConfig
from mapo_jax.errors import UserError
from mapo_jax.model.attention import cached_attention
from mapo_jax.model.head import logits, token_logprobs
from mapo_jax.model.huggingface import save_params, write_config
from mapo_jax.model.qwen import QwenConfig, hidden_states, init_cache, init_params
from mapo_jax.model.sharding import make_mesh
from mapo_jax.rollout.capacity import cache_bytes, cache_lengths
from mapo_jax.rollout.decoding import generate, prefill
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request, StaleSlot
from mapo_jax.rollout.sampling import RequestSampling, Sampling
from mapo_jax.running.metrics import CompileCounter
from tests.forked import run_on_devices

CONFIG = QwenConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=28,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=5e6,
    max_position_embeddings=640,
)
TOKENS, STOPS, LENGTH, LIMIT, TEMPERATURE = 53, (2, 5), 64, 8, 0.8


def scaled(params):
    """Weights large enough for distributions with a shape; 0.02 would make every token as good as any."""
    return jax.tree.map(lambda leaf: 12 * leaf if leaf.std() > 0 else leaf, params)


@pytest.fixture(scope="module")
def params():
    return scaled(init_params(CONFIG, seed=3))


def make_engine(**options):
    settings = dict(
        slots=4,
        length=LENGTH,
        max_reply_tokens=LIMIT,
        stop_ids=STOPS,
        vocabulary_size=TOKENS,
        chunk=8,
        prefill_rows=2,
        block=3,
    )
    return Engine(CONFIG, **(settings | options))


@pytest.fixture(scope="module")
def shared_engine():
    return make_engine(
        sampling=Sampling(temperature=TEMPERATURE), mesh=make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    )


@pytest.fixture
def engine(shared_engine, params):
    shared_engine.reset()
    shared_engine.load(params, version=0)
    return shared_engine


def prompt(seed, size):
    return [int(i) for i in np.random.default_rng(seed).integers(6, TOKENS, size)]


def request(slot, ids, turn=0, dialogue=None, **options):
    return Request(slot, ids, key=(11, 4, slot if dialogue is None else dialogue), turn=turn, **options)


def whole_pass(params, row, length=LENGTH):
    """Log-probability of each token of a row but the first, given those before it, by one forward pass."""
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(_whole_pass(params, padded))[0, : len(row) - 1]


@jax.jit
def _whole_pass(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(params, CONFIG, tokens, positions)
    targets = jnp.roll(tokens, -1, axis=1)
    return token_logprobs(
        params, CONFIG, hidden, targets, temperature=TEMPERATURE, vocabulary_size=TOKENS, chunk=64
    )[0]


@jax.jit
def _scores(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return logits(params, CONFIG, hidden_states(params, CONFIG, tokens, positions))


@pytest.fixture(scope="module")
def long_engine(params):
    """Three slots of four cache lengths, two lanes."""
    engine = Engine(
        CONFIG,
        slots=3,
        lanes=2,
        length=640,
        max_reply_tokens=30,
        stop_ids=STOPS[:1],
        vocabulary_size=TOKENS,
        sampling=Sampling(temperature=TEMPERATURE),
    )
    engine.load(params, 0)
    return engine


class TestAgreement:
    def test_greedy_equals_transformers(self, params, tmp_path):
        """Three turns, ragged prompts, across the cache's growth, fewer lanes than dialogues, a repetition
        penalty; transformers starts over at each turn."""
        import torch
        from transformers import AutoModelForCausalLM

        # Only tokens can be sampled here; transformers knows no such limit, so give it a model without more.
        weights = jax.tree.map(np.asarray, params)
        weights["embed"] = {"embedding": weights["embed"]["embedding"].copy()}
        weights["embed"]["embedding"][TOKENS:] = 0
        write_config(tmp_path, CONFIG)
        save_params(tmp_path, weights, CONFIG, dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        forbidden = [[i] for i in range(TOKENS, CONFIG.vocab_size)]

        penalty = 1.3
        sampling = Sampling(temperature=0, repetition_penalty=penalty)
        engine = make_engine(sampling=sampling, lanes=2, length=384, chunk=32)
        engine.load(weights, version=0)
        rows = {slot: [] for slot in (0, 1, 3)}
        lengths = [(5, 17, 49), (3, 232, 1), (7, 1, 213)]
        for turn, sizes in enumerate(lengths):
            new = {slot: prompt(10 * turn + slot, size) for slot, size in zip(rows, sizes, strict=True)}
            replies = engine.reply([request(s, ids, turn, start=turn == 0) for s, ids in new.items()])
            for (slot, ids), reply in zip(new.items(), replies, strict=True):
                rows[slot] += ids
                expected = model.generate(
                    torch.tensor([rows[slot]]),
                    attention_mask=torch.ones(1, len(rows[slot]), dtype=torch.long),
                    max_new_tokens=LIMIT,
                    do_sample=False,
                    repetition_penalty=penalty,
                    eos_token_id=list(STOPS),
                    pad_token_id=0,
                    bad_words_ids=forbidden,
                )[0, len(rows[slot]) :]
                assert list(reply.ids) == expected.tolist()
                rows[slot] += reply.ids
        assert [len(row) > 256 for row in rows.values()] == [False, True, True]

    def test_logprobs_equal_one_forward_pass(self, engine, params):
        """Turn by turn, with a shared start that was copied."""
        start = prompt(0, 11)
        sampled = {slot: {} for slot in range(4)}
        for turn in range(4):
            first = {0: start, 1: start, 2: start, 3: prompt(1, 5)}
            ids = first if turn == 0 else {s: prompt(100 * turn + s, 2 + 2 * s) for s in range(4)}
            requests = [request(s, ids[s], turn, start=turn == 0) for s in range(4)]
            for slot, reply in enumerate(engine.reply(requests)):
                end = len(engine.row(slot))
                sampled[slot] |= dict(
                    zip(
                        range(end - len(reply.ids), end),
                        zip(reply.ids, reply.logprobs, strict=True),
                        strict=True,
                    )
                )
        for slot in range(4):
            row = engine.row(slot)
            logprobs = whole_pass(params, row)
            assert all(row[place] == token for place, (token, _) in sampled[slot].items())
            places = np.array(list(sampled[slot]))
            # The project's tolerance for float32; sums over 64 entries in another order differ by ~1e-6.
            np.testing.assert_allclose(
                [logprob for _, logprob in sampled[slot].values()], logprobs[places - 1], atol=1e-4
            )

    def test_across_every_length_of_the_cache(self, long_engine, params):
        """Seven dialogues of two starts, through four lengths, in three slots that are filled again as they
        come free: turn by turn as in one forward pass."""
        assert long_engine.lengths == (256, 384, 512, 640)
        starts, numbers = (prompt(1, 70), prompt(2, 33)), np.random.default_rng(5)
        boundaries, waiting, slots, turns, sampled = set(), list(range(7)), {}, {}, {}
        before = replace(long_engine.counts)
        while waiting or slots:
            for slot in range(3):
                if slot not in slots and waiting:
                    dialogue = slots[slot] = waiting.pop(0)
                    turns[dialogue], sampled[dialogue] = 0, {}
                    start = request(slot, starts[dialogue % 2], dialogue=dialogue, start=True)
                    long_engine.submit(start)
            for slot, reply in long_engine.advance().items():
                dialogue, row = slots[slot], long_engine.row(slot)
                places = range(len(row) - len(reply.ids), len(row))
                boundaries |= {b for b in long_engine.lengths if places[0] <= b < len(row)}
                sampled[dialogue] |= dict(zip(places, reply.logprobs, strict=True))
                # Up to 60 tokens more, or as many as let the next reply begin just before a length ends.
                ahead = next(length for length in long_engine.lengths if length > len(row) + 1)
                new = prompt(numbers.integers(1000), min(60, ahead - len(row) - 1))
                if len(row) + len(new) < 600:
                    turns[dialogue] += 1
                    long_engine.submit(request(slot, new, turns[dialogue], dialogue=dialogue))
                    continue
                whole = whole_pass(params, row, 640)
                places = np.array(list(sampled[dialogue]))
                # The project's tolerance for float32.
                np.testing.assert_allclose(list(sampled[dialogue].values()), whole[places - 1], atol=1e-4)
                del slots[slot]
        assert boundaries == {256, 384, 512}  # each was crossed in the middle of a reply
        assert long_engine.counts.since(before).copied >= 5 * 32

    def test_filtered_logprobs_are_those_of_the_distribution_sampled_from(self, params):
        """All filters at once, with a penalty on all that the row holds, over two turns: against a forward
        pass by the model's own code, filtered by transformers' processors."""
        import torch
        from transformers.generation import logits_process as theirs

        sampling = Sampling(repetition_penalty=1.4, temperature=0.9, top_k=14, top_p=0.93, min_p=0.01)
        engine = make_engine(sampling=sampling, lanes=2)
        engine.load(params, 0)
        processors = [
            theirs.RepetitionPenaltyLogitsProcessor(1.4),
            theirs.TemperatureLogitsWarper(0.9),
            theirs.TopKLogitsWarper(14),
            theirs.TopPLogitsWarper(0.93),
            theirs.MinPLogitsWarper(0.01),
        ]
        checked = 0
        for turn in range(2):
            replies = engine.reply(
                [request(s, prompt(30 + 4 * turn + s, 6 + s), turn, start=turn == 0) for s in range(4)]
            )
            for slot, reply in enumerate(replies):
                row = np.array(engine.row(slot))
                scores = np.asarray(_scores(params, np.pad(row, (0, LENGTH - len(row)))[None]))[0].copy()
                scores[:, TOKENS:] = -1e30
                places = range(len(row) - len(reply.ids), len(row))
                for place, logprob in zip(places, reply.logprobs, strict=True):
                    filtered = torch.tensor(scores[place - 1][None])
                    for processor in processors:
                        filtered = processor(torch.tensor(row[None, :place]), filtered)
                    expected = torch.log_softmax(filtered, dim=-1)[0, row[place]]
                    assert abs(expected - logprob) < 1e-4
                    checked += 1
        assert checked > 20

    def test_a_copied_start_equals_an_own_one(self, engine):
        """Of a slot that goes on, of one that starts beside it, and of the slot's own row."""
        start, longer = prompt(5, 23), prompt(5, 23)[:15] + prompt(6, 9)
        engine.reply([request(2, start, dialogue=8, start=True)])
        engine.reply([request(2, prompt(7, 4), turn=1, dialogue=8)])
        before = engine.counts.prefilled, engine.counts.copied
        copied = engine.reply(
            [request(0, start, dialogue=9, start=True), request(1, longer, dialogue=10, start=True)]
        )
        # All of the one but its last token; of the other's 15 common tokens a chunk of 8.
        assert engine.counts.copied - before[1] == 22 + 8
        assert engine.counts.prefilled - before[0] == len(longer) - 1 - 8
        (again,) = engine.reply([request(1, longer, dialogue=10, start=True)])  # over its own row
        assert engine.counts.copied - before[1] == 22 + 8 + 23
        assert engine.row(0)[:23] == tuple(start) and engine.row(1)[:24] == tuple(longer)
        engine.reset()
        together = engine.reply([request(s, start, dialogue=9 - s, start=True) for s in range(3)])
        engine.reset()
        (own,) = engine.reply([request(0, start, dialogue=9, start=True)])
        engine.reset()
        (other,) = engine.reply([request(3, longer, dialogue=10, start=True)])
        assert own == copied[0] == together[0]
        assert other == copied[1] == again


class TestIdentity:
    def test_same_in_any_slot_beside_anyone(self, engine):
        """Bit for bit, log-probabilities too."""
        one, other = prompt(6, 7), prompt(7, 10)
        together = engine.reply(
            [request(0, one, dialogue=1, start=True), request(1, other, dialogue=2, start=True)]
        )
        engine.reset()
        (alone,) = engine.reply([request(3, other, dialogue=2, start=True)])
        assert alone == together[1]

    def test_same_whenever_it_comes(self, params):
        """Requests that join while others are under way, with fewer lanes than slots, blocks cut short, with
        and without room for every cache on the device: bit for bit, and nothing is prefilled twice."""
        options = dict(sampling=Sampling(temperature=TEMPERATURE), slots=6, lanes=2, length=384, chunk=32)
        engine, narrow = make_engine(**options), make_engine(**options, resident=2)
        first = [request(s, prompt(40 + s, 4 + 3 * s), start=True) for s in range(6)]
        second = [request(s, prompt(50 + s, (250, 9, 12)[s % 3]), turn=1) for s in range(6)]
        engine.load(params, 0)
        expected = [engine.reply(first), engine.reply(second)]
        assert max(len(engine.row(slot)) for slot in range(6)) > 256  # the cache has grown
        prefilled = engine.counts.prefilled
        assert prefilled == sum(len(r.ids) for r in first + second) - 6
        for one, seed in [(engine, 0), (engine, 1), (engine, 2), (narrow, 0), (narrow, 1), (narrow, 2)]:
            one.load(params, 0)
            one.reset()
            before = replace(one.counts)
            waiting = [first[i] for i in np.random.default_rng(seed).permutation(6)]
            found = {}, {}
            while waiting or one.busy:
                for _ in range(1 + seed % 3):
                    if waiting:
                        one.submit(waiting.pop())
                steps = one.counts.steps
                ended = one.advance(seed or None)
                assert one.counts.steps - steps <= (seed or one.block)
                for slot, reply in ended.items():
                    turn = int(slot in found[0])
                    found[turn][slot] = reply
                    if turn == 0:
                        waiting.insert(0, second[slot])
            for turn in range(2):
                assert [found[turn][slot] for slot in range(6)] == expected[turn]
            work = one.counts.since(before)
            assert work.prefilled == prefilled
            assert (work.parked >= 4) == (one is narrow)

    @pytest.mark.parametrize("ended", [(), (0,), (0, 1)])
    def test_an_ended_dialogue_is_not_parked(self, params, ended):
        """Its place is free at once, its slot takes another dialogue, and the replies stay the same."""
        engine = make_engine(sampling=Sampling(temperature=TEMPERATURE), resident=2)
        engine.load(params, 0)
        engine.reply([request(s, prompt(s, 9), start=True) for s in (0, 1)])
        for slot in ended:
            engine.release(slot)
        found = engine.reply([request(s, prompt(s, 9), start=True) for s in (2, 3)])
        assert engine.counts.parked == 2 - len(ended)
        for slot in ended:
            with pytest.raises(StaleSlot):
                engine.submit(request(slot, prompt(7, 3), turn=1))
        engine.release(2)
        again = engine.reply([request(s, prompt(s + 2, 9), dialogue=s + 2, start=True) for s in (0, 1)])
        assert again == found

    def test_same_after_anyone(self, engine):
        """A start that goes on from what another slot said: its sampled tokens are not copied, since decoding
        and prefill round differently."""
        ids = prompt(3, 19)
        (reply,) = engine.reply([request(0, ids, start=True)])
        on = [*ids, *reply.ids, *prompt(4, 9)]
        before = engine.counts.copied
        (copied,) = engine.reply([request(1, on, start=True)])
        assert engine.counts.copied - before == 16  # two chunks of the 18 tokens that were prefilled
        (again,) = engine.reply([request(0, on, dialogue=1, start=True)])  # over its own row
        engine.reset()
        (own,) = engine.reply([request(1, on, start=True)])
        assert copied == own == again

    def test_same_beside_a_longer_one(self, long_engine):
        """The cache's length follows from the longest dialogue; it changes the others by rounding alone."""
        long_engine.reset()
        alone = long_engine.reply(
            [request(0, prompt(3, 90), start=True), request(1, prompt(4, 20), start=True)]
        )
        for size in (250, 380, 500):
            long_engine.reset()
            long_engine.reply([request(2, prompt(5, size), start=True)])
            together = [request(0, prompt(3, 90), start=True), request(1, prompt(4, 20), start=True)]
            for one, other in zip(long_engine.reply(together), alone, strict=True):
                assert one.ids == other.ids
                # Sums over 256 to 512 entries in another order: a few units in the last place of a logit.
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)

    def test_lanes_change_nothing_but_rounding(self, engine, params):
        narrow = make_engine(sampling=Sampling(temperature=TEMPERATURE), lanes=1, block=5)
        narrow.load(params, 0)
        requests = [request(s, prompt(20 + s, 4 + s), start=True) for s in range(4)]
        for one, other in zip(engine.reply(requests), narrow.reply(requests), strict=True):
            assert one.ids == other.ids
            # Programs of another width add in another order: some units in the last place of values up to 5.
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-6, atol=1e-6)

    def test_key(self, engine):
        """Another seed, step, dialogue or turn gives another reply."""
        ids = prompt(8, 6)
        keys = [((11, 4, 0), 0), ((12, 4, 0), 0), ((11, 5, 0), 0), ((11, 4, 1), 0), ((11, 4, 0), 1)]
        replies = set()
        for key, turn in keys:
            replies.add(engine.reply([Request(0, ids, key, turn, start=True)])[0].ids)
        assert len(replies) == len(keys)


class TestReplies:
    def test_ends(self, engine):
        """At a stop id, at the limit, at the end of the cache; only tokens are sampled."""
        seen = set()
        for seed in range(12):
            requests = [request(s, prompt(seed + s, 5), dialogue=4 * seed + s, start=True) for s in range(4)]
            for reply in engine.reply(requests):
                stopped = reply.ids[-1] in STOPS
                assert not set(reply.ids[:-1]) & set(STOPS)
                assert reply.truncated == (not stopped)
                assert stopped or len(reply.ids) == LIMIT
                assert max(reply.ids) < TOKENS
                assert len(reply.ids) == len(reply.logprobs) and max(reply.logprobs) <= 0
                seen.add(stopped)
        assert seen == {True, False}

    def test_limit_and_end_of_cache(self, engine):
        replies = engine.reply(
            [request(0, prompt(1, 5), start=True, limit=1), request(1, prompt(2, 61), start=True)]
        )
        assert [len(reply.ids) for reply in replies] == [1, 3]
        assert [reply.truncated for reply in replies] == [reply.ids[-1] not in STOPS for reply in replies]
        assert len(engine.row(1)) == LENGTH

    def test_nothing_to_do(self, engine):
        assert engine.reply([]) == []

    def test_only_new_tokens_are_prefilled(self, engine):
        before = replace(engine.counts)
        (first,) = engine.reply([request(0, prompt(1, 12), start=True)])
        assert engine.counts.since(before).prefilled == 11  # the last one is the first input of generate
        (second,) = engine.reply([request(0, prompt(2, 6), turn=1)])
        work = engine.counts.since(before)
        assert work.prefilled == 11 + 6  # the reply's last token and five of the six
        assert work.copied == 0 and work.sampled == len(first.ids) + len(second.ids)
        assert work.steps >= max(len(first.ids), len(second.ids))

    def test_nothing_compiles_after_warm_up(self, params):
        engine = make_engine(sampling=Sampling(temperature=1.3), resident=2, lanes=1, length=520)
        assert len(engine.lengths) == 4
        with CompileCounter() as counter:
            engine.load(params, 0)
            engine.warm_up()
            # As the class says: four lengths x five; the weights, creation and three growths.
            assert counter.count <= 4 * 5 + 5
            with counter.steady():
                for turn, size in enumerate((11, 260, 140)):
                    engine.reply([request(s, prompt(turn, size), turn, start=turn == 0) for s in (0, 2, 3)])
                assert engine.counts.parked
                engine.load(params, 1)
                engine.reply([request(1, prompt(3, 3), start=True)])


class TestWeights:
    def test_new_weights_drop_the_cache(self, engine, params):
        engine.reply([request(0, prompt(1, 5), start=True)])
        engine.load(params, version=0)
        engine.reply([request(0, prompt(2, 3), turn=1)])  # the same weights: it goes on
        engine.submit(request(0, prompt(4, 2), turn=2))
        with pytest.raises(RuntimeError, match="under way"):
            engine.load(params, version=1)
        engine.reset()
        engine.load(params, version=1)
        with pytest.raises(StaleSlot, match="slot 0 holds no dialogue of weights version 1"):
            engine.reply([request(0, prompt(3, 3), turn=2)])

    def test_no_weights(self):
        with pytest.raises(RuntimeError, match="load"):
            make_engine().submit(request(0, [7], start=True))


class TestBadInput:
    @pytest.mark.parametrize(
        "options,words",
        [
            (dict(stop_ids=(2, TOKENS)), "stop id 53 is outside the vocabulary of 53"),
            (dict(stop_ids=(-1,)), "stop id -1"),
            (dict(vocabulary_size=62), "62 tokens does not fit the model's 61"),
            (dict(length=641), "641 tokens exceed the model's 640"),
            (dict(max_reply_tokens=64), "no room for a prompt"),
            (dict(slots=0), "`slots` is 0"),
            (dict(chunk=0), "`chunk` is 0"),
            (dict(lanes=5), "5 lanes are more than the 4 resident"),
            (dict(resident=5), "5 resident are more than the 4 slots"),
            (dict(lanes=3, resident=2), "3 lanes are more than the 2 resident"),
            (dict(slots=10**9), r"1000000000 dialogues of 64 tokens need .* GiB"),
        ],
    )
    def test_engine(self, options, words):
        with pytest.raises(UserError, match=words):
            make_engine(**options)

    def test_requests(self, engine):
        with pytest.raises(UserError, match=r"prompt of 64 tokens leaves no room.*cache of 64"):
            engine.reply([request(0, prompt(1, 64), start=True)])
        with pytest.raises(ValueError, match="two requests"):
            engine.reply([request(0, [7], start=True), request(0, [8], start=True)])
        with pytest.raises(ValueError, match="token id 61"):
            engine.reply([request(1, [7], start=True), request(0, [61], start=True)])
        assert not engine.busy  # the first one was not begun either
        with pytest.raises(ValueError, match="slot 4 is none of the engine's 4"):
            engine.reply([request(4, [7], start=True)])
        with pytest.raises(ValueError, match="at least one"):
            engine.reply([request(0, [], start=True)])
        with pytest.raises(ValueError, match="at most 0"):
            engine.reply([request(0, [7], start=True, limit=0)])
        engine.submit(request(0, [7], start=True))
        with pytest.raises(ValueError, match="under way"):
            engine.submit(request(0, [7], start=True))


def test_cache_lengths():
    assert cache_lengths(640) == (256, 384, 512, 640)
    assert cache_lengths(2000) == (256, 384, 512, 768, 1024, 1536, 2048)
    assert cache_lengths(25_600) == (1600, 3200, 6400, 12_800, 25_600)
    assert cache_lengths(25_000) == (1600, 3136, 6272, 12_544, 25_024)
    assert cache_lengths(513) == (256, 384, 512, 576)
    assert cache_lengths(512) == (512,)
    assert cache_lengths(150) == (192,)
    assert cache_lengths(64) == (64,)


def test_cache_bytes():
    # 2 layers x keys and values x 2 heads of 6 numbers of 4 bytes
    assert cache_bytes(CONFIG, resident=4, lanes=4, length=64, dtype="float32") == 2 * 2 * 2 * 6 * 4 * 64 * 4
    assert cache_bytes(CONFIG, resident=4, lanes=2, length=64, dtype="bfloat16") == 2 * 2 * 2 * 6 * 2 * 64 * 6
    # 6 numbers of a byte and a scale of 4
    assert cache_bytes(CONFIG, resident=4, lanes=4, length=64, dtype="int8") == 2 * 2 * 2 * (6 + 4) * 4 * 64


@pytest.mark.parametrize("sizes", [{}, dict(slots=6, resident=4, lanes=2)])
def test_caches_in_8_bits_change_little_and_the_same_everywhere(params, sizes):
    """Copied to lanes, parked and restored they stay as they are; the whole row's model says the same within
    what rounding to 1/127 costs here."""
    engine = make_engine(cache_dtype="int8", sampling=Sampling(temperature=TEMPERATURE), **sizes)
    engine.load(params, 0)
    slots, replies = engine.slots, []
    for turn in range(3):
        replies.append(engine.reply([
            request(s, prompt(10 * s + turn, 7), turn, start=turn == 0) for s in range(slots)
        ]))  # fmt: skip
    assert {array.dtype.name for array in jax.tree.leaves(engine._cache)} == {"int8", "float32"}
    alone = make_engine(cache_dtype="int8", sampling=Sampling(temperature=TEMPERATURE))
    alone.load(params, 0)
    for turn in range(3):
        again = alone.reply([request(s, prompt(10 * s + turn, 7), turn, start=turn == 0) for s in range(4)])
        for one, other in zip(again, replies[turn], strict=False):
            assert one.ids == other.ids
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    differences = []
    for slot in range(slots):
        row, scored = [], []
        for turn in range(3):
            row += prompt(10 * slot + turn, 7)
            scored += [(len(row) + i - 1, p) for i, p in enumerate(replies[turn][slot].logprobs)]
            row += replies[turn][slot].ids
        exact = whole_pass(params, row)
        differences += [abs(exact[at] - p) for at, p in scored]
    assert 1e-5 < np.mean(differences) < 0.05  # not exact, and near


def test_on_a_mesh_of_four_as_on_one_device():
    """Slots and lanes cut over the devices; every slot keeps to its own."""
    script = """
        import sys, jax, numpy as np
        sys.path.insert(0, sys.argv[1])
        import test_engine as tiny
        from mapo_jax.config import MeshConfig
        from mapo_jax.model.qwen import init_params, parameter_shapes
        from mapo_jax.model.sharding import make_mesh, param_shardings
        from mapo_jax.rollout.sampling import Sampling

        params = tiny.scaled(init_params(tiny.CONFIG, seed=3))
        mesh = make_mesh(MeshConfig(data=2, fsdp=2))
        found = []
        on_mesh = jax.device_put(params, param_shardings(parameter_shapes(tiny.CONFIG), mesh))
        for options, weights in (
            ({}, params), (dict(mesh=mesh), on_mesh), (dict(mesh=mesh, resident=4), on_mesh)
        ):
            engine = tiny.make_engine(
                sampling=Sampling(temperature=tiny.TEMPERATURE), slots=8, lanes=4, prefill_rows=4, **options
            )
            engine.load(weights, 0)
            replies = []
            for turn in range(3):
                # On each device two dialogues with one start, of which the second waits for a lane.
                sizes = [(5, 11, 9, 3)[s // 2] for s in range(8)]
                replies += engine.reply([
                    tiny.request(s, tiny.prompt(turn if turn else s // 2, sizes[s]), turn, start=turn == 0)
                    for s in range(8)
                ])
            found.append((replies, engine.counts))
            cache = engine._cache[0].keys
            assert len(cache.sharding.device_set) == (4 if options else 1)
        (alone, counts), (cut, cut_counts), (parked, parked_counts) = found
        assert counts.prefilled == cut_counts.prefilled and counts.sampled == cut_counts.sampled
        assert parked == cut and parked_counts.parked >= 8
        for one, other in zip(alone, cut, strict=True):
            assert one.ids == other.ids
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)  # programs of other widths
    """
    run_on_devices(script, 4, [Path(__file__).parent])


@pytest.mark.parametrize("in_place", [False, True])
def test_either_layout_of_the_keys_gives_the_same(params, in_place):
    """Accelerators' layout on the CPU: a prompt written to two of four rows, then decoded there."""
    model = dict(config=CONFIG, dtype=jnp.float32, mesh=None)
    places = np.array([0, 1, 2, 3] if in_place else [3, 1], np.int32)
    lanes = len(places)
    tokens = np.array([prompt(9 + lane, 5) for lane in range(lanes)], np.int32)
    found = []
    for by_feature in (False, True):
        cache = init_cache(CONFIG, 4, LENGTH, by_feature=by_feature)
        positions = np.tile(np.arange(4, dtype=np.int32), (lanes, 1))
        cache = prefill(params, cache, places, tokens[:, :4], positions, **model)
        words = np.tile(np.arange(4, dtype=np.uint32), (lanes, 1))
        cache, ids, logprobs, counts, _ = generate(
            params, cache, places, words, tokens[:, 4], *np.full((2, lanes), [[4], [6]], np.int32),
            **model, attention=cached_attention, in_place=in_place, stop_ids=(), vocabulary_size=TOKENS,
            sampling=Sampling(), block=6,
        )  # fmt: skip
        assert (counts == 6).all()
        everything = np.tile(np.arange(LENGTH), (4, 1))
        found.append((ids, logprobs, [entry.read(everything) for entry in cache]))
    (ids, logprobs, cached), (others, other_logprobs, other_cached) = found
    np.testing.assert_array_equal(ids, others)
    np.testing.assert_allclose(logprobs, other_logprobs, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cached, other_cached)
    assert all(np.any(keys[place, 9]) for keys, _ in cached for place in places)
    assert not any(
        np.any(keys[place]) for keys, _ in cached for place in set(range(4)) - set(places.tolist())
    )


def test_without_a_copy_of_the_weights_the_same_is_sampled_bit_for_bit(engine, params):
    requests = [request(slot, prompt(slot, 5 + slot), start=True) for slot in range(2)]
    copied = engine.reply(requests)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    bare = make_engine(sampling=Sampling(temperature=TEMPERATURE), mesh=mesh, copy_weights=False)
    bare.load(params, 0)
    assert bare._params is params and engine.copy_weights
    assert bare.reply(requests) == copied


class TestPerRequest:
    """An engine whose requests have distributions of their own, as serving needs it."""

    @pytest.fixture(scope="class")
    def mixed(self, params):
        engine = make_engine(per_request=True, lanes=3)
        engine.load(params, 0)
        return engine

    def test_each_reply_is_that_of_an_engine_with_its_distribution(self, mixed, params):
        """Three distributions in one block; each as if it had the engine to itself."""
        kinds = [
            Sampling(),
            Sampling(temperature=0),
            Sampling(temperature=1.3, top_k=5, repetition_penalty=1.5),
        ]
        own = [RequestSampling(**vars(kind)) for kind in kinds]
        mixed.reset()
        replies = mixed.reply(
            [
                request(s, prompt(40 + s, 9), start=True, sampling=own[s], alternatives=s == 0)
                for s in range(3)
            ]
        )
        for slot, (kind, reply) in enumerate(zip(kinds, replies, strict=True)):
            engine = make_engine(sampling=kind)
            engine.load(params, 0)
            (alone,) = engine.reply([request(slot, prompt(40 + slot, 9), start=True)])
            assert reply.ids == alone.ids and reply.truncated == alone.truncated
            np.testing.assert_allclose(reply.logprobs, alone.logprobs, atol=1e-5)

    def test_alternatives_are_of_the_model_itself(self, mixed, params):
        mixed.reset()
        sampling = RequestSampling(temperature=0.4, frequency_penalty=1.5)
        (reply,) = mixed.reply([request(0, prompt(44, 9), start=True, sampling=sampling, alternatives=True)])
        row = np.array(mixed.row(0))
        scores = _scores(params, np.pad(row, (0, LENGTH - len(row)))[None])[0, :, :TOKENS]
        expected = np.asarray(jax.nn.log_softmax(scores, axis=-1))
        for place, found in zip(range(9, len(row)), reply.alternatives, strict=True):
            assert found.logprob == pytest.approx(expected[place - 1, row[place]], abs=1e-4)
            assert list(found.ids) == np.argsort(-expected[place - 1], kind="stable")[:20].tolist()
            np.testing.assert_allclose(found.logprobs, np.sort(expected[place - 1])[::-1][:20], atol=1e-4)

    def test_a_frequency_penalty_of_two_ends_repetition(self, mixed):
        def most(penalty):
            mixed.reset()
            sampling = RequestSampling(temperature=0, frequency_penalty=penalty, presence_penalty=penalty)
            (reply,) = mixed.reply([request(0, prompt(45, 5), start=True, sampling=sampling)])
            return max(reply.ids.count(i) for i in reply.ids)

        assert most(-2.0) > most(2.0)

    def test_parts_of_a_reply_make_the_whole(self, mixed):
        mixed.reset()
        mixed.submit(request(1, prompt(46, 7), start=True, alternatives=True))
        assert mixed.sampled(1) is None
        ids, parts = [], 0
        while True:
            finished = mixed.advance()
            if 1 in finished:
                break
            part = mixed.sampled(1, len(ids))
            ids, parts = ids + list(part.ids), parts + 1
            assert len(part.alternatives) == len(part.ids)
        assert parts >= 2 and tuple(ids) == finished[1].ids[: len(ids)]

    def test_a_cancelled_reply_frees_its_slot_and_keeps_its_row(self, mixed):
        mixed.reset()
        (whole,) = mixed.reply([request(0, prompt(47, 7), dialogue=3, start=True)])
        mixed.reset()
        for slot in range(2):
            mixed.submit(request(slot, prompt(47 + slot, 7), dialogue=3, start=True))
        mixed.cancel(1)  # before it has a place
        mixed.advance()
        mixed.cancel(0)
        assert not mixed.busy and mixed.advance() == {}
        row = mixed.row(0)
        assert len(row) == 7 + 3 and row[7:] == whole.ids[:3]
        mixed.cancel(0)  # nothing to cancel
        # The row goes on from where it was cut; the tokens' keys are those of their places.
        new = [*row, *whole.ids[3:4]]
        assert mixed.continued(range(4), new) == 0
        (rest,) = mixed.reply([request(0, new[len(row) :], dialogue=3)])
        assert rest.ids[: len(whole.ids) - 4] == whole.ids[4:]

    def test_the_longest_row_that_starts_the_new_one_is_continued(self, mixed):
        mixed.reset()
        start = prompt(49, 6)
        mixed.reply([request(0, start, start=True), request(1, [*start, 7, 8, 9], start=True, limit=2)])
        row = list(mixed.row(1))
        assert mixed.continued([0, 1, 2], [*row, 9]) == 1
        assert mixed.continued([0, 2], [*mixed.row(0), 9]) == 0
        assert mixed.continued([0, 1, 2], row) is None  # nothing would be new
        assert mixed.continued([2], [*row, 9]) is None

    def test_only_where_the_engine_is_made_for_it(self, engine):
        with pytest.raises(ValueError, match="per_request"):
            engine.submit(request(0, [7], start=True, sampling=RequestSampling()))
