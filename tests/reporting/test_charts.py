import math

import pytest

from mapo_jax.reporting.charts import Chart, Series, draw, format_value, mean_path, nice_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-10, 2, [-10, -8, -6, -4, -2, 0, 2]), (3, 3, [3])],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert nice_ticks(low, high, 5) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.0, "number", "0"),
        (-2.137, "number", "\u22122.14"),
        (31.66, "number", "31.7"),
        (12345.0, "number", "12,345"),
        (2e-7, "number", "2.0e\u22127"),
        (0.034, "share", "3.4\u00a0%"),
        (0.66, "share", "66\u00a0%"),
        (0.0002, "share", "<0.1\u00a0%"),
        (12.345, "seconds", "12.3\u00a0s"),
        (None, "number", "\u2013"),
        (math.nan, "number", "\u2013"),
    ],
)
def test_numbers_are_formatted_for_display(value, form, text):
    assert format_value(value, form) == text


def test_a_gap_stays_a_gap():
    html = draw(Chart("k", "t", (Series("s", [0, 1, 2, 3, 4], [0.0, 1.0, math.nan, 1.0, 0.0]),)))
    assert html.count("<polyline") == 2
    assert "nan" not in html


def test_every_value_lies_inside_the_axes():
    chart = Chart("k", "t", (Series("s", [1, 2], [-3.0, 9.0], band=[(-5.0, 0.0), (8.0, 11.0)]),), zero=True)
    left, right, low, high = chart.domain
    assert (left, right) == (1, 2) and low < -5 and high > 11
    flat = Chart("k", "t", (Series("s", [1], [0.0]),), form="share")
    assert flat.domain[3] > flat.domain[2]


def test_names_are_text_not_markup():
    evil = '<img src=x onerror="alert(1)">'
    html = draw(Chart(evil, evil, (Series(evil, [0], [1.0]), Series(evil, [0], [2.0])), evil, x_name=evil))
    assert "<img" not in html and "&lt;img" in html


def test_the_mean_path_keeps_ended_dialogues_in_place():
    assert mean_path([[(0, 0, 0), (2, 2, 2)], [(0, 0, 0), (4, 0, 0), (6, 0, 0)]]) == [
        (0, 0, 0),
        (3, 1, 1),
        (4, 1, 1),
    ]
