"""The commands with a model behind an endpoint."""

import argparse
import json
from pathlib import Path

import pytest

from mapo_jax.evaluate import main
from mapo_jax.evaluation.subject import find_subject
from mapo_jax.scores import emobench

EMOTIONS = ("Calm", "Sad", "Proud", "Afraid")
ITEM = {
    "qid": "1",
    "language": "en",
    "category": "Social-Self",
    "question type": "Action",
    "scenario": "s",
    "subject": "Bo",
    "choices": ["east", "west", "north", "south"],
    "label": "north",
}
RIGHT = "\n".join(f"{name}: {i}" for i, name in enumerate(EMOTIONS, 1))


def test_eqbench_asks_and_goes_on_where_it_was_stopped(server, tmp_path, capsys):
    prompt = (
        "Rate number {}. Then critique your answer. Finally, give your revised scores.\n\n"
        "First pass scores:\n"
        "Calm: <score>\n\nCritique: <critique>\n\nRevised scores:\nCalm: <score>\n\n[End of answer]\n"
    )
    reference = {f"emotion{i}": name for i, name in enumerate(EMOTIONS, 1)}
    reference |= {f"emotion{i}_score": i for i in range(1, 5)}
    file, out = tmp_path / "questions.json", tmp_path / "out"
    entries = {
        str(i): {"prompt": prompt.format(i), "reference_answer_fullscale": reference} for i in range(8)
    }
    file.write_text(json.dumps(entries))
    command = ["eqbench", "--questions", str(file), "--endpoint", server.url, "--output", str(out)]

    server.reply = lambda request: RIGHT if len(server.requests) < 4 else 403
    assert main([*command, "--concurrency", "1"]) == 2
    error = capsys.readouterr().err
    assert "failed 1 calls to house-model" in error and "3 of 8 answers are saved" in error
    assert not (out / "scores.json").exists()

    server.requests.clear()
    server.reply = lambda request: RIGHT
    assert main(command) == 0
    assert len(server.requests) == 5
    assert all("ritique" not in request["messages"][0]["content"] for request in server.requests)
    assert json.loads((out / "scores.json").read_text())["score"] == 100
    # With a revision other things are asked: another folder.
    assert main([*command, "--revision"]) == 2
    assert "holds an evaluation with revision False, not True" in capsys.readouterr().err


def test_reasoning_supplies_no_scores_and_what_holds_nothing_else_is_said(server, tmp_path, capsys):
    reference = {f"emotion{i}": name for i, name in enumerate(EMOTIONS, 1)}
    reference |= {f"emotion{i}_score": i for i in range(1, 5)}
    prompt = (
        "Rate {}.\n\nFirst pass scores:\nCalm: <score>\n\nCritique: x\n\nRevised scores:\nCalm: <score>\n"
    )
    prompt += "\n[End of answer] Then critique your answer. Finally, give your revised scores."
    file, out = tmp_path / "questions.json", tmp_path / "out"
    entries = {
        str(i): {"prompt": prompt.format(i), "reference_answer_fullscale": reference} for i in range(6)
    }
    file.write_text(json.dumps(entries))
    wrong = RIGHT.replace("4", "9")
    contents = [
        f"<think>{wrong}</think>\n{RIGHT}",
        f"<think>{RIGHT}",
        None,
        [{"type": "text", "text": RIGHT[:9]}, {"type": "text", "text": RIGHT[9:]}],
        f"{RIGHT}\n\ud83d",
        "**" + RIGHT.replace(":", "**:").lower(),
    ]

    def reply(request):
        number = int(request["messages"][0]["content"].split(".")[0].removeprefix("Rate "))
        return contents[number]

    server.reply = reply
    command = ["eqbench", "--questions", str(file), "--endpoint", server.url, "--output", str(out)]
    assert main(command) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["score"] == 100 and scores["parseable"] == 4 and scores["no_answer"] == 2
    shown = capsys.readouterr().out
    assert "2 of 6 answers hold nothing" in shown and "parsing: benchmark" in shown
    assert main([*command, "--parsing", "strict"]) == 0
    assert json.loads((out / "scores.json").read_text())["parseable"] == 3
    assert "parsing: strict" in capsys.readouterr().out


def test_emobench_asks_in_every_order(server, tmp_path):
    file, out = tmp_path / "items.jsonl", tmp_path / "out"
    file.write_text(json.dumps(ITEM))

    def reply(request):
        """Knows that it is north, and says its letter."""
        lines = request["messages"][0]["content"].split("\n")
        (letter,) = [line[0] for line in lines if line.endswith(") north")]
        return json.dumps({"answer": letter})

    server.reply = reply
    command = ["emobench", "--items", str(file), "--endpoint", server.url, "--protocol", "earlier"]
    assert main([*command, "--output", str(out)]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["accuracy_by_order"] == [1] * emobench.ORDERS and len(server.requests) == 20
    assert {request["temperature"] for request in server.requests} == {0.6}
    assert len({json.loads(line)["answer"] for line in (out / "answers.jsonl").open()}) == 4


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("Qwen/Qwen3-8B", "Qwen_Qwen3-8B"),
        ("llama3:8b", "llama3:8b"),
        ("..", "_"),
        ("/../..", ".._.."),
        ("\x1b[2J\n\ud83d", "\\x1b[2J_\ufffd"),
        ("x" * 300, "x" * 100),
    ],
)
def test_a_servers_name_of_a_model_leaves_no_folder_of_evaluations(model, folder):
    options = argparse.Namespace(
        trust_run_world=False, endpoint="http://x/v1", endpoint_model=model, config=None, overrides=[]
    )
    assert find_subject(options).home == Path("evaluations") / folder


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--endpoint", "127.0.0.1:8000/v1"], "`--endpoint` must be the http(s) address"),
        (["--endpoint", "ftp://127.0.0.1/v1"], "`--endpoint` must be the http(s) address"),
        (["--endpoint", ""], "`--endpoint` must be the http(s) address"),
        (["--endpoint", "http://user:sk-secret@127.0.0.1/v1"], "(its key belongs in OPENAI_API_KEY)"),
        (["--endpoint", "http://127.0.0.1/v1?key=sk-secret"], "(its key belongs in OPENAI_API_KEY)"),
        (["--temperature", "nan"], "`--temperature` is nan; it must be at least 0"),
        (["--temperature", "-0.5"], "`--temperature` is -0.5; it must be at least 0"),
        (["--temperature", "inf"], "`--temperature` is inf"),
        (["--max-tokens", "0"], "`--max-tokens` is 0; it must be at least 1"),
        (["--timeout", "-1"], "`--timeout` is -1.0; it must be at least 0.01"),
        (["--concurrency", "0"], "`--concurrency` is 0; it must be at least 1"),
        (["--seed", "-1"], "`--seed` is -1; it must be at least 0"),
    ],
)
def test_a_bad_address_or_number_is_one_sentence(options, complaint, server, tmp_path, capsys):
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEM))
    command = ["emobench", "--items", str(tmp_path / "items.jsonl"), "--output", str(tmp_path / "out")]
    endpoint = [] if "--endpoint" in options else ["--endpoint", server.url]
    assert main([*command, *endpoint, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and complaint in error and "sk-secret" not in error
    assert not server.requests and not (tmp_path / "out").exists()
