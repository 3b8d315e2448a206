"""The main job in the live world: every fault there is, a kill in mid-step, models of our own as roles."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mapo_jax import train
from mapo_jax.algorithm.rewards import distance
from mapo_jax.model.huggingface import read_config
from mapo_jax.model.qwen import parameter_shapes
from mapo_jax.rollout.collect import Dialogue
from mapo_jax.running.checkpoint import read_progress
from mapo_jax.running.run_folder import whole_steps
from tests.forked import TRAIN, Forked

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-live-0123456789abcdef"
STEPS, SCENARIOS, ROLLOUTS, TURNS, DISCOUNT, WEIGHT = 10, 2, 3, 3, 0.85, 1 / 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


def command(folder, model_folder, cache, url, **changes):
    settings = {
        "run.directory": folder,
        "run.compilation_cache": cache,
        "model.path": model_folder,
        "rollout.scenarios": SCENARIOS,
        "rollout.rollouts": ROLLOUTS,
        "rollout.max_turns": TURNS,
        "rollout.min_turns": 2,
        "rollout.max_reply_tokens": 6,
        "rollout.max_tokens": 512,
        "training.steps": STEPS,
        "training.minibatch_scenarios": 1,
        "algorithm.discount": DISCOUNT,
        "algorithm.turn_weight": WEIGHT,
        "evaluation.every": 5,
        "evaluation.scenarios": 2,
        "evaluation.rollouts": 1,
        "checkpoint.every": 4,
        "environment.family": "live",
        "environment.call_seconds": 3.0,
        "environment.step_seconds": 60.0,
        "environment.pause_minutes": 0.05,
    }
    for role in ("user", "judge", "director"):
        settings |= {f"environment.{role}.url": url, f"environment.{role}.model": "m"}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in settings.items()]


def saved(folder, step):
    """A step's dialogues, [S][R]."""
    lines = (folder / "dialogues" / f"step_{step:06d}.jsonl").read_text().splitlines()
    dialogues = [Dialogue.from_json(json.loads(line)) for line in lines]
    return [dialogues[s * ROLLOUTS : (s + 1) * ROLLOUTS] for s in range(SCENARIOS)]


def metric_rows(folder):
    """The rows of the steps, by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "reward/mean" in row}


def advantages_by_hand(groups):
    """MAPO in plain numpy, from the saved dialogues alone: (scored advantages, rewards that count)."""
    shape = (SCENARIOS, ROLLOUTS, TURNS)
    rewards, scored = np.full(shape, np.nan), np.zeros(shape, bool)
    returns = np.full(shape, np.nan)
    for s, group in enumerate(groups):
        for r, dialogue in enumerate(group):
            turns = dialogue.state.turns
            good = [turn.judgement is not None for turn in turns]
            if dialogue.state.outcome == "error" or not any(good) or good.count(False) > len(good) / 2:
                continue
            path = [
                distance(p) for p in (dialogue.state.scenario.start_position, *(t.position for t in turns))
            ]
            own = [path[t] - path[t + 1] if good[t] else np.nan for t in range(len(turns))]
            filled = np.where(np.isnan(own), np.nanmean(own), own)
            for t in range(len(turns)):
                returns[s, r, t] = sum(DISCOUNT ** (k - t) * filled[k] for k in range(t, len(turns)))
            rewards[s, r, : len(turns)], scored[s, r, : len(turns)] = own, good
    counted = rewards[scored]
    batch = (rewards - counted.mean()) / (counted.std() + 1e-6) if counted.std() > 1e-5 else 0 * rewards
    turn = np.zeros(shape)
    for s in range(SCENARIOS):
        for t in range(TURNS):
            cell = returns[s, scored[s, :, t], t]
            if len(cell) >= 2 and cell.std() > 1e-5 * max(1, np.abs(cell).max()):
                turn[s, scored[s, :, t], t] = (cell - cell.mean()) / (cell.std() + 1e-6)
    return (WEIGHT * turn + (1 - WEIGHT) * batch)[scored], counted


def rewards_by_hand(groups):
    """What counts in reward/mean: every judged turn of a dialogue that did not break off."""
    states = [d.state for group in groups for d in group if d.state.outcome != "error"]
    return [
        distance(before) - distance(turn.position)
        for state in states
        for turn, before in zip(state.turns, state.positions, strict=False)
        if turn.judgement is not None
    ]


FAULTS = (
    ("silence",),
    ("status", 429, {"retry-after": "0"}),
    ("status", 500, {}),
    ("close",),
    "cut JSON",
    "out of range",
    "wrong role",
    ("stall", 30),
)


def test_ten_steps_with_every_fault(serve, well_formed, judged, model_folder, cache, tmp_path):
    """Three calls of ten fail, each in the next way; and one turn of thirteen can never be judged.

    Which ones follows from seeds and not from words, which differ from run to run: should both dialogues of
    an evaluation happen to lose most of their turns, the run rightly stops.
    """
    answers = iter(range(10**9))
    levels = np.random.default_rng(0).choice([0, 1, 2], size=(4096, 3)).tolist()

    def answer(request, number):
        schema = "response_format" in request
        judging = schema and "C_progress" in json.dumps(request["response_format"])
        if judging and (request["seed"] + request["messages"][1]["content"].count("I keep")) % 13 == 0:
            return judged(5, 0, 0, 0, 0, 0)  # the user has said "I keep thinking" once a turn
        if number % 10 in (2, 5, 8):
            fault = FAULTS[next(answers) % len(FAULTS)]
            if fault == "wrong role":
                message = {"role": "user", "content": "I am the user."}
                return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            if fault == "cut JSON":
                return judged(1, 0, 1, 0, 0, 0)[:-30] if schema else ("json",)
            if fault == "out of range":
                return judged(7, 0, 1, 0, 0, 0) if schema else ("status", 502, {})
            return fault
        if judging:
            c, a, p = levels[number % 4096]
            return judged(c, 0, a, -1, p, 0)
        return well_formed(request, number)

    server = serve(answer)
    folder = tmp_path / "run"
    arguments = command(
        folder, model_folder, cache, server.url,
        environment__failure_share=0.9, environment__call_seconds=3.0,
    )  # fmt: skip
    assert train.main(arguments) == 0
    rows = metric_rows(folder)
    assert sorted(step for step in rows) == list(range(1, STEPS + 1))
    assert {"silence", 429, 500, "close", "stall"} <= set(server.faults)
    kinds = {json.loads(line)["kind"] for line in (folder / "failures.jsonl").read_text().splitlines()}
    assert {"out_of_range", "malformed"} <= kinds

    unscored = 0
    for step, row in rows.items():
        groups = saved(folder, step)
        turns = [turn for group in groups for d in group for turn in d.state.turns]
        unscored += sum(turn.judgement is None for turn in turns)
        advantages, counted = advantages_by_hand(groups)
        # float32 against float64, on numbers of order 1.
        assert row["reward/mean"] == pytest.approx(np.mean(rewards_by_hand(groups)), abs=1e-4)
        assert set(counted.tolist()) <= set(rewards_by_hand(groups))
        assert row["advantages/mean"] == pytest.approx(advantages.mean(), abs=1e-4)
        assert row["advantages/std"] == pytest.approx(advantages.std(), abs=1e-4)
        assert row["advantages/min"] == pytest.approx(advantages.min(), abs=1e-4)
        assert row["advantages/max"] == pytest.approx(advantages.max(), abs=1e-4)
        # The limits bound the step, whatever the servers do; the rest is for a busy machine.
        assert row["timing_s/rollout"] < 60 + 15
    assert unscored > 0
    assert sum(row.get("failures/out_of_range", 0) for row in rows.values()) > 0
    assert sum(row["judge/repair_rate"] for row in rows.values()) > 0


def test_a_kill_in_mid_step_costs_no_call_and_no_turn(serve, well_formed, model_folder, cache, tmp_path):
    folder = tmp_path / "run"
    process = {}

    def answer(request, number):
        if number == process.get("kill at"):
            os.kill(process["it"].pid, signal.SIGKILL)
        return well_formed(request, number)

    server = serve(answer)
    arguments = command(folder, model_folder, cache, server.url)

    def start():
        return Forked(TRAIN, arguments)

    # Three openings and their like before; 45 calls a step: this is in the second step or later.
    process |= {"kill at": 3 + 16 + 32 + 44 + 30, "it": start()}
    process["it"].communicate(timeout=280)
    assert process["it"].returncode == -signal.SIGKILL
    (journal,) = sorted((folder / "journal").glob("train_*.jsonl"))[-1:]
    finished = [line for line in map(json.loads, journal.read_text().splitlines()) if "index" in line]
    earlier = {json.dumps([r["messages"], r["seed"]]) for r in server.requests[:-8]}
    assert 0 < len(finished) < SCENARIOS * ROLLOUTS * TURNS
    server.requests.clear()
    process["kill at"] = None
    process["it"] = start()
    out = process["it"].communicate(timeout=280)
    assert process["it"].returncode == 0, out

    ready = {json.dumps([server.requests[0]["messages"], 0])}
    again = {json.dumps([r["messages"], r["seed"]]) for r in server.requests}
    assert not (again & earlier) - ready
    step = int(journal.stem.split("_")[1])
    dialogues = [d for group in saved(folder, step + 1) for d in group]
    for line in finished:
        (dialogue,) = [d for d in dialogues if d.state.seed == line["seed"]]
        spans = [i for i, t in enumerate(dialogue.row.turn) if t == line["index"]]
        sampled = [i for i in spans if dialogue.row.sampled[i]]
        assert [dialogue.row.ids[i] for i in sampled] == line["ids"]
        assert [dialogue.row.logprob[i] for i in sampled] == line["logprobs"]
        turn = dialogue.state.turns[line["index"]]
        assert list(turn.judgement.levels) == line["turn"]["judgement"]["levels"]
        assert list(turn.position) == line["turn"]["position"]
    assert sorted(metric_rows(folder)) == list(range(1, STEPS + 1))
    # What a whole checkpoint covers needs no journal any more.
    assert all(int(file.stem.split("_")[1]) >= 8 for file in (folder / "journal").iterdir())


def test_an_outage_stops_the_run_whole_and_no_key_is_left_anywhere(
    serve, well_formed, model_folder, cache, tmp_path, monkeypatch, capfd
):
    """The servers fail in the second step, for longer than all pauses, and echo the key wherever they can."""
    monkeypatch.setenv("WORLD_KEY", KEY)
    outage = []

    def answer(request, number):
        if number > 3 + 16 + 32 + 45 + 20:
            outage.append(number)
            return ("status", 503, {}, f"The key {KEY} is overloaded.")
        return spoken(request, number)

    def spoken(request, number):
        text = well_formed(request, number)
        return text if text.startswith("{") else f"{text} I know {KEY}."

    server = serve(answer)
    folder = tmp_path / "run"
    keys = {f"environment__{role}__key_variable": "WORLD_KEY" for role in ("user", "judge", "director")}
    arguments = command(
        folder, model_folder, cache, server.url, training__steps=3, environment__failure_share=0.05,
        environment__pause_minutes=0.01, **keys,
    )  # fmt: skip
    assert train.main(arguments) == 2
    out, err = capfd.readouterr()
    assert "503" in err and "the same command goes on" in err and "pause 5 of 5" in out
    # Checkpoints come after every fourth step: this one was made for the pause.
    assert whole_steps(folder) == [1] and sorted(metric_rows(folder)) == [1]
    answered = {json.dumps([r["messages"], r["seed"]]) for r in server.requests[3 : outage[0] - 1]}
    server.requests.clear()
    server.answer = spoken
    assert train.main(arguments) == 0
    assert sorted(metric_rows(folder)) == [1, 2, 3] and whole_steps(folder)[-1] == 3
    assert not answered & {json.dumps([r["messages"], r["seed"]]) for r in server.requests}
    dialogues = [d for step in (1, 2, 3) for group in saved(folder, step) for d in group]
    turns = [turn for dialogue in dialogues for turn in dialogue.state.turns]
    assert len(turns) == 3 * SCENARIOS * ROLLOUTS * TURNS and all(turn.scored for turn in turns)

    assert any(KEY.lower() in headers.lower() for headers in server.headers)  # it was sent, and nothing else
    assert all("[key]" in turn.user for turn in turns)
    later_out, later_err = capfd.readouterr()
    texts = {"screen": out + err + later_out + later_err}
    for step in whole_steps(folder):  # arrays are compressed; what could hold a key is read back
        texts[f"checkpoint {step}"] = json.dumps(read_progress(folder / "checkpoints" / str(step)))
    for name, text in texts.items():
        assert KEY not in text, name
    files = {file.name: file for file in folder.rglob("*") if file.is_file()}
    assert {"config.yaml", "failures.jsonl", "calls.sqlite", "metrics.jsonl", "report.html"} <= set(files)
    for file in folder.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), file


def test_a_held_out_judge_that_fails_costs_its_evaluation_and_not_the_run(
    serve, well_formed, judged, model_folder, cache, tmp_path, capsys
):
    """It scores evaluations and nothing else; after the first it hangs or refuses, until mended."""

    def held(request, number):
        if held_out.broken:
            return ("status", 400, {}) if number % 2 else ("silence",)
        return judged(0, 0, 2, 0, 0, 0) if "response_format" in request else "ready"

    def answer(request, number):
        # The judge is asked nothing before the first evaluation is over.
        held_out.broken |= held_out.breaks and "C_progress" in json.dumps(request.get("response_format", ""))
        return well_formed(request, number)

    held_out, world = serve(held), serve(answer)
    held_out.broken, held_out.breaks = False, True
    folder = tmp_path / "run"
    settings = {
        "training__steps": 3,
        "evaluation__every": 2,
        "environment__call_seconds": 2.0,
        "environment__failure_share": 0.01,
        "optimizer__learning_rate": 0.1,  # else it says the same in each evaluation, and the cache answers
        "environment__held_out_judge__url": held_out.url,
        "environment__held_out_judge__model": "m",
    }
    arguments = command(folder, model_folder, cache, world.url, **settings)
    started = time.monotonic()
    assert train.main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "validation after 2 steps is left out" in out and "validation after 3 steps is left out" in out
    assert "the same command tries it again" in out
    assert time.monotonic() - started < 200  # nothing waited for the 60 s of a silent server, or a pause
    held = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(row["step"] for row in held if "reward/mean" in row) == [1, 2, 3]
    assert [row["step"] for row in held if "evaluation/reward/mean" in row] == [0]
    # What an evaluation cost that was left out is its own, and no step's.
    assert not any("held_out_judge/calls" in row for row in held)
    assert [row["step"] for row in held if "evaluation/held_out_judge/calls" in row] == [0, 2, 3]
    assert sorted(file.name for file in (folder / "evaluations").glob("step_*.jsonl")) == [
        "step_000000.jsonl"
    ]

    held_out.broken = held_out.breaks = False
    assert train.main(arguments) == 0
    lines = (folder / "evaluations" / "step_000003.jsonl").read_text().splitlines()
    turns = [turn for line in lines for turn in Dialogue.from_json(json.loads(line)).state.turns]
    assert {turn.judgement.levels for turn in turns} == {(0, 0, 2, 0, 0, 0)}
    trained = [t for step in (1, 2, 3) for g in saved(folder, step) for d in g for t in d.state.turns]
    assert {turn.judgement.levels for turn in trained} == {(1, 0, 1, 0, 0, 0)}


def test_a_dry_run_forecasts_calls_tokens_and_cost(model_folder, cache, tmp_path, capsys):
    arguments = command(tmp_path / "run", model_folder, cache, "http://127.0.0.1:9/v1")
    settings = ["environment.judge.prices=[2, 10]", "environment.director.requests_per_minute=2"]
    assert train.main(["--dry-run", "--full", *arguments, *settings]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = {line.split()[0]: line.replace(",", "").split()[2:] for line in lines if line.count(" m ") == 1}
    assert any("the user has no price" in line for line in lines)
    # Every parameter's place is there: its sizes, the mesh axes that cut them, and what a device has.
    shapes = jax.tree_util.tree_leaves_with_path(parameter_shapes(read_config(model_folder)))
    for path, shape in shapes:
        name = "/".join(key.key for key in path)
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.split("=")[1].split() == " x ".join(map(str, shape.shape)).split(), line
    (line,) = (line for line in lines if "calls under way, at most" in line)
    assert line.split()[5:] == ["64", "(of", "all", "processes", "together)"]
    # 132 calls at two a minute.
    assert any("the director's limits per minute let this through in 1.1 hours" in line for line in lines)
    # 12 calls a step at two a minute, and 60 s for a step; the others have no limit.
    (line,) = (line for line in lines if "environment.step_seconds=60" in line)
    assert line.startswith("  the director's limits per minute let a step through in 360 seconds")
    # By hand: 10 steps x 6 dialogues and 3 evaluations x 2: 66 dialogues of 3 turns; 2 x 10 + 3 x 2 openings;
    # 3 inspections of 32 replies.
    assert int(figures["judge"][0]) == 66 * 3 + 3 * 32
    assert int(figures["director"][0]) == 66 * 2
    assert int(figures["user"][0]) == 66 * 2 + 26
    tokens, answers, cost = (float(value) for value in figures["judge"][1:])
    assert cost == pytest.approx((2 * tokens + 10 * answers) / 1e6, abs=0.006)
    assert 500 < tokens / (66 * 3 + 3 * 32) < 3000
    assert not (tmp_path / "run").exists()

    held_out = ["environment.held_out_judge.model=h", "environment.held_out_judge.url=http://127.0.0.1:9/v1"]
    assert train.main(["--dry-run", "--full", *arguments, *held_out]) == 0
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    calls = {line[0]: int(line[2]) for line in lines if line[:2] in (["judge", "m"], ["held_out_judge", "h"])}
    assert calls == {"judge": 60 * 3 + 3 * 32, "held_out_judge": 6 * 3}


def test_a_wrong_server_stops_before_anything_is_spent(model_folder, cache, tmp_path, capsys):
    arguments = command(
        tmp_path / "run", model_folder, cache, "http://127.0.0.1:9/v1", environment__call_seconds=0.3
    )
    started = time.monotonic()
    assert train.main(arguments) == 2
    assert "the user's server at http://127.0.0.1:9/v1" in capsys.readouterr().err
    assert time.monotonic() - started < 60


def engine_roles(folders, **options):
    return {
        f"environment__{role}__{key}": value
        for role, folder in folders.items()
        for key, value in {
            "url": "null",
            "model": f"engine:{folder}",
            "max_tokens": 16,
            "extra_body": json.dumps({"slots": 4, "tokens": 4096}),
            **options,
        }.items()
    }


SHORT = {
    "training__steps": 1,
    "rollout__scenarios": 2,
    "rollout__rollouts": 2,
    "rollout__max_turns": 2,
    "training__minibatch_scenarios": 1,
    "evaluation__scenarios": 1,
    # A user with six sentences says one twice now and then; then it is asked again, and may fail.
    "environment__failure_share": 0.9,
}


@pytest.mark.slow
def test_our_own_engine_plays_all_roles(speaking_models, model_folder, cache, tmp_path):
    folder = tmp_path / "run"
    arguments = command(folder, model_folder, cache, "null", **engine_roles(speaking_models), **SHORT)
    arguments = [a.replace("call_seconds=3.0", "call_seconds=60") for a in arguments]
    arguments = [a.replace("step_seconds=60.0", "step_seconds=500") for a in arguments]
    assert train.main(arguments) == 0
    lines = (folder / "dialogues" / "step_000001.jsonl").read_text().splitlines()
    turns = [turn for line in lines for turn in Dialogue.from_json(json.loads(line)).state.turns]
    assert {turn.judgement.levels for turn in turns} <= {(1, 0, 2, 0, 0, -1), (0, -1, 1, 0, 2, 0)}
    assert len(turns) >= 3 and all(turn.user for turn in turns)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def transformers_servers(speaking_models, tmp_path):
    """One `transformers serve` for each role: an independent server of the same protocol. Their URLs."""
    processes, urls = [], {}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for role, folder in speaking_models.items():
        port = free_port()
        log = (tmp_path / f"{role}.log").open("w")
        program = Path(sys.executable).with_name("transformers")
        serve_command = [program, "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
        processes.append(
            subprocess.Popen([*serve_command, "--device", "cpu"], env=environment, stdout=log, stderr=log)
        )
        urls[role] = f"http://127.0.0.1:{port}/v1"
    try:
        for url in urls.values():
            until = time.monotonic() + 150
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])), 1):
                        break
                except OSError:
                    assert time.monotonic() < until, [f.read_text() for f in tmp_path.glob("*.log")]
                    time.sleep(0.5)
        yield urls
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_an_independent_server_plays_all_roles(
    transformers_servers, speaking_models, model_folder, cache, tmp_path
):
    folder = tmp_path / "run"
    roles = {
        f"environment__{role}__{key}": value
        for role, url in transformers_servers.items()
        for key, value in {"url": url, "model": speaking_models[role], "max_tokens": 16}.items()
    }
    arguments = command(folder, model_folder, cache, "null", **roles, **SHORT)
    arguments = [a.replace("call_seconds=3.0", "call_seconds=60") for a in arguments]
    arguments = [a.replace("step_seconds=60.0", "step_seconds=500") for a in arguments]
    assert train.main(arguments) == 0
    lines = (folder / "dialogues" / "step_000001.jsonl").read_text().splitlines()
    turns = [turn for line in lines for turn in Dialogue.from_json(json.loads(line)).state.turns]
    assert {turn.judgement.levels for turn in turns} <= {(1, 0, 2, 0, 0, -1), (0, -1, 1, 0, 2, 0)}
    assert len(turns) >= 3


def recipe(name, folder, model_folder, cache, roles):
    """The command line that a recipe's header gives for a CPU."""
    file = ROOT / "configs" / name
    header = file.read_text().split("\nrun:")[0]
    small = re.findall(r"[a-z_.]+=[a-z0-9]+", header.split("To try it on a CPU")[1])
    assert len(small) >= 10
    places = {"run.directory": folder, "run.compilation_cache": cache, "model.path": model_folder}
    return ["--config", str(file), *small, *(f"{key}={value}" for key, value in (places | roles).items())]


@pytest.mark.slow
def test_the_recipe_with_three_servers_runs_on_the_cpu(
    serve, well_formed, model_folder, cache, tmp_path, monkeypatch
):
    servers = {role: serve(well_formed) for role in ("user", "judge", "director")}
    for role in servers:
        monkeypatch.setenv(f"{role.upper()}_KEY", KEY)
    roles = {f"environment.{role}.url": server.url for role, server in servers.items()}
    folder = tmp_path / "run"
    assert train.main(recipe("live.yaml", folder, model_folder, cache, roles)) == 0
    assert sorted(metric_rows(folder)) == [1, 2]
    assert all(row["judge/failure_rate"] == 0 for row in metric_rows(folder).values())
    # The user alone also opens; the judge alone also scores the calibration.
    calls = {role: server.count for role, server in servers.items()}
    assert calls["director"] < calls["user"] < calls["judge"]


@pytest.mark.slow
def test_the_recipe_on_our_engine_runs_on_the_cpu(speaking_models, model_folder, cache, tmp_path):
    roles = {f"environment.{role}.model": f"engine:{path}" for role, path in speaking_models.items()}
    # A user of six sentences now and then says one twice, and then fails.
    roles |= {"environment.failure_share": 0.9}
    folder = tmp_path / "run"
    assert train.main(recipe("live-engine.yaml", folder, model_folder, cache, roles)) == 0
    rows = metric_rows(folder)
    assert sorted(rows) == [1, 2]
    assert all(row["judge/latency_p95"] >= row["judge/latency_p50"] > 0 for row in rows.values())
