import math

import numpy as np
import pytest

from mapo_jax.reporting.comparison import compare, interval, running_band, running_mean


def test_the_interval_of_students_sleep_data():
    # Gosset (1908): extra hours of sleep, drug 2 minus drug 1, ten patients; the published 95 % interval of
    # the paired difference is 0.70 to 2.46 around 1.58.
    gains = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    mean, low, high = interval(gains)
    assert mean == pytest.approx(1.58)
    assert (low, high) == (pytest.approx(0.7001, abs=1e-4), pytest.approx(2.4599, abs=1e-4))


def test_a_single_value_has_an_infinite_interval():
    assert interval([3.0]) == (3.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_cards_are_the_units_not_dialogues():
    before = {"a": [0.0, 2.0], "b": [4.0], "only before": [100.0]}
    after = {"a": [3.0, 5.0], "b": [5.0, 5.0, 5.0], "only after": [-100.0]}
    found = compare(before, after)
    assert (found.before, found.after, found.change, found.cards) == (2.5, 4.5, 2.0, 2)
    # Differences 3 and 1: standard error 1, t with one degree of freedom at 97.5 % is 12.7062 (tables).
    assert found.high == pytest.approx(2 + 12.7062, abs=1e-3)
    assert found.verdict == "unclear"
    assert compare({"a": [1.0]}, {"b": [1.0]}) is None


@pytest.mark.parametrize(("shift", "verdict"), [(5.0, "up"), (-5.0, "down"), (0.0, "unclear")])
def test_the_verdict_follows_the_interval(shift, verdict):
    before = {str(i): [float(i)] for i in range(10)}
    after = {str(i): [i + shift + (-1) ** i] for i in range(10)}
    assert compare(before, after).verdict == verdict


def test_running_figures_by_hand():
    assert running_mean([0.0, 3.0, 6.0, 9.0], 3) == [1.5, 3.0, 6.0, 7.5]
    band = running_band([0.0, 3.0, 6.0, 9.0], 3)
    assert band[1] == pytest.approx((3 - np.sqrt(6), 3 + np.sqrt(6)))
    assert band[0][0] == 0.0  # a band never leaves the values' range: no negative shares
