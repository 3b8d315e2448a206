import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mapo_jax.errors import UserError
from mapo_jax.model import head
from mapo_jax.model.qwen import (
    RUNNING_SUM,
    SUMS_IN_PLACE,
    QwenConfig,
    extend,
    hidden_states,
    init_cache,
    init_params,
    parameter_count,
)

LENGTH = 23
CACHE = 32


@pytest.fixture(scope="module")
def row(qwen3):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, qwen3.vocab_size, (2, LENGTH))
    return jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))


@pytest.fixture(scope="module")
def whole(qwen3, qwen3_params, row):
    return hidden_states(qwen3_params, qwen3, *row)


# The two paths run the same block; they differ in the order of float32 sums only.
SAME = 1e-5


@pytest.mark.parametrize("by_feature", [False, True])
def test_ragged_chunks_and_single_steps_equal_the_whole_row(qwen3, qwen3_params, row, whole, by_feature):
    """Two rows that advance at different paces: chunks of 8 with dropped padding, and single tokens."""
    tokens, positions = row
    step = jax.jit(extend, static_argnums=1, donate_argnums=4)
    cache = init_cache(qwen3, 2, CACHE, by_feature=by_feature)
    # Whatever lies in an unwritten entry must not matter.
    cache = jax.tree.map(lambda array: array + 7.0, cache)
    done = np.zeros(2, int)
    found = np.zeros(whole.shape, np.float32)
    for counts in ((8, 5), (3, 8), (1, 1), (0, 1), (1, 1), (6, 0), (4, 7)):
        width = 8 if max(counts) > 1 else 1
        chunk_tokens = np.full((2, width), 99)
        chunk_positions = np.full((2, width), CACHE)  # padding: beyond the cache
        for slot, count in enumerate(counts):
            here = slice(done[slot], done[slot] + count)
            chunk_tokens[slot, :count] = tokens[slot, here]
            chunk_positions[slot, :count] = positions[slot, here]
        hidden, cache = step(qwen3_params, qwen3, chunk_tokens, chunk_positions, cache)
        assert np.isfinite(hidden).all()
        for slot, count in enumerate(counts):
            found[slot, done[slot] : done[slot] + count] = hidden[slot, :count]
        done += counts
    assert list(done) == [LENGTH, LENGTH]
    np.testing.assert_allclose(found, whole, atol=SAME)


def test_a_chunk_within_a_row_of_padding_leaves_the_cache_alone(qwen3, qwen3_params, row):
    for by_feature in (False, True):
        cache = jax.tree.map(lambda array: array + 7.0, init_cache(qwen3, 2, CACHE, by_feature=by_feature))
        _, after = extend(qwen3_params, qwen3, row[0], jnp.full((2, LENGTH), CACHE + 5), cache)
        jax.tree.map(np.testing.assert_array_equal, cache, after)


def test_later_tokens_and_padding_change_nothing(qwen3, qwen3_params, row, whole):
    tokens, positions = row
    changed = hidden_states(qwen3_params, qwen3, tokens.at[:, 15:].set(0), positions.at[:, 15:].set(0))
    np.testing.assert_allclose(changed[:, :15], whole[:, :15], atol=SAME)


def test_packed_segments_equal_separate_rows(qwen3, qwen3_params, row):
    tokens, _ = row
    cut = 9
    positions = jnp.concatenate([jnp.arange(cut), jnp.arange(LENGTH - cut)])
    positions = jnp.broadcast_to(positions, (2, LENGTH))
    segments = jnp.broadcast_to(jnp.arange(LENGTH) >= cut, (2, LENGTH)).astype(jnp.int32)
    packed = hidden_states(qwen3_params, qwen3, tokens, positions, segments)
    alone = hidden_states(qwen3_params, qwen3, tokens[:, cut:], positions[:, cut:])
    np.testing.assert_allclose(packed[:, cut:], alone, atol=SAME)


@pytest.mark.parametrize("remat", ["minimal", "block", "offload"])
def test_remat_changes_no_gradient(remat, qwen3, qwen3_params, row):
    def loss(params, remat):
        return jnp.sum(jnp.sin(hidden_states(params, qwen3, *row, remat=remat)))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    jax.tree.map(
        # recomputed values are the same numbers up to fusion
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4),
        gradient(qwen3_params, "none"),
        gradient(qwen3_params, remat),
    )


@pytest.mark.parametrize("remat", SUMS_IN_PLACE)
def test_the_gradient_by_a_running_sum_is_the_new_sum(remat, qwen3, qwen3_params, row):
    def loss(params, remat):
        return jnp.sum(jnp.sin(hidden_states(params, qwen3, *row, remat=remat)))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(qwen3_params, "none")
    earlier = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), plain["layers"])
    summed = gradient(qwen3_params | {RUNNING_SUM: earlier}, remat)
    expected = jax.tree.map(jnp.add, earlier, plain["layers"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)  # as above
    jax.tree.map(close, summed.pop(RUNNING_SUM), expected)
    assert not any(leaf.any() for leaf in jax.tree.leaves(summed.pop("layers")))
    jax.tree.map(close, summed, {name: leaf for name, leaf in plain.items() if name != "layers"})
    with pytest.raises(ValueError, match="for a running sum, one of block, offload"):
        gradient(qwen3_params | {RUNNING_SUM: earlier}, "minimal")


def test_bfloat16_is_near_float32_and_keeps_logits_in_float32(qwen3, qwen3_params, row, whole):
    hidden = hidden_states(qwen3_params, qwen3, *row, dtype=jnp.bfloat16)
    assert hidden.dtype == jnp.bfloat16
    # bfloat16 has 8 bits: 3 layers of relative errors of 2^-9, on values of order 1
    difference = np.abs(np.asarray(hidden, np.float32) - whole)
    assert difference.mean() < 0.03
    assert head.logits(qwen3_params, qwen3, hidden).dtype == jnp.float32

    cache = init_cache(qwen3, 2, CACHE, jnp.bfloat16)
    extended, cache = extend(qwen3_params, qwen3, *row, cache, dtype=jnp.bfloat16)
    assert cache[0].keys.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(extended, np.float32), np.asarray(hidden, np.float32), atol=0.15)


def test_fresh_weights(qwen3):
    params = init_params(qwen3, 3)
    kernel = np.asarray(params["layers"]["mlp"]["gate"]["kernel"])
    assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert not np.allclose(kernel[0], kernel[1])  # each layer has its own draw
    assert (np.asarray(params["norm"]["scale"]) == 1).all()
    again, other = init_params(qwen3, 3), init_params(qwen3, 4)
    np.testing.assert_array_equal(again["embed"]["embedding"], params["embed"]["embedding"])
    assert not np.allclose(other["embed"]["embedding"], params["embed"]["embedding"])


def test_parameter_counts_of_the_published_models(shared_data):
    """Against the counts of the published checkpoints; from shapes alone, nothing is allocated."""
    published = json.loads((shared_data / "qwen_configs.json").read_text())
    dense = {name: entry for name, entry in published.items() if name[0] != "_" and "experts" not in entry}
    assert len(dense) >= 10
    for name, entry in dense.items():
        family = "qwen2" if name.startswith("Qwen2.5") else "qwen3"
        config = QwenConfig(
            vocab_size=entry["vocab"],
            hidden_size=entry["hidden"],
            intermediate_size=entry["ff"],
            num_layers=entry["layers"],
            num_heads=entry["q"],
            num_kv_heads=entry["kv"],
            head_dim=entry["head_dim"],
            tie_word_embeddings=entry["tie"],
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            family=family,
        )
        assert parameter_count(config) == entry["params"], name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 21}, "head_dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"family": "qwen2"}, "family"),
        ({"qkv_bias": True}, "qkv_bias"),
    ],
)
def test_impossible_shapes_are_refused(qwen3, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(qwen3, **change)
