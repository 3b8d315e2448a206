"""Two processes of two devices each give the same run as one process of four."""

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

from mapo_jax.config import load_config
from mapo_jax.errors import UserError
from mapo_jax.run import cards, scenario_deck
from mapo_jax.running import processes
from mapo_jax.running.metrics import METRICS_FILE
from mapo_jax.running.processes import STATUS, join
from mapo_jax.running.run_folder import best_steps, checkpoint_folder, whole_steps
from tests.forked import TRAIN, Forked

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def settings(model_folder, cache):
    """Dialogues end at different turns: rows are short, and messages of users differ in length."""
    return {
        "run.compilation_cache": cache,
        "run.join_seconds": 120,
        "run.silent_seconds": 300,
        "model.path": model_folder,
        "rollout.scenarios": 4,
        "rollout.rollouts": 4,
        "rollout.max_turns": 4,
        "rollout.min_turns": 1,
        "rollout.max_reply_tokens": 6,
        "rollout.max_tokens": 200,
        "environment.fault_rate": 0.1,
        "training.steps": STEPS,
        "training.seed": 5,
        "training.minibatch_scenarios": 2,
        "training.microbatch_tokens": 0,
        "evaluation.every": 3,
        "evaluation.scenarios": 3,
        "evaluation.rollouts": 2,
        "checkpoint.every": 4,
        "optimizer.learning_rate": 0.003,
        "logging.tensorboard": False,
    }


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def launch(settings, folder, *, count=2, devices=2, present=None, **changes):
    """Starts the processes of a run; `changes` may be a function of the process's index."""
    address = f"127.0.0.1:{free_port()}"
    started = []
    for index in range(count) if present is None else present:
        own = {key: value(index) if callable(value) else value for key, value in changes.items()}
        own = settings | {"run.directory": folder} | {k.replace("__", "."): v for k, v in own.items()}
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        }
        if count > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(Forked(TRAIN, [f"{key}={value}" for key, value in own.items()], env=environment))
    return started


def finish(processes, timeout=1000):
    """(status, output, errors) of each."""
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(processes, ended, strict=True)]


def until(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def dialogues(folder, kind, step):
    """A step's saved dialogues in the order of cards, whichever process wrote them."""
    files = sorted((folder / kind).glob(f"step_{step:06d}*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def saved(folder, step=None):
    """A checkpoint's arrays as numpy, on whatever devices they were."""
    import jax
    import orbax.checkpoint as ocp

    state, handler = checkpoint_folder(folder, step).absolute() / "state", ocp.PyTreeCheckpointHandler()
    plain = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(handler.metadata(state).tree)
    )
    return handler.restore(state, args=ocp.args.PyTreeRestore(restore_args=plain))


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    ((status, _, errors),) = finish(launch(settings, folder, count=1, devices=4))
    assert status == 0, errors
    return folder


@pytest.fixture(scope="module")
def two(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "two"
    ended = finish(launch(settings, folder))
    assert [status for status, *_ in ended] == [0, 0], ended
    return folder, ended


# What differs: collectives between processes add in another order than those within one, which changes a
# float32 sum by some 1e-7 of its largest term. Measured over ten steps and twenty updates, more than these
# tests make: losses, gradient norms and entropies by at most 3e-7 of their size, weights by at most 1.2e-7.
# The bounds are about ten times that; a term that were left out, or counted twice, would show in the second
# digit.
METRIC = {"rtol": 3e-6, "atol": 1e-6}
WEIGHT = {"rtol": 0, "atol": 2e-6}


def test_two_processes_hold_the_same_dialogues(one, two):
    lengths = set()
    for kind, steps in (("dialogues", range(1, STEPS + 1)), ("evaluations", (0, 3, STEPS))):
        for step in steps:
            left, right = dialogues(one, kind, step), dialogues(two[0], kind, step)
            assert len(left) == len(right) == (16 if kind == "dialogues" else 6)
            for a, b in zip(left, right, strict=True):
                assert a["state"] == b["state"] and a["row"]["ids"] == b["row"]["ids"]
                assert (a["scenario"], a["rollout"]) == (b["scenario"], b["rollout"])
                np.testing.assert_allclose(a["row"]["logprob"], b["row"]["logprob"], atol=1e-4)
                lengths.add(len(a["state"]["turns"]))
    assert len(lengths) > 1  # of unequal length
    assert len(list((two[0] / "dialogues").glob("step_000001-0000*-of-00002.jsonl"))) == 2


def test_two_processes_compute_the_same_advantages_losses_and_gradients(one, two):
    left, right = rows(one), rows(two[0])
    assert [row.keys() for row in left] == [row.keys() for row in right]
    assert sum("actor/loss" in row for row in left) == STEPS
    for a, b in zip(left, right, strict=True):
        for name in a:
            if name.startswith(("timing_s/", "perf/", "sampler/")):
                continue
            if name.startswith("actor/"):
                np.testing.assert_allclose(b[name], a[name], **METRIC, err_msg=name)
            else:  # from the dialogues alone, by the same programs
                assert a[name] == b[name], name
        if "perf/prefilled_share" in a:
            assert a["perf/prefilled_share"] == b["perf/prefilled_share"]


def test_two_processes_end_with_the_same_weights(one, two):
    import jax

    for a, b in zip(jax.tree.leaves(saved(one)), jax.tree.leaves(saved(two[0])), strict=True):
        np.testing.assert_allclose(b, a, **WEIGHT)


def test_only_the_first_process_speaks_and_writes_what_there_is_one_of(two):
    folder, ((_, first, _), (_, second, _)) = two
    assert "that training never saw" in " ".join(first.split()) and f"step    {STEPS}/{STEPS}" in first
    lines = [line for line in second.splitlines() if "peer ranks" not in line]  # Gloo, in pieces
    assert not lines
    assert (folder / "report.html").exists()
    assert whole_steps(folder)[-1] == STEPS and best_steps(folder, whole_steps(folder))


def test_a_run_that_loses_a_process_goes_on_with_others(one, settings, tmp_path):
    """Kills one of two processes, stops one of two on another mesh, and finishes with one process."""
    folder = tmp_path / "moved"
    processes = launch(settings, folder)
    until(lambda: (folder / "dialogues" / "step_000002-00001-of-00002.jsonl").exists())
    killed_at = time.monotonic()
    processes[1].kill()
    (status, _, errors), (_, _, last) = finish(processes)
    assert time.monotonic() - killed_at < 60  # collectives alone would wait for half an hour
    assert status == STATUS, errors
    assert "process 1 of 2 is gone (its connection closed" in errors
    assert "start the same command on every host again" in errors
    assert "process 1 of 2 was killed, or aborted because process 0 is gone" in last

    kept = max(whole_steps(folder), default=0)
    held = max(int(file.name[5:11]) for file in (folder / "dialogues").iterdir())
    processes = launch(settings, folder, mesh__fsdp=2, mesh__data=2)
    until(lambda: (folder / "dialogues" / f"step_{held + 1:06d}-00001-of-00002.jsonl").exists())
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    for status, _, errors in ended:
        assert status == 128 + signal.SIGTERM, ended
        said = re.search(r"stopped by SIGTERM: .* is saved after step (\d+) of 5; the same command", errors)
        assert said and int(said.group(1)) == whole_steps(folder)[-1] > kept, ended

    ((status, output, errors),) = finish(launch(settings, folder, count=1, devices=4, mesh__data=2))
    assert status == 0 and "continuing" in output, errors
    for a, b in zip(rows(one), rows(folder), strict=True):
        assert a["step"] == b["step"]
        for name in a:
            if name.startswith(("actor/loss", "actor/grad_norm", "return/", "advantages/")):
                np.testing.assert_allclose(b[name], a[name], **METRIC, err_msg=name)


@pytest.mark.slow
def test_with_steps_ahead_two_processes_are_as_one(settings, tmp_path):
    """Dialogues, updates and evaluations run beside each other in both processes, and none waits for ever."""
    changes = {"rollout__ahead": 1, "training__steps": 4, "evaluation__every": 2}
    for name, count in (("one", 1), ("two", 2)):
        ended = finish(launch(settings, tmp_path / name, count=count, devices=4 // count, **changes))
        assert [status for status, *_ in ended] == [0] * count, ended
    one, two = tmp_path / "one", tmp_path / "two"
    for step in range(1, 5):
        pairs = zip(dialogues(one, "dialogues", step), dialogues(two, "dialogues", step), strict=True)
        assert all(a["state"] == b["state"] and a["row"]["ids"] == b["row"]["ids"] for a, b in pairs)
    assert [row.get("sampler/staleness") for row in rows(one)] == [
        row.get("sampler/staleness") for row in rows(two)
    ]
    for a, b in zip(jax.tree.leaves(saved(one)), jax.tree.leaves(saved(two)), strict=True):
        np.testing.assert_allclose(b, a, **WEIGHT)


def test_processes_that_disagree_refuse_to_start(settings, tmp_path):
    folder = tmp_path / "disagree"
    ended = finish(launch(settings, folder, training__seed=lambda index: 5 + index))
    for status, _, errors in ended:
        assert status == 2
        assert errors.strip() == (
            "error: processes 0 and 1 disagree: `training.seed` is 5 in process 0 and 6 in process 1; start "
            "the same command with the same code on every host"
        )
    assert not folder.exists()


def test_a_process_with_other_code_is_refused(settings, tmp_path):
    """One process has a changed source file, the same configuration."""
    import shutil

    other = tmp_path / "other"
    shutil.copytree(ROOT / "mapo_jax", other / "mapo_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "mapo_jax" / "errors.py", "a") as file:
        file.write("# changed\n")
    driver = (
        "-c import sys; sys.path.insert(0, sys.argv.pop(1)); import mapo_jax.train as t; sys.exit(t.main())"
    )
    address, ended = f"127.0.0.1:{free_port()}", []
    for index, code in enumerate((ROOT, other)):
        own = settings | {"run.directory": tmp_path / "run"}
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, *driver.split(" ", 1), str(code), *(f"{k}={v}" for k, v in own.items())]
        ended.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=code
            )
        )
    for status, _, errors in finish(ended):
        assert status == 2 and "disagree: the code (its digest) is" in errors, errors


def test_a_missing_worker_is_counted(settings, tmp_path):
    ended = finish(launch(settings, tmp_path / "run", count=3, present=[0, 2], run__join_seconds=8))
    for status, _, errors in ended:
        assert status == 2
        assert "only 2 of 3 processes joined within 8 s; missing: process 1." in errors
    assert not (tmp_path / "run").exists()


def test_what_processes_cannot_share_is_one_sentence_each(settings, tmp_path):
    ended = finish(launch(settings, tmp_path / "run", rollout__scenarios=3, training__minibatch_scenarios=3))
    for status, _, errors in ended:
        assert status in (2, STATUS)
        assert "`rollout.scenarios` is 3; it must be a multiple of the 2 processes" in errors


def live(url):
    """A live world without pauses: a loss that counted as an outage would end the run at once."""
    roles = {f"environment__{role}__url": url for role in ("user", "judge", "director")}
    roles |= {f"environment__{role}__model": "m" for role in ("user", "judge", "director")}
    return roles | {
        "environment__family": "live",
        "environment__fault_rate": 0,
        "environment__failure_share": 1.0,
        "environment__pause_minutes": 0,
        "environment__concurrency": 2,
        "rollout__scenarios": 2,
        "rollout__rollouts": 2,
        "rollout__max_turns": 2,
        "rollout__max_tokens": 512,
        "training__minibatch_scenarios": 1,
        "training__steps": 1,
        "evaluation__every": 1,
        "evaluation__rollouts": 1,
    }


def without_judgement(well_formed, *names):
    """A server whose judge gives no valid answer about these persons."""

    def answer(request, number):
        lost = "C_progress" in str(request.get("response_format")) and any(
            name in str(request["messages"]) for name in names
        )
        return "I cannot say." if lost else well_formed(request, number)

    return answer


def names_of(settings, **changes):
    """The persons of the first step, and those of evaluations."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config = load_config(None, [f"{key}={value}" for key, value in (settings | changes).items()])
    persons = next(scenario_deck(config)), cards(config, "validation")
    return [[card.person.name for card in each] for each in persons]


@pytest.mark.slow
def test_a_process_without_a_usable_dialogue_is_no_outage(serve, well_formed, settings, tmp_path):
    """Process 0 has no validation card; process 1 loses every dialogue of its only training card."""
    folder, world = tmp_path / "run", live("http://127.0.0.1:9/v1")
    trained, _ = names_of(settings, **world)
    server = serve(without_judgement(well_formed, trained[1]), latency=0.02)
    ended = finish(launch(settings, folder, devices=1, **live(server.url), evaluation__scenarios=1))
    assert [status for status, *_ in ended] == [0, 0], ended
    assert "pause" not in ended[0][1]
    expected = {"evaluations": [True], "dialogues": [True, True, False, False]}
    for kind, step in (("evaluations", 0), ("evaluations", 1), ("dialogues", 1)):
        held = dialogues(folder, kind, step)
        scored = [any(turn["judgement"] for turn in dialogue["state"]["turns"]) for dialogue in held]
        assert scored == expected[kind]
    assert sum("actor/loss" in row for row in rows(folder)) == 1
    # Two calls at once in all: one in each of two processes.
    assert server.most <= 2


def test_a_step_that_all_processes_lose_is_an_outage_in_all(serve, well_formed, settings, tmp_path):
    """They pause together and fail together, with the error of a single process."""
    folder, world = tmp_path / "run", live("http://127.0.0.1:9/v1")
    server = serve(without_judgement(well_formed, *names_of(settings, **world)[0]))
    world = live(server.url) | {"environment__pause_minutes": 0.02}
    ended = finish(launch(settings, folder, devices=1, **world, evaluation__scenarios=1))
    assert "pause 5 of 5" in ended[0][1]
    for status, _, errors in ended:
        assert status == 2, errors
        assert "none of the 4 dialogues has enough scored turns and a proper end; 0.02 minutes" in errors


JOINING = """
import os, signal, sys, time
from mapo_jax.commands import run_command
from mapo_jax.config import load_config
from mapo_jax.running.processes import join
config = load_config(None, sys.argv[1:])
def command():
    with join(config) as processes:
        print(processes.count, processes.exchange("joined", processes.index), flush=True)
        if config.run.deadline_minutes:  # stands for being killed: in process 0
            processes.first and os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        processes.finish()
sys.exit(run_command(command))
"""


def named(index, port):
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }


def by_open_mpi(index, port):
    """As `mpirun` sets them; the port would follow from the job's number."""
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "JAX_COORDINATOR_PORT": str(port),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }


def joined(variables, *overrides, present=(0, 1)):
    """Status, output and errors of processes that only join; overrides may be functions of the index."""
    port = free_port()
    processes = []
    for index in present:
        own = [
            o(index) if callable(o) else o
            for o in ("run.join_seconds=60", "run.silent_seconds=60", *overrides)
        ]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | variables(index, port)
        processes.append(Forked(JOINING, own, env=environment))
    return finish(processes, timeout=120)


def test_processes_that_a_cluster_has_started_need_no_variables():
    for status, output, errors in joined(by_open_mpi):
        assert status == 0 and "2 [0, 1]" in output, errors


def test_a_task_that_a_cluster_has_started_alone_is_a_single_process():
    variables = {"OMPI_COMM_WORLD_SIZE": "1"}
    ((status, output, errors),) = joined(lambda *where: by_open_mpi(*where) | variables, present=[0])
    assert status == 0 and output == "1 [0]\n" and errors == ""


def test_processes_of_a_cluster_that_disagree_refuse_with_one_sentence():
    for status, _, errors in joined(by_open_mpi, lambda index: f"training.seed={index}"):
        assert status == 2
        assert "error: processes 0 and 1 disagree: `training.seed` is 0 in process 0 and 1 in" in errors


def test_a_cluster_whose_processes_do_not_come_is_said_in_a_sentence():
    ((status, _, errors),) = joined(by_open_mpi, "run.join_seconds=3", present=[0])
    assert status not in (0, 2)
    assert "error: not all processes of this cluster came within 3 s; start the same command" in errors


def test_a_killed_process_0_ends_the_others_with_a_sentence():
    (first, _, last), (status, _, errors) = joined(named, "run.deadline_minutes=1")
    assert first == -signal.SIGKILL and "process 0 of 2 was killed, or aborted" in last
    # Which is first, our connection or the one of jax, which aborts; in both cases there is a sentence.
    assert status in (STATUS, -signal.SIGABRT)
    assert (
        "process 0 of 2 is gone (its connection closed" in errors or "1 of 2 was killed, or aborted" in errors
    )


@pytest.mark.parametrize(
    "changes,said",
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "127.0.0.1"},
            "JAX_COORDINATOR_ADDRESS is '127.0.0.1'; it must be HOST:PORT",
        ),
        (
            {"JAX_COORDINATOR_BIND_ADDRESS": ":1"},
            "JAX_COORDINATOR_BIND_ADDRESS is ':1'; it must be HOST:PORT",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "192.0.2.1:7000"}, "process 0 cannot listen at 192.0.2.1:7000"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:70000"}, "process 0 cannot listen at 127.0.0.1:70000"),
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2; it must be between 0 and"),
        ({"JAX_PROCESS_ID": "one"}, "must be whole numbers"),
    ],
)
def test_variables_that_make_no_sense_are_named(changes, said, monkeypatch):
    for name, value in (named(0, free_port()) | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(said)):
        join(load_config(None, []))


def test_process_0_listens_at_its_own_address_alone(monkeypatch):
    """Otherwise programs in all networks of the machine could connect."""
    heard = []
    monkeypatch.setattr(
        processes, "Peers", lambda where, *rest: heard.append(where.getsockname()) or FakePeers()
    )
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **options: heard.append(options))
    monkeypatch.setattr(processes.Sentinel, "post", lambda sentence: None)
    port = free_port()
    for name, value in named(0, port).items():
        monkeypatch.setenv(name, value)
    join(load_config(None, ["run.join_seconds=7.5", "run.silent_seconds=9"]))
    assert heard[0] == ("127.0.0.1", port)
    assert heard[1] == {
        "initialization_timeout": 8,
        "heartbeat_timeout_seconds": 18,
        "shutdown_timeout_seconds": 9,
        "coordinator_bind_address": f"127.0.0.1:{port}",
    }


class FakePeers:
    index, count, over = 0, 2, False

    def exchange(self, what, value, everybody=True):
        return [value, value]
