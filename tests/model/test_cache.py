"""The cache's two layouts hold the same, and drop the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mapo_jax.model.attention import cached_attention
from mapo_jax.model.cache import LayerCache

ROWS, GROUPS, LENGTH, SIZE = 3, 2, 12, 4


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def empty(by_feature, dtype=jnp.float32):
    values = jnp.zeros((ROWS, GROUPS, LENGTH, SIZE), dtype)
    scales = [jnp.zeros(values.shape[:-1])] * 2 if dtype == jnp.int8 else []
    return LayerCache(values.swapaxes(2, 3) if by_feature else values, values, by_feature, *scales)


@pytest.mark.parametrize("by_feature", [False, True])
def test_what_is_written_is_read_and_nothing_else_is_touched(by_feature):
    entry = empty(by_feature)
    rows = jnp.array([2, 0, ROWS])  # the last one is no row
    positions = jnp.array([[3, 4], [LENGTH, 7], [1, 2]])  # LENGTH is beyond the room
    keys, values = numbers(3, 2, GROUPS, SIZE), numbers(3, 2, GROUPS, SIZE) + 1
    written = entry.write(rows, positions, keys, values).grown(LENGTH + 4)
    assert written.length == LENGTH + 4
    expected_keys, expected_values = np.zeros((2, ROWS, GROUPS, LENGTH + 4, SIZE), np.float32)
    for line, token, row, position in ((0, 0, 2, 3), (0, 1, 2, 4), (1, 1, 0, 7)):
        expected_keys[row, :, position] = keys[line, token]
        expected_values[row, :, position] = values[line, token]
    laid = written.keys.swapaxes(2, 3) if by_feature else written.keys
    np.testing.assert_array_equal(laid, expected_keys)
    np.testing.assert_array_equal(written.values, expected_values)
    for array, expected in zip(
        written.read(jnp.array([[7], [0], [4]])), (expected_keys, expected_values), strict=True
    ):
        np.testing.assert_array_equal(array[:, 0], expected[[0, 1, 2], :, [7, 0, 4]])


@pytest.mark.parametrize("by_feature", [False, True])
def test_in_8_bits_every_number_is_a_multiple_of_its_token_and_heads_scale(by_feature):
    """Largest magnitude / 127 by hand; also of zeros; moved to another row it is not rounded again."""
    keys = numbers(1, 2, GROUPS, SIZE) * 1e3
    values = numbers(1, 2, GROUPS, SIZE).at[0, 0, 0].set(0.0)
    positions = jnp.array([[3, LENGTH - 1]])
    entry = empty(by_feature, jnp.int8).write(jnp.array([1]), positions, keys, values).grown(LENGTH + 2)
    *stored, key_scales, value_scales = entry.read(jnp.tile(positions, (ROWS, 1)))
    for array, scales, given in zip(stored, (key_scales, value_scales), (keys[0], values[0]), strict=True):
        given = np.asarray(given, np.float64)
        expected = np.abs(given).max(axis=-1) / 127
        np.testing.assert_allclose(scales[1], expected, rtol=1e-6)
        assert array.dtype == jnp.int8 and not np.any(array[0]) and not np.any(scales[2])
        multiples = np.asarray(array[1], np.float64) * expected[..., None]
        assert np.all(abs(multiples - given) <= expected[..., None] * 0.5001)
    moved = entry.put(
        jnp.array([2]), positions, *(array[1:2] for array in (*stored, key_scales, value_scales))
    )
    for array in jax.tree.leaves(moved):
        np.testing.assert_array_equal(array[2], array[1])


@pytest.mark.parametrize("by_feature", [False, True])
def test_attention_over_8_bits_is_that_over_the_rounded_numbers(by_feature):
    query, positions = numbers(ROWS, 2, 2 * GROUPS, SIZE), jnp.array([[4, 5], [0, 1], [10, 11]])
    everywhere = jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
    entry = empty(by_feature, jnp.int8).write(
        jnp.arange(ROWS),
        everywhere,
        3 * numbers(ROWS, LENGTH, GROUPS, SIZE),
        numbers(ROWS, LENGTH, GROUPS, SIZE),
    )
    keys, values, key_scales, value_scales = entry.read(everywhere)
    rounded = empty(by_feature).write(
        jnp.arange(ROWS), everywhere, keys * key_scales[..., None], values * value_scales[..., None]
    )
    found, expected = (cached_attention(query, cache, positions) for cache in (entry, rounded))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("by_feature", [False, True])
@pytest.mark.parametrize("length", [LENGTH, 3 * LENGTH])
def test_attention_is_that_of_a_plain_loop_whatever_the_length(by_feature, length):
    query = numbers(ROWS, 2, 2 * GROUPS, SIZE)
    positions = jnp.array([[4, 5], [0, 1], [10, 11]])
    entry = empty(by_feature)
    everywhere = jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
    keys, values = numbers(ROWS, LENGTH, GROUPS, SIZE), numbers(ROWS, LENGTH, GROUPS, SIZE) - 2
    entry = entry.write(jnp.arange(ROWS), everywhere, keys, values).grown(length)
    found = jax.jit(cached_attention)(query, entry, positions)
    for row in range(ROWS):
        for token in range(2):
            for head in range(2 * GROUPS):
                seen = slice(0, int(positions[row, token]) + 1)
                scores = np.asarray(keys[row, seen, head // 2]) @ np.asarray(query[row, token, head]) / 2
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ np.asarray(values[row, seen, head // 2])
                np.testing.assert_allclose(found[row, token, head], expected, atol=1e-5)
