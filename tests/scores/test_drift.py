"""Figures of conversations by hand; permutation tests against scipy and on data with and without a change."""

import json

import numpy as np
import pytest
from scipy import stats

from mapo_jax import drift
from mapo_jax.scores.drift import compare, figures, permutation_test

LEVELS = ("C progress", "C harm")


def chat(*replies):
    return [
        message
        for reply in replies
        for message in ({"role": "user", "content": "x"}, {"role": "assistant", "content": reply})
    ]


def test_figures_by_hand():
    messages = chat(
        "I hear that it hurts.",
        "I hear that again and again.",
        "I'm sorry, but I can't help with that.",
        "Go on.",
    )
    found = figures(messages, [(1, 0), None, (2, -1), (0, 0)], [1, 1, -1], level_names=LEVELS)
    assert found == {
        "turns": 4,
        "words per reply": (5 + 6 + 8 + 2) / 4,
        "refusals": 0.25,
        "repeated openings": 1 / 3,
        "C progress": 1.0,
        "C harm": pytest.approx(-1 / 3),
        "feedback": pytest.approx(1 / 3),
    }
    assert figures(chat("Yes.")) == {"turns": 1, "words per reply": 1, "refusals": 0}


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("As an AI language model, I have no feelings.", 1),
        ("I cannot assist with this.", 1),
        ("我无法回答这个问题。", 1),
        ("I cannot imagine how that felt.", 0),
        ("It is as an aim of yours.", 0),
    ],
)
def test_refusals(text, refusal):
    assert figures(chat(text))["refusals"] == refusal


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_p_is_scipys(shift):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=25), rng.normal(loc=shift, size=40)
    theirs = stats.permutation_test(
        (x, y), lambda x, y, axis: np.mean(y, axis) - np.mean(x, axis), n_resamples=10_000, rng=1
    )
    # Two estimates from 10,000 splits each: standard error at most 0.005 * sqrt(2).
    assert permutation_test(x, y) == pytest.approx(theirs.pvalue, abs=0.025)


def test_all_splits_by_hand():
    """0 0 1 against 1 1: of the 10 splits those with two ones (3) or two zeros (1) differ as much."""
    p = permutation_test(np.array([0.0, 0, 1]), np.array([1.0, 1]), permutations=20_000)
    assert p == pytest.approx(0.4, abs=0.015)


def test_without_a_change_few_are_below_the_level():
    rng = np.random.default_rng(0)
    ps = [permutation_test(rng.normal(size=9), rng.normal(size=9), permutations=400) for _ in range(200)]
    assert np.mean(np.array(ps) < 0.1) == pytest.approx(0.1, abs=0.06)  # 3 standard errors


def test_holm():
    rng = np.random.default_rng(1)
    before = [{"a": x, "b": y} for x, y in rng.normal(size=(30, 2))]
    after = [{"a": x + 3, "b": y, "c": 1.0} for x, y in rng.normal(size=(30, 2))]
    rows = {row["name"]: row for row in compare(before, after)}
    assert rows["a"]["p_holm"] == pytest.approx(2 * rows["a"]["p"]) and rows["a"]["effect"] > 1
    assert rows["b"]["p_holm"] == rows["b"]["p"]
    assert rows["c"]["counts"] == [0, 30] and rows["c"]["p"] is None and rows["c"]["difference"] is None


def write_log(folder, number, replies, rating):
    folder.mkdir()
    with (folder / "2026-01-31.jsonl").open("w") as file:
        for index in range(number):
            turn = {
                "kind": "turn",
                "conversation": f"c{index}",
                "reply": f"r{index}",
                "time": 1,
                "model": "m",
            }
            file.write(json.dumps(turn | {"scenario": None, "messages": chat(*replies)}) + "\n")
            feedback = {"kind": "feedback", "reply": f"r{index}", "rating": rating(index), "comment": ""}
            file.write(json.dumps(feedback) + "\n")
    return str(folder)


class TestCommand:
    def test_a_drift(self, tmp_path, capsys):
        before = write_log(tmp_path / "a", 12, ["Good."], lambda index: 1 if index % 4 else -1)
        after = write_log(tmp_path / "b", 12, ["<b>Good</b> and long enough."], lambda index: -1)
        judged = tmp_path / "judged"
        judged.mkdir()
        row = {"case": "c0", "levels": [[2, 0, 0, 0, 0, 0]], "messages": chat("Good.")}
        (judged / "judged.jsonl").write_text(json.dumps(row) + "\n")
        files = ["--json", str(tmp_path / "drift.json"), "--page", str(tmp_path / "drift.html")]
        assert drift.main(["--before", before, str(judged), "--after", after, *files]) == 1
        assert "drifted: words per reply, feedback" in capsys.readouterr().out
        result = json.loads((tmp_path / "drift.json").read_text())
        assert result["drifted"] == ["words per reply", "feedback"]
        found = {row["name"]: row for row in result["figures"]}
        assert found["feedback"]["means"] == [0.5, -1] and found["turns"]["p_holm"] == 1
        assert found["C progress"]["counts"] == [1, 0]  # joined by conversation
        assert "words per reply" in (tmp_path / "drift.html").read_text()

    def test_none(self, tmp_path, capsys):
        before = write_log(tmp_path / "a", 12, ["Good."], lambda index: 1)
        after = write_log(tmp_path / "b", 12, ["Good."], lambda index: 1)
        assert drift.main(["--before", before, "--after", after]) == 0
        assert "no figure has drifted" in capsys.readouterr().out

    def test_too_few(self, tmp_path, capsys):
        before = write_log(tmp_path / "a", 3, ["Good."], lambda index: 1)
        assert drift.main(["--before", before, "--after", before]) == 0
        assert "nothing was tested" in capsys.readouterr().out

    def test_content_parts_are_text(self, tmp_path):
        (text,) = drift.read_period([write_log(tmp_path / "a", 1, ["I feel it."], lambda index: 1)])
        parts = [[{"type": "text", "text": "I "}, "feel it."]]
        assert drift.read_period([write_log(tmp_path / "b", 1, parts, lambda index: 1)]) == [text]
        (row,) = drift.read_period([write_log(tmp_path / "c", 1, [None], lambda index: 1)])
        assert row["turns"] == 1 and row["words per reply"] == 0

    @pytest.mark.parametrize(
        ("file", "change", "named"),
        [
            ("2026-01-31.jsonl", {"messages": "text"}, "`messages`"),
            ("2026-01-31.jsonl", {"messages": [{"role": "user", "content": [{}]}]}, "not text"),
            ("2026-01-31.jsonl", {"conversation": ["a"]}, "`conversation`"),
            ("2026-01-31.jsonl", {"kind": "feedback", "rating": "good"}, "`rating`"),
            ("judged.jsonl", {"case": 1}, "`case`"),
            ("judged.jsonl", {"levels": [[1, 2]]}, "`levels.0`"),
            ("judged.jsonl", {"levels": ["abcdef"]}, "`levels.0`"),
        ],
    )
    def test_malformed_lines_are_one_sentence(self, tmp_path, capsys, file, change, named):
        folder = write_log(tmp_path / "a", 1, ["Good."], lambda index: 1)
        whole = json.loads((tmp_path / "a" / "2026-01-31.jsonl").read_text().splitlines()[0])
        whole |= {"case": "c0", "levels": [None], "comment": ""}
        with (tmp_path / "a" / file).open("w") as target:
            target.write(json.dumps(whole) + "\n" + json.dumps(whole | change) + "\n")
        assert drift.main(["--before", folder, "--after", folder]) == 2
        error = capsys.readouterr().err
        assert f"{file}, line 2" in error and named in error and error.count("\n") == 1

    @pytest.mark.parametrize("option", ["--p=nan", "--p=2", "--effect=-1", "--seed=-1"])
    def test_numbers_out_of_bounds(self, tmp_path, capsys, option):
        assert drift.main(["--before", str(tmp_path), "--after", str(tmp_path), option]) == 2
        assert option.split("=")[0] in capsys.readouterr().err

    def test_nothing_there(self, tmp_path, capsys):
        assert drift.main(["--before", str(tmp_path), "--after", str(tmp_path)]) == 2
        assert "neither conversations" in capsys.readouterr().err
