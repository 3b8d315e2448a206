"""Evaluations in the live world: roles behind scripted servers, a held-out judge, a world that fails."""

import json

import pytest

from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.evaluate import main

CARDS = load_scenarios(split="test")
SHORT = ["rollout.min_turns=2", "rollout.max_turns=2", "evaluation.rollouts=1"]
JUDGE = ["environment.judge.model=m", "environment.call_seconds=2", "environment.concurrency=4"]


def roles(url, **urls):
    """Overrides of a live world: every role at `url`, but those of `urls` at their own."""
    settings = ["environment.family=live", *JUDGE]
    for role in ("user", "judge", "director", *urls):
        settings += [f"environment.{role}.model=m", f"environment.{role}.url={urls.get(role, url)}"]
    return settings


def judging(request):
    return "C_progress" in json.dumps(request.get("response_format", ""))


def rows(folder, file="dialogues.jsonl"):
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


@pytest.fixture
def empa(server, tmp_path):
    """Runs EMPA with a remote policy in tmp_path/out; returns the exit status."""
    server.reply = lambda request: "That must be hard."

    def run(*overrides):
        command = ["empa", "--endpoint", server.url, "--output", str(tmp_path / "out"), *SHORT]
        return main([*command, *overrides])

    return run


def test_a_held_out_judge_scores_in_the_judges_place(empa, serve, well_formed, judged, tmp_path, capsys):
    world = serve(well_formed)
    held_out = serve(lambda request, number: judged(0, -1, 2, 0, 1, 0) if judging(request) else "ready")
    assert empa(*roles(world.url, held_out_judge=held_out.url)) == 0
    assert "live world, held-out judge" in capsys.readouterr().out
    found = rows(tmp_path / "out")
    assert {row["case"] for row in found} == {card.id for card in CARDS}
    assert all(row["levels"] == [[0, -1, 2, 0, 1, 0]] * 2 for row in found)
    assert not any(judging(request) for request in world.requests)
    assert sum(judging(request) for request in held_out.requests) == 2 * len(CARDS)
    # All is there: another time nobody is asked, not even whether they are ready.
    asked = world.count, held_out.count
    assert empa(*roles(world.url, held_out_judge=held_out.url)) == 0
    assert (world.count, held_out.count) == asked


def test_without_one_the_judge_scores(empa, serve, well_formed, tmp_path):
    world = serve(well_formed)
    assert empa(*roles(world.url)) == 0
    assert all(row["levels"] == [[1, 0, 1, 0, 0, 0]] * 2 for row in rows(tmp_path / "out"))
    assert sum(judging(request) for request in world.requests) == 2 * len(CARDS)


def test_a_world_that_fails_ends_it_with_what_was_finished(empa, serve, well_formed, tmp_path, capsys):
    down = False

    def answer(request, number):
        nonlocal down
        down = down or number > 40
        return ("status", 400, {}) if down else well_formed(request, number)

    world = serve(answer)
    overrides = [*roles(world.url), "environment.failure_share=0.05"]
    assert empa(*overrides, "--concurrency", "4") == 2
    error = capsys.readouterr().err
    assert "of the last" in error and str(tmp_path / "out") in error and "goes on from there" in error
    kept = rows(tmp_path / "out")
    assert 0 < len(kept) < len(CARDS)
    assert {row["outcome"] for row in kept} <= {"success", "failure", "timeout", "ended"}

    world.answer = well_formed
    assert empa(*overrides) == 0
    assert rows(tmp_path / "out")[: len(kept)] == kept and len(rows(tmp_path / "out")) == len(CARDS)


def test_dialogues_that_break_off_are_told_and_tried_again(empa, serve, well_formed, tmp_path, capsys):
    broken = {"on": True}
    victim = CARDS[3].person.name

    def answer(request, number):
        text = json.dumps(request["messages"])
        if broken["on"] and victim in text and not judging(request):
            return ("status", 400, {})
        return well_formed(request, number)

    world = serve(answer)
    assert empa(*roles(world.url), "environment.failure_share=0.5") == 0
    assert f"1 of {len(CARDS)} dialogues broke off" in capsys.readouterr().out
    broken["on"] = False
    assert empa(*roles(world.url), "environment.failure_share=0.5") == 0
    assert "broke off" not in capsys.readouterr().out
    assert len(rows(tmp_path / "out")) == len(CARDS)


def test_a_server_that_is_not_there_is_named_and_a_foreign_folder_left_alone(empa, tmp_path, capsys):
    nowhere = "http://127.0.0.1:9/v1"
    assert empa(*roles(nowhere), "environment.call_seconds=0.2") == 2
    assert f"the user's server at {nowhere}" in capsys.readouterr().err
    (tmp_path / "out" / "dialogues.jsonl").write_text("{}\n")
    before = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert empa(*roles(nowhere), "--seed", "1") == 2
    assert "holds an evaluation with" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == before


def test_transcripts_need_a_judge_and_nobody_else(serve, judged, tmp_path, capsys):
    judge = serve(lambda request, number: judged(1, 0, 0, -2, 0, 0) if judging(request) else "ready")
    messages = [{"role": "user", "content": "I am tired."}, {"role": "assistant", "content": "Cheer up!"}]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"id": "a", "messages": messages * 3}) + "\n")
    command = ["dialogues", "--transcripts", str(file), "--output", str(tmp_path / "out"), *JUDGE]
    command += [f"environment.judge.url={judge.url}"]
    assert main(command) == 0
    assert "judged by m" in (tmp_path / "out" / "report.html").read_text()
    (row,) = rows(tmp_path / "out", "judged.jsonl")
    assert row["levels"] == [[1, 0, 0, -2, 0, 0]] * 3 and row["given"] == "unknown"
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert len(scores["worst"]) == 3 and scores["worst"][0]["reward"] < 0
