"""Indices worked out by hand, and held against the scores that the benchmark's authors publish."""

import json

import pytest

from mapo_jax.errors import UserError
from mapo_jax.evaluation import empa

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


def test_published_scores(shared_data):
    published = json.loads((shared_data / "empa" / "published_epm_q.json").read_text())
    rows = empa.read_trajectories(shared_data / "empa" / "published_trajectories.jsonl")
    scores = empa.score_cases(rows)
    assert scores.keys() == published.keys()
    for model, score in published.items():
        assert scores[model]["cases"] == 30
        assert scores[model]["epm_q"] == pytest.approx(score, abs=0.02), model


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"model": "m", "start": START}, "row 2 has no `levels`"),
        ({"model": "m", "case": "c7", "start": START, "levels": []}, "case c7.*without turns"),
        ({"model": "m", "start": START, "levels": [[3, 0, 0, 0, 0, 0]]}, "C progress is 3"),
        ({"model": "m", "start": START, "levels": [4]}, "row 2 .* cannot be scored"),
        ({"model": "m", "start": (-1, -1, 0), "levels": LEVELS}, "starts at rest"),
        ({"model": "m", "start": (-1, float("nan"), 0), "levels": LEVELS}, "three finite numbers"),
        ([1, 2], "row 2 is .*must be a mapping"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(row, message):
    with pytest.raises(UserError, match=message):
        empa.score_cases([{"model": "m", "start": START, "levels": LEVELS}, row])


def test_broken_files_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="cannot read"):
        empa.read_trajectories(file)
    file.write_text('{"model": "m"}\n\n{"model": ')
    with pytest.raises(UserError, match="line 3 is not JSON"):
        empa.read_trajectories(file)
    file.write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        empa.read_trajectories(file)
