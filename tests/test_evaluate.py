import json
import signal
import time

import pytest

from mapo_jax import evaluate
from mapo_jax.commands import Stopped
from mapo_jax.evaluate import main
from mapo_jax.evaluation.answers import Folder
from mapo_jax.running.stop import ANSWER


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


def test_names_of_others_are_no_markup_and_steer_no_terminal(tmp_path, capsys):
    file, name = tmp_path / "levels.jsonl", "[/x]\x1b]0;t\x07[red]"
    row = {"model": name, "start": [-5, -4, -3], "levels": [[1, 0, 1, 0, 1, 0]] * 3, "domain": "[/y]\x1b"}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"model": "half \ud83d"}))
    assert main(["empa", "--trajectories", str(file), "--json", str(tmp_path / "scores.json")]) == 0
    shown = capsys.readouterr().out
    assert r"[/x]\x1b]0;t\x07[red]" in shown and r"[/y]\x1b" in shown
    assert "\x1b" not in shown and "\x07" not in shown
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {name, "half \ufffd"}


EMOTIONS = ("Calm", "Sad", "Proud", "Afraid")


@pytest.fixture
def questions(tmp_path):
    prompt = (
        "Rate how {} feels. Then critique your answer. Finally, give your revised scores.\n\n"
        "First pass scores:\n"
        "Calm: <score>\n\nCritique: <critique>\n\nRevised scores:\nCalm: <score>\n\n[End of answer]\n"
    )
    reference = {f"emotion{i}": name for i, name in enumerate(EMOTIONS, 1)}
    reference |= {f"emotion{i}_score": str(i) for i in range(1, 5)}
    entries = {
        str(i): {"prompt": prompt.format(i), "reference_answer_fullscale": reference} for i in range(4)
    }
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(entries))
    return file


RIGHT = "\n".join(f"{name}: {i}" for i, name in enumerate(EMOTIONS, 1))


def test_saved_answers_of_eqbench_are_scored(questions, tmp_path, capsys):
    answers, scores = tmp_path / "answers.json", tmp_path / "scores.json"
    answers.write_text(json.dumps({"0": RIGHT, "1": RIGHT, "2": "I cannot say."}))
    command = ["eqbench", "--questions", str(questions), "--answers", str(answers), "--json", str(scores)]
    assert main(command) == 0
    written = json.loads(scores.read_text())
    assert written["score"] == 100 and written["score_unparseable_zero"] == 50 and not written["counts"]
    shown = capsys.readouterr().out
    assert "2/4" in shown and "only 3 of 4 questions have an answer" in shown

    answers.write_text('{"0": ')
    assert main(command) == 2
    assert "answers.json, line 1, is not JSON" in capsys.readouterr().err
    assert main(["eqbench", "--questions", str(answers), "--answers", str(answers)]) == 2
    assert json.loads(scores.read_text()) == written


def test_saved_answers_of_emobench_are_scored(tmp_path, capsys):
    item = {
        "qid": "1",
        "language": "en",
        "category": "Social-Self",
        "question type": "Action",
        "scenario": "s",
    }
    item |= {"subject": "Bo", "choices": ["a", "b", "c", "d"], "label": "c"}
    items, answers, scores = (tmp_path / name for name in ("items.jsonl", "answers.jsonl", "scores.json"))
    items.write_text("\n".join(json.dumps(item | {"qid": str(i)}) for i in range(4)))
    letters = ["C", '{"answer": "C"}', "B", "?"]
    rows = [{"qid": str(i), "language": "en", "answer": letter} for i, letter in enumerate(letters)]
    answers.write_text("\n".join(map(json.dumps, rows)))
    command = ["emobench", "--items", str(items), "--answers", str(answers), "--json", str(scores)]
    assert main(command) == 0
    written = json.loads(scores.read_text())
    assert written["accuracy"] == written["EA"]["accuracy"] == 0.5 and written["unparseable"] == 1
    assert "Social-Self" in capsys.readouterr().out

    items.write_text("\n".join([*items.read_text().splitlines(), '{"question": 1}']))
    assert main(command) == 2
    assert "items.jsonl, line 5: neither an item of EA" in capsys.readouterr().err


def test_who_cannot_be_evaluated_is_named(questions, tmp_path, capsys):
    def error(*options):
        assert main(["eqbench", "--questions", str(questions), *options]) == 2
        return capsys.readouterr().err

    assert "there is no model folder or run" in error("--model", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    output = ("--output", str(tmp_path / "out"))
    assert "neither a Hugging Face model folder" in error("--model", str(tmp_path / "empty"), *output)
    assert not (tmp_path / "out").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "is no run" in error("--model", str(tmp_path / "model"), "--step", "3")
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    assert "is half written: it has no config.yaml" in error("--model", str(tmp_path / "half"))
    (tmp_path / "half" / "config.yaml").write_text("training:\n  seed: 0\n")
    assert "is half written: it has no model/config.json" in error("--model", str(tmp_path / "half"))
    (tmp_path / "half" / "model").mkdir()
    (tmp_path / "half" / "model" / "config.json").write_text("{}")
    assert "holds no whole checkpoint" in error("--model", str(tmp_path / "half"))
    assert "unknown key `modle.dtype`" in error("--model", str(tmp_path / "model"), "modle.dtype=float32")
    assert "there is no file lost.json" in error("--questions", "lost.json", "--model", str(tmp_path))


def test_ctrl_c_is_answered_at_once_and_ends_at_a_safe_point(tmp_path, capfd):
    said = ""
    folder = Folder(tmp_path, "answers.jsonl")
    with (
        pytest.raises(Stopped, match="the same command goes on") as stopped,
        evaluate.stoppable(folder) as check,
    ):
        signal.raise_signal(signal.SIGINT)
        while ANSWER not in said:  # a thread says it
            time.sleep(0.01)
            said += capfd.readouterr().err
        check()
    assert stopped.value.status == 130
