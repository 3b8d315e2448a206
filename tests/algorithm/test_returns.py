import jax
import numpy as np
import pytest

from mapo_jax.algorithm.returns import discounted_returns

NAN = float("nan")
VALID = np.array([[[1, 1, 1], [1, 1, 0]]], bool)


def test_returns_by_hand():
    rewards = np.array([[[1.0, 2.0, 4.0], [3.0, -8.0, NAN]]])
    # 4; 2 + 4/2; 1 + 4/2 and -8; 3 - 8/2
    expected = [[[3.0, 4.0, 4.0], [-1.0, -8.0, 0.0]]]
    np.testing.assert_array_equal(discounted_returns(rewards, VALID, 0.5), expected)


def test_a_discount_of_zero_keeps_the_rewards_and_one_sums_them():
    rewards = np.array([[[1.0, 2.0, 4.0], [3.0, -8.0, 5.0]]])
    np.testing.assert_array_equal(discounted_returns(rewards, VALID, 0.0), [[[1, 2, 4], [3, -8, 0]]])
    np.testing.assert_array_equal(discounted_returns(rewards, VALID, 1.0), [[[7, 6, 4], [-5, -8, 0]]])


def test_returns_against_the_sum_of_the_definition():
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=(2, 3, 5)), rng.integers(0, 6, (2, 3))
    valid = np.arange(5) < lengths[..., None]
    expected = np.zeros((2, 3, 5))
    for s, r, t in np.ndindex(2, 3, 5):
        if valid[s, r, t]:
            expected[s, r, t] = sum(0.85 ** (k - t) * rewards[s, r, k] for k in range(t, lengths[s, r]))
    np.testing.assert_allclose(discounted_returns(rewards, valid, 0.85), expected, atol=1e-5)


def test_credit_crosses_turns_with_one_discount_each():
    """d G_t / d r_k = gamma^(k-t) for k >= t, 0 for what lies before: no cut where the user speaks."""
    slopes = jax.jacobian(lambda rewards: discounted_returns(rewards, np.ones((1, 1, 3), bool), 0.85))(
        np.zeros((1, 1, 3), np.float32)
    )[0, 0, :, 0, 0, :]
    expected = [[1, 0.85, 0.85**2], [0, 1, 0.85], [0, 0, 1]]
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)


def test_what_stands_outside_the_mask_influences_neither_values_nor_gradients():
    def total(rewards):
        return discounted_returns(rewards, VALID, 0.5).sum()

    clean = np.array([[[1.0, 2.0, 4.0], [3.0, -8.0, 0.0]]])
    dirty = np.where(VALID, clean, NAN)
    assert total(dirty) == total(clean)
    np.testing.assert_array_equal(jax.grad(total)(dirty), [[[1.0, 1.5, 1.75], [1.0, 1.5, 0.0]]])


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match="boolean"):
        discounted_returns(np.zeros((1, 2, 3)), VALID.astype(np.float32), 0.5)
