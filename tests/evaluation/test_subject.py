"""The commands with a model behind an endpoint."""

import json

from mapo_jax.evaluate import main
from mapo_jax.scores import emobench

EMOTIONS = ("Calm", "Sad", "Proud", "Afraid")
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


def test_emobench_asks_in_every_order(server, tmp_path):
    item = {
        "qid": "1",
        "language": "en",
        "category": "Social-Self",
        "question type": "Action",
        "scenario": "s",
    }
    item |= {"subject": "Bo", "choices": ["east", "west", "north", "south"], "label": "north"}
    file, out = tmp_path / "items.jsonl", tmp_path / "out"
    file.write_text(json.dumps(item))

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
