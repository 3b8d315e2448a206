"""The engine against transformers' generate, against one whole forward pass, and against itself.

The shape is tiny and nothing in it is a default: 2 layers, 4/2 heads of 6 on a width of 20, 61 embedding rows
of which 53 are tokens. A cache of 64 tokens grows through 32; rows cross that boundary on purpose.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mapo_jax.config import MeshConfig
from mapo_jax.errors import UserError
from mapo_jax.model.head import token_logprobs
from mapo_jax.model.huggingface import save_params, write_config
from mapo_jax.model.qwen import QwenConfig, hidden_states, init_params
from mapo_jax.model.sharding import make_mesh
from mapo_jax.rollout.engine import Engine, Request, StaleSlot, cache_lengths
from mapo_jax.training.metrics import CompileCounter

CONFIG = QwenConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=28,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=5e6,
    max_position_embeddings=64,
)
TOKENS, STOPS, LENGTH, LIMIT, TEMPERATURE = 53, (2, 5), 64, 8, 0.8


@pytest.fixture(scope="module")
def params():
    """Weights large enough for distributions with a shape; 0.02 would make every token as good as any."""
    return jax.tree.map(lambda leaf: 12 * leaf if leaf.std() > 0 else leaf, init_params(CONFIG, seed=3))


def make_engine(**options):
    settings = dict(
        slots=4, length=LENGTH, max_reply_tokens=LIMIT, stop_ids=STOPS, vocabulary_size=TOKENS, chunk=8
    )
    return Engine(CONFIG, **(settings | options))


@pytest.fixture(scope="module")
def shared_engine():
    return make_engine(temperature=TEMPERATURE, mesh=make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))


@pytest.fixture
def engine(shared_engine, params):
    shared_engine.reset()
    shared_engine.load(params, version=0)
    return shared_engine


def prompt(seed, size):
    return [int(i) for i in np.random.default_rng(seed).integers(6, TOKENS, size)]


def request(slot, ids, turn=0, dialogue=None, **options):
    return Request(slot, ids, key=(11, 4, slot if dialogue is None else dialogue), turn=turn, **options)


def whole_pass(params, row):
    """Log-probability of each token of a row but the first, given those before it, by one forward pass."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(_whole_pass(params, padded))[0, : len(row) - 1]


@jax.jit
def _whole_pass(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    hidden = hidden_states(params, CONFIG, tokens, positions)
    targets = jnp.roll(tokens, -1, axis=1)
    return token_logprobs(
        params, CONFIG, hidden, targets, temperature=TEMPERATURE, vocabulary_size=TOKENS, chunk=64
    )[0]


class TestAgreement:
    def test_greedy_equals_transformers(self, params, tmp_path):
        """Three turns, ragged prompts, across the cache's growth; transformers starts over at each turn."""
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

        engine = make_engine(temperature=0)
        engine.load(weights, version=0)
        rows = {slot: [] for slot in (0, 1, 3)}
        lengths = [(5, 17, 9), (3, 12, 1), (7, 1, 13)]
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
                    eos_token_id=list(STOPS),
                    pad_token_id=0,
                    bad_words_ids=forbidden,
                )[0, len(rows[slot]) :]
                assert list(reply.ids) == expected.tolist()
                rows[slot] += reply.ids
        assert max(map(len, rows.values())) > cache_lengths(LENGTH)[0]

    def test_logprobs_equal_one_forward_pass(self, engine, params):
        """Turn by turn, with a shared start that was copied, across the cache's growth."""
        start = prompt(0, 11)
        engine.prefill({0: start[:-1], 3: prompt(1, 5)[:-1]})
        engine.copy_prefix({0: [1, 2]})
        sampled = {slot: {} for slot in range(4)}
        for turn in range(4):
            first = {0: start[-1:], 1: start[-1:], 2: start[-1:], 3: prompt(1, 5)[-1:]}
            ids = first if turn == 0 else {s: prompt(100 * turn + s, 2 + 2 * s) for s in range(4)}
            for slot, reply in enumerate(engine.reply([request(s, ids[s], turn) for s in range(4)])):
                end = len(engine.row(slot))
                sampled[slot] |= dict(
                    zip(
                        range(end - len(reply.ids), end),
                        zip(reply.ids, reply.logprobs, strict=True),
                        strict=True,
                    )
                )
        assert max(len(engine.row(slot)) for slot in range(4)) > cache_lengths(LENGTH)[0]
        for slot in range(4):
            row = engine.row(slot)
            logprobs = whole_pass(params, row)
            assert all(row[place] == token for place, (token, _) in sampled[slot].items())
            places = np.array(list(sampled[slot]))
            # The project's tolerance for float32; sums over 64 entries in another order differ by ~1e-6.
            np.testing.assert_allclose(
                [logprob for _, logprob in sampled[slot].values()], logprobs[places - 1], atol=1e-4
            )

    def test_copied_prefix_equals_own_prefill(self, engine):
        start = prompt(5, 13)
        engine.prefill({2: start[:-1]})
        engine.copy_prefix({2: [0]})
        copied, _ = engine.reply([request(0, start[-1:], dialogue=9), request(2, start[-1:], dialogue=8)])
        assert engine.row(0)[:13] == tuple(start)
        engine.reset()
        (own,) = engine.reply([request(0, start, dialogue=9, start=True)])
        assert own.ids == copied.ids
        np.testing.assert_allclose(own.logprobs, copied.logprobs, atol=1e-6)  # chunks cut elsewhere


class TestIdentity:
    def test_same_tokens_in_any_slot_beside_anyone(self, engine):
        one, other = prompt(6, 7), prompt(7, 10)
        together = engine.reply(
            [request(0, one, dialogue=1, start=True), request(1, other, dialogue=2, start=True)]
        )
        engine.reset()
        (alone,) = engine.reply([request(3, other, dialogue=2, start=True)])
        assert alone.ids == together[1].ids
        engine.reset()
        again = engine.reply(
            [request(0, one, dialogue=1, start=True), request(1, other, dialogue=2, start=True)]
        )
        assert again == together  # bit for bit, log-probabilities too

    def test_key(self, engine):
        """Another seed, step, dialogue or turn gives another reply."""
        ids = prompt(8, 6)
        keys = [((11, 4, 0), 0), ((12, 4, 0), 0), ((11, 5, 0), 0), ((11, 4, 1), 0), ((11, 4, 0), 1)]
        replies = set()
        for key, turn in keys:
            replies.add(engine.reply([Request(0, ids, key, turn, start=True)])[0].ids)
        assert len(replies) == len(keys)

    def test_blocks(self, engine, params):
        """The host may look every few steps; nothing changes."""
        short = make_engine(temperature=TEMPERATURE, block=3)
        short.load(params, 0)
        requests = [request(s, prompt(20 + s, 4 + s), start=True) for s in range(4)]
        for one, other in zip(engine.reply(requests), short.reply(requests), strict=True):
            assert one.ids == other.ids
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)


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
        before = engine.counts.prefilled
        engine.reply([request(0, prompt(1, 12), start=True)])
        assert engine.counts.prefilled - before == 11  # the last one is the first input of generate
        engine.reply([request(0, prompt(2, 6), turn=1)])
        assert engine.counts.prefilled - before == 11 + 6  # the reply's last token and five of the six

    def test_nothing_compiles_after_warm_up(self, params):
        engine = make_engine(temperature=1.3)
        engine.load(params, 0)
        with CompileCounter() as counter:
            engine.warm_up()
            assert counter.count <= 2 * 5 + 1  # as the class says: two lengths x five programs, and growth
            with counter.steady():
                engine.prefill({0: prompt(1, 9)})
                engine.copy_prefix({0: [2]})
                for turn in range(3):
                    engine.reply([request(s, prompt(turn, 11), turn) for s in (0, 2)])
                engine.load(params, 1)
                engine.reply([request(1, prompt(3, 3), start=True)])


class TestWeights:
    def test_new_weights_drop_the_cache(self, engine, params):
        engine.reply([request(0, prompt(1, 5), start=True)])
        engine.load(params, version=0)
        engine.reply([request(0, prompt(2, 3), turn=1)])  # the same weights: it goes on
        engine.load(params, version=1)
        with pytest.raises(StaleSlot, match="slot 0 holds no dialogue of weights version 1"):
            engine.reply([request(0, prompt(3, 3), turn=2)])
        with pytest.raises(StaleSlot):
            engine.copy_prefix({0: [1]})

    def test_no_weights(self):
        with pytest.raises(RuntimeError, match="load"):
            make_engine().reply([])


class TestBadInput:
    @pytest.mark.parametrize(
        "options,words",
        [
            (dict(stop_ids=(2, TOKENS)), "stop id 53 is outside the vocabulary of 53"),
            (dict(stop_ids=(-1,)), "stop id -1"),
            (dict(vocabulary_size=62), "62 tokens does not fit the model's 61"),
            (dict(length=65), "65 tokens exceed the model's 64"),
            (dict(max_reply_tokens=64), "no room for a prompt"),
            (dict(slots=0), "`slots` is 0"),
            (dict(chunk=0), "`chunk` is 0"),
            (dict(temperature=-1), "temperature"),
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
            engine.reply([request(0, [61], start=True)])
        with pytest.raises(ValueError, match="at least one"):
            engine.reply([request(0, [], start=True)])


def test_cache_lengths():
    assert cache_lengths(640) == (320, 640)
    assert cache_lengths(64) == (32, 64)
    assert cache_lengths(20) == (20,)
    assert cache_lengths(100) == (64, 100)
