"""The command: a page, a text, or one sentence and exit status 2."""

import json
from pathlib import Path

import pytest

from mapo_jax.report import main


@pytest.fixture
def run(tmp_path):
    """The smallest run: one step of metrics."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "return/mean": -1.5}) + "\n")
    return folder


def test_it_writes_the_page_into_the_run(run, capsys):
    assert main(["--run", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "mine" in page
    assert "report.html" in capsys.readouterr().out


def test_it_prints_and_writes_nothing_with_text(run, capsys):
    assert main(["--run", str(run), "--text"]) == 0
    assert "Not known yet" in capsys.readouterr().out
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "NOWHERE"], "does not exist"),
        (["--run", "RUN", "--dialogues", "0"], "at least 1"),
        (["--run", "RUN", "--output", "RUN"], "is a folder"),
        (["--run", "RUN", "--text", "--output", "x.html"], "leave out --output"),
        (["--run", "RUN"] * 9, "at most 8"),
    ],
)
def test_bad_input_is_one_sentence(run, capsys, arguments, said):
    known = {"RUN": str(run), "NOWHERE": str(run / "nowhere")}
    assert main([known.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not Path("x.html").exists()
