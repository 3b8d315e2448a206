import jax
import jax.numpy as jnp
import numpy as np

from mapo_jax.model import attention


def naive(query, key, value, allowed):
    """The definition, head by head, in float64 numpy."""
    heads, groups = query.shape[2], key.shape[2]
    output = np.zeros_like(query, dtype=np.float64)
    for row in range(query.shape[0]):
        for head in range(heads):
            group = head // (heads // groups)
            scores = query[row, :, head].astype(np.float64) @ key[row, :, group].T / np.sqrt(query.shape[-1])
            scores = np.where(allowed[row], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            output[row, :, head] = weights / weights.sum(-1, keepdims=True) @ value[row, :, group]
    return output


def draw(length, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, length, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]


def test_causal_attention_is_the_definition_across_query_blocks():
    length = attention.MIN_QUERY_BLOCK + 17  # two blocks, the second one shorter
    query, key, value = draw(length)
    allowed = np.broadcast_to(np.tril(np.ones((length, length), bool)), (2, length, length))
    found = jax.jit(attention.causal_attention)(query, key, value)
    # float32 sums of up to 145 terms of order 1
    np.testing.assert_allclose(found, naive(query, key, value, allowed), atol=1e-5)


def test_segments_keep_texts_of_a_row_apart():
    query, key, value = draw(9)
    segments = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 5, 5, 5, 5]])
    allowed = np.tril(np.ones((9, 9), bool)) & (segments[:, :, None] == segments[:, None, :])
    found = attention.causal_attention(query, key, value, jnp.asarray(segments))
    np.testing.assert_allclose(found, naive(query, key, value, allowed), atol=1e-5)


def test_rotation_turns_pairs_by_position_over_theta():
    # By hand: head size 4, theta 100, position 3. Pair 0 is (x0, x2), turned by 3; pair 1 (x1, x3) by 3 / 10.
    x = np.array([1.0, 2.0, 3.0, 4.0], np.float32).reshape(1, 1, 1, 4)
    found = attention.rotate(jnp.asarray(x), attention.rotary_angles(jnp.array([[3]]), 4, 100.0))
    expected = [
        1 * np.cos(3) - 3 * np.sin(3),
        2 * np.cos(0.3) - 4 * np.sin(0.3),
        3 * np.cos(3) + 1 * np.sin(3),
        4 * np.cos(0.3) + 2 * np.sin(0.3),
    ]
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-5)
