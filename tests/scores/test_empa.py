"""Indices worked out by hand, and held against the scores that the benchmark's authors publish."""

import json

import pytest

from mapo_jax.errors import UserError
from mapo_jax.scores import empa

# Start (-1, -1, -11): r0 = D = 10, v* = (1, 1, 11)/sqrt(123).
START = (-1, -1, -11)
LEVELS = [[0, 0, 0, 0, 2, 0], [0, 0, 0, -1, 0, 0], [0, 0, 1, 0, 1, 0]]
# v: (0, 0, 3), (0, -2, 0), (0, 1, 1); positions: P -8, A -3, then (-1, -2, -7).


def test_indices_by_hand():
    root = 123**0.5
    gains = [33 / root, -2 / root, 12 / root]
    energy = 43 / root
    end_distance = (1 + 36) ** 0.5
    path = 3 + 2 + 2**0.5
    displacement = (1 + 16) ** 0.5
    cosines = [gains[0] / 3, gains[1] / 2, gains[2] / 2**0.5]
    expected = {
        "RDI": (100 * (10 - end_distance) / 10 + 100) / 2,
        "E_total": 100 * energy / 12,
        "S_net": 100 * (2 - 1 + 2) / 15,
        "rho": 100 * (energy / 3) / 2.5,
        "S_proj": 100 * (energy / 4) / 2.5,  # over four rows, the start's included
        "tau": 100 * (3 - path / displacement) / 2,
        "R_pos": 100 * 2 / 4,
        "Align": 100 * (sum(cosines) / 4 + 1) / 2,
        "Pen": 100 * (3 - 1 / 4) / 3,
    }
    scores = empa.score_case(START, LEVELS)
    assert {name: scores[name] for name in empa.INDICES} == pytest.approx(expected)
    groups = [sum(list(expected.values())[i : i + 3]) / 3 for i in (0, 3, 6)]
    assert scores["epm_q"] == pytest.approx(0.4 * groups[0] + 0.2 * groups[1] + 0.4 * groups[2])


def test_a_dialogue_that_only_harms_floors_every_index_that_has_a_floor():
    scores = empa.score_case((-20, -20, -20), [[0, -2, 0, -2, 0, -2]] * 20)
    for name in ("RDI", "E_total", "S_net", "rho", "S_proj", "R_pos", "Pen"):
        assert scores[name] == 0
    assert scores["tau"] == pytest.approx(100)  # a straight way, though the wrong one


def test_indices_are_not_capped():
    assert empa.score_case((-3, -3, -3), [[2, 0, 2, 0, 2, 0]] * 5)["E_total"] > 200


def test_standing_still_and_coming_back():
    still = empa.score_case(START, [[0] * 6] * 3)
    assert (still["tau"], still["RDI"], still["Align"], still["Pen"]) == (100, 50, 50, 100)
    back = empa.score_case((-9, -9, -9), [[0, -1, 0, 0, 0, 0]] + [[1, 0, 0, 0, 0, 0]] * 2)
    assert back["tau"] == 100  # a closed path has no displacement: its tau counts as 0


def test_an_unscored_turn_counts_as_a_turn_that_moves_nothing():
    with_hole = empa.score_case(START, [LEVELS[0], None, *LEVELS[1:]])
    assert with_hole == pytest.approx(empa.score_case(START, [LEVELS[0], [0] * 6, *LEVELS[1:]]))


def test_published_scores_passes_and_rewards(shared_data):
    published = json.loads((shared_data / "empa" / "published_epm_q.json").read_text())
    file = shared_data / "empa" / "published_trajectories.jsonl"
    cases = empa.read_cases(file)
    models = empa.summarize_models(cases)
    assert models.keys() == published.keys()
    for model, score in published.items():
        assert models[model]["cases"] == 30
        assert models[model]["epm_q"] == pytest.approx(score, abs=0.0051), (
            model
        )  # published with two decimals
        low, high = models[model]["intervals"]["epm_q"]
        assert low < score < high
        axes = models[model]["groups"]["strongest_axis"]
        assert {axis: group["cases"] for axis, group in axes.items()} == {"C": 10, "A": 10, "P": 10}
    # Mean and deviation of the incremental distance per turn, as published for the two.
    for model, mean, deviation in (("qwen3-8b", -3.07, 2.80), ("qwen3-235b-a22b-2507", 1.44, 2.40)):
        assert models[model]["idr_mean"] == pytest.approx(mean, abs=0.006)
        assert models[model]["idr_std"] == pytest.approx(deviation, abs=0.006)
    # What the publishers' own runs recorded at the end of each dialogue.
    recorded = [
        "Success" in json.loads(line)["termination"] for line in file.read_text().splitlines() if line
    ]
    assert [case.passed for case in cases] == recorded


def rows(**changes):
    """Two cards of one model, one of them passed; the second has a dialogue more, which failed."""
    passed = {"model": "m", "case": "a", "start": (-5, -4, -3), "levels": [[1, 0, 1, 0, 1, 0]] * 12}
    failed = {"model": "m", "case": "b", "start": (-9, -9, -30), "levels": [[0, -1, 0, 0, 0, 0]] * 12}
    return [row | changes for row in (passed, failed, failed)]


def figures(rows):
    return empa.summarize_models([empa.make_case(row, "a row") for row in rows])["m"]


def test_figures_of_a_model():
    found = figures(rows())
    assert (found["cases"], found["dialogues"], found["passed"], found["turns"]) == (2, 3, 1, 12)
    assert found["pass_rate"] == pytest.approx(1 / 3)
    # D falls from sqrt(16 + 9 + 4) to 0 in the first; in the others C sinks by 2 a turn, 24 in all.
    first, other = 29**0.5, (8**2 + 29**2 + (8 + 24) ** 2) ** 0.5 - (8**2 + 29**2 + 8**2) ** 0.5
    assert found["idr_mean"] == pytest.approx((first - 2 * other) / 36)
    one, two = (empa.score_case(row["start"], row["levels"])["epm_q"] for row in rows()[:2])
    assert found["epm_q"] == pytest.approx((one + 2 * two) / 3)
    assert found["groups"]["difficulty"].keys() == {"up to 27", "32 to 36"}
    assert found["groups"]["strongest_axis"]["P"]["dialogues"] == 2
    assert "domain" not in found["groups"]  # known of no case
    assert found["groups"]["strongest_axis"]["C"]["intervals"]["epm_q"] is None  # a single card says nothing


def test_whole_cards_are_drawn_for_the_intervals():
    # Two cards: a draw holds twice the one, twice the other, or both, so the ends are the two extremes.
    low, high = figures(rows())["intervals"]["pass_rate"]
    assert (low, high) == (0, 1)


def test_domains_and_other_rules_come_with_the_rows():
    found = figures(rows(domain="work", outcome="success"))
    assert found["groups"]["domain"]["work"]["pass_rate"] == 1
    assert figures(rows(outcome="timeout"))["pass_rate"] == 0


def test_dialogues_without_a_score_are_left_out():
    unscored = {"model": "m", "start": START, "levels": [None, None]}
    broken = {"model": "m", "start": START, "levels": LEVELS, "outcome": "error"}
    assert empa.make_case(unscored, "a row") is None
    assert empa.make_case(broken, "a row") is None
    assert figures([*rows(), unscored, broken]) == figures(rows())
    with pytest.raises(UserError, match="no dialogue can be scored"):
        empa.summarize_models([None])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"model": "m", "start": START}, "line 3 has no `levels`"),
        ({"model": "m", "case": "c7", "start": START, "levels": []}, "case c7.*without turns"),
        ({"model": "m", "start": START, "levels": [[3, 0, 0, 0, 0, 0]]}, "C progress is 3"),
        ({"model": "m", "start": START, "levels": [4]}, "line 3 .* cannot be scored"),
        ({"model": "m", "start": START, "levels": 4}, "line 3 .* cannot be scored"),
        ({"model": "m", "start": [10**400, 0, 0], "levels": [[0] * 6]}, "line 3 .* cannot be scored"),
        ({"model": "m", "start": (-1, -1, 0), "levels": LEVELS}, "starts at rest"),
        ({"model": "m", "start": (-1, float("nan"), 0), "levels": LEVELS}, "three finite numbers"),
        ([1, 2], "line 3, holds list, not an object"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(row, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    good = {"model": "m", "start": START, "levels": LEVELS}
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n")
    with pytest.raises(UserError, match=message):
        empa.read_cases(file)
