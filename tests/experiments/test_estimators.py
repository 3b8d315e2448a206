"""The comparison of estimators on the language model: what it keeps of a run, and its table."""

from experiments import estimators
from experiments.records import read_json
from tests.forked import run_module


def run(before, after, spikes=0):
    others = {"epm_q": 35.0, "better_off": 0.75}
    figures = {"return": before, "harm": 0.5} | others, {"return": after, "harm": 0.25} | others
    return {
        "validation": dict(enumerate(figures)),
        "test_reward": -0.25,
        "test_epm_q": 40.0,
        "spikes": spikes,
    }


def test_table_pairs_the_seeds_that_both_have():
    runs = {
        "mapo 0.33": {0: run(-4, 2), 1: run(-3, 1)},
        "grpo": {0: run(-4, 1.5, 2), 1: run(-3, 0.5), 2: run(-9, -9)},
    }
    header, _, mapo, grpo = (line.split(" | ") for line in estimators.summary(runs).splitlines())
    assert len(header) == len(mapo) == len(grpo)
    assert mapo[1:4] == ["2", "-3.50 [-4.00, -3.00]", "+1.50 [+1.00, +2.00]"] and mapo[4] == ""
    assert grpo[4].startswith("-0.50 [-0.50, -0.50]")  # the third seed has no partner
    assert grpo[5:] == ["75% [75%, 75%]", "25%", "35.0", "-0.25", "40.0", "0.7 |"]
    lines = estimators.pairs(runs).splitlines()
    # With two pairs of one sign half of the sign flips are as far from 0.
    assert lines[2].startswith("| mapo 0.33 minus grpo | +0.50 [+0.50, +0.50] | 2 of 2 | 0.5")
    assert len(lines) == 3


def test_quick_form_trains_tests_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(estimators, "VARIANTS", {"mapo 0.33": estimators.VARIANTS["mapo 0.33"]})
    monkeypatch.setattr(estimators, "QUICK_VARIANTS", ["mapo 0.33"])
    monkeypatch.setattr(estimators.subprocess, "run", run_module)
    arguments = ["--quick", "--folder", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")]
    assert estimators.main(arguments) == 0
    table = capsys.readouterr().out
    (kept,) = read_json(tmp_path / "out.json")["runs"]["mapo 0.33"].values()
    assert len(kept["training_return"]) == len(kept["grad_norm"]) == 2
    assert list(kept["validation"]) == ["0", "2"] and 0 <= kept["validation"]["2"]["harm"] <= 1
    assert {"test_reward", "test_epm_q"} <= kept.keys()

    def refuse(*_):
        raise AssertionError("a finished part was repeated")

    monkeypatch.setattr(estimators, "command", refuse)
    assert estimators.main(arguments) == 0 and capsys.readouterr().out == table


def test_a_run_that_fails_is_one_sentence(tmp_path, capsys):
    arguments = ["--quick", "--folder", str(tmp_path), "training.steps=none"]
    assert estimators.main(arguments) == 2
    assert "training.steps" in capsys.readouterr().err
