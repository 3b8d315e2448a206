"""Numbers are worked out by hand from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mapo_jax.algorithm import rewards

NAN = float("nan")
# One rollout of two turns: A from -5 to -2, then past the origin; P rests; C from -4 to -4 to -1.
POSITIONS = np.array([[[[-4.0, -5.0, 0.0], [-4.0, -2.0, 0.0], [-1.0, 3.0, 0.0]]]])
DISTANCES = [5.0, 10**0.5, 0.0]  # sqrt(3^2 + 4^2), sqrt(3^2 + 1^2), nothing lacking


def test_distance_by_hand():
    np.testing.assert_allclose(rewards.distance(POSITIONS)[0, 0], DISTANCES, rtol=1e-6)


@pytest.mark.parametrize("name", rewards.REWARDS)
def test_jax_and_numpy_compute_the_same(name):
    """JAX arrays stay JAX arrays in float32; anything else is computed with numpy in float64."""
    points = np.random.default_rng(0).uniform(-27, 5, (5, 4, 3)).astype(np.float32)
    on_host, on_device = rewards.REWARDS[name](points), rewards.REWARDS[name](jnp.asarray(points))
    assert isinstance(on_host, np.ndarray) and on_host.dtype == np.float64
    assert isinstance(on_device, jax.Array) and on_device.dtype == np.float32
    # float32 rounding of values up to about 50.
    np.testing.assert_allclose(on_device, on_host, rtol=1e-5, atol=1e-5)


def test_rewards_by_hand():
    expected = {
        "incremental": [5 - 10**0.5, 10**0.5],
        "absolute": [-(10**0.5), 0.0],
        "sum": [3.0, 3 + 5],
        # |P| = sqrt 41, sqrt 20, sqrt 10; Phi = 9/(9 + |P|)
        "potential": [
            0.99 * 9 / (9 + 20**0.5) - 9 / (9 + 41**0.5),
            0.99 * 9 / (9 + 10**0.5) - 9 / (9 + 20**0.5),
        ],
    }
    assert rewards.REWARDS.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(rewards.REWARDS[name](POSITIONS)[0, 0], values, rtol=1e-5, err_msg=name)


def test_incremental_rewards_add_up_to_the_way_made():
    distances = np.random.default_rng(1).uniform(0, 30, (2, 3, 5))
    total = rewards.incremental(distances).sum(-1)
    np.testing.assert_allclose(total, distances[..., 0] - distances[..., -1], rtol=1e-4, atol=1e-5)


def test_positions_without_three_axes_are_refused():
    with pytest.raises(ValueError, match="axes C, A, P"):
        rewards.distance(np.zeros((2, 3, 4)))


def test_imputation_by_hand():
    values = np.array([[[4.0, NAN, 1.0, NAN], [NAN, NAN, 7.0, 9.0], [NAN, NAN, NAN, NAN]]])
    valid = np.array([[[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]], bool)
    scored = np.array([[[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]], bool)
    expected = [[[4, 2.5, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]]  # the mean of 4 and 1; nothing to go by: 0
    np.testing.assert_array_equal(rewards.impute_missing(values, valid, scored), expected)


def test_imputation_does_not_look_across_rollouts_or_past_the_end():
    values = np.array([[[2.0, NAN, 100.0], [50.0, 50.0, 50.0]]])
    valid = np.array([[[1, 1, 0], [1, 1, 1]]], bool)
    scored = np.array([[[1, 0, 1], [1, 1, 1]]], bool)  # a score of a turn that does not exist is none
    np.testing.assert_array_equal(rewards.impute_missing(values, valid, scored), [[[2, 2, 0], [50, 50, 50]]])


def test_arrays_of_other_shapes_are_refused():
    cells = np.ones((1, 2, 3), bool)
    with pytest.raises(ValueError, match="scenarios, rollouts, turns"):
        rewards.impute_missing(np.zeros(3), np.ones(3, bool))
    with pytest.raises(ValueError, match="does not fit"):
        rewards.impute_missing(np.zeros((1, 2, 4)), cells)
    with pytest.raises(ValueError, match="boolean"):
        rewards.impute_missing(np.zeros((1, 2, 3)), cells.astype(int))
    with pytest.raises(ValueError, match="does not fit"):
        rewards.impute_missing(np.zeros((1, 2, 3)), cells, np.ones((1, 2, 2), bool))
