import json

import pytest

from mapo_jax.evaluate import main


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_saved_levels_are_scored_without_a_model(tmp_path, capsys):
    file, scores = tmp_path / "levels.jsonl", tmp_path / "scores.json"
    rows = [
        {"model": model, "case": case, "start": [-5, -4, -3], "levels": [[1, 0, 1, 0, 1, 0]] * turns}
        for model, turns in (("quick", 12), ("slow", 4))
        for case in ("one", "two")
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["empa", "--trajectories", str(file), "--json", str(scores)]) == 0
    written = json.loads(scores.read_text())
    assert written["quick"]["pass_rate"] == 1 and written["slow"]["pass_rate"] == 0
    # start D = sqrt(16 + 9 + 4), all of it made good by turn 4
    assert written["slow"]["RDI"] == pytest.approx(100)
    shown = capsys.readouterr().out
    assert f"{written['quick']['epm_q']:.1f} [" in shown and "2/2" in shown

    file.write_text(json.dumps(rows[0]) + "\n{}")
    assert main(["empa", "--trajectories", str(file), "--json", str(scores)]) == 2
    assert "levels.jsonl, line 2 has no `model`" in capsys.readouterr().err
    assert json.loads(scores.read_text()) == written
