import numpy as np

from mapo_jax.scores.bootstrap import intervals


def test_an_interval_of_a_mean_is_that_of_the_normal_approximation():
    # 400 cases: the percentile interval of a mean nears mean ± 1.96 s / sqrt(n). Its ends are order
    # statistics of 2,000 draws, known to sqrt(0.025 * 0.975 / 2000) / 0.058 = 0.06 standard errors; 0.2 is
    # three times that.
    values = np.random.default_rng(1).standard_normal((400, 1))
    error = values.std() / 20
    low, high = intervals(values, np.ones_like(values))[:, 0]
    assert abs(low - (values.mean() - 1.96 * error)) < 0.2 * error
    assert abs(high - (values.mean() + 1.96 * error)) < 0.2 * error


def test_a_ratio_weighs_cases_by_their_counts():
    # One case of 9 turns with sum 9, one of a single turn with sum 0: draws give 1, 0.9 or 0.
    low, high = intervals(np.array([[9.0], [0.0]]), np.array([[9.0], [1.0]]))[:, 0]
    assert (low, high) == (0, 1)
    ends = intervals(np.array([[9.0], [0.0]] * 50), np.array([[9.0], [1.0]] * 50))[:, 0]
    assert ends[0] < 0.9 < ends[1]


def test_a_single_case_has_no_interval_and_the_seed_decides():
    assert np.isnan(intervals(np.ones((1, 2)), np.ones((1, 2)))).all()
    values, ones = np.random.default_rng(0).random((12, 1)), np.ones((12, 1))
    np.testing.assert_array_equal(intervals(values, ones, seed=3), intervals(values, ones, seed=3))
    assert (intervals(values, ones, seed=3) != intervals(values, ones, seed=4)).any()
