"""Runs with steps ahead: the same numbers whatever the latency and the interruptions, and what is refused."""

import asyncio
import json
import random

import jax
import numpy as np
import pytest
from rich.console import Console

from mapo_jax import stages, train
from mapo_jax.config import load_config
from mapo_jax.environment.roles import Roles
from mapo_jax.rollout.engine import Engine
from mapo_jax.running.checkpoint import Checkpoints
from mapo_jax.running.metrics import METRICS_FILE
from mapo_jax.running.run_folder import checkpoint_folder

STEPS = 5


@pytest.fixture(scope="module")
def start(model_folder, tmp_path_factory):
    """`start(folder, **changes)`: trains to the end, in this process."""
    cache = tmp_path_factory.mktemp("programs")

    def start(folder, **changes):
        settings = {
            "run.directory": folder,
            "run.compilation_cache": cache,
            "model.path": model_folder,
            "rollout.ahead": 1,
            "rollout.scenarios": 2,
            "rollout.rollouts": 2,
            "rollout.max_turns": 2,
            "rollout.min_turns": 2,
            "rollout.max_reply_tokens": 4,
            "rollout.max_tokens": 256,
            "training.steps": STEPS,
            "training.minibatch_scenarios": 1,
            "evaluation.every": 3,
            "evaluation.scenarios": 1,
            "evaluation.rollouts": 1,
            "checkpoint.every": 2,
            "logging.tensorboard": False,
            "logging.progress": False,
            "optimizer.learning_rate": 0.01,
        } | {key.replace("__", "."): value for key, value in changes.items()}
        train.train(
            load_config(None, [f"{k}={json.dumps(v, default=str)}" for k, v in settings.items()]),
            Console(quiet=True),
        )
        return folder

    return start


def content(folder):
    """Weights and numbers of a finished run, without times."""
    import orbax.checkpoint as ocp

    state = ocp.PyTreeCheckpointHandler().restore(checkpoint_folder(folder, STEPS).absolute() / "state")
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]
    files = {file.name: file.read_bytes() for file in sorted((folder / "dialogues").iterdir())}
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)], rows, files


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    return start(tmp_path_factory.mktemp("runs") / "undisturbed")


def test_the_version_that_speaks_follows_from_the_step(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / METRICS_FILE).read_text().splitlines()]
    rows = [row for row in rows if "reward/mean" in row]
    assert [row["sampler/version"] for row in rows] == [0, 0, 1, 2, 3]
    assert [row["sampler/staleness"] for row in rows] == [0, 1, 1, 1, 1]
    # The denominator of the ratio is the speaker's: it is 1 in the first update only of weights that spoke.
    gaps = [row["sampler/logprob_diff_mean"] for row in rows]
    assert gaps[0] < 1e-5 and min(gaps[1:]) > 1e-3
    for row in rows:
        assert 0 < row["perf/device_busy"] <= 1 and row["timing_s/waiting_for_world"] >= 0
    for step, version in enumerate((0, 0, 1, 2, 3)):
        lines = (undisturbed / "dialogues" / f"step_{step + 1:06d}.jsonl").read_text().splitlines()
        assert {json.loads(line)["weight_version"] for line in lines} == {version}
        assert {json.loads(line)["step"] for line in lines} == {step}


def test_latency_changes_nothing(start, undisturbed, tmp_path, monkeypatch):
    class Slow:
        def __init__(self, role):
            self._role, self._seconds = role, random.Random(1)

        def __getattr__(self, name):
            async def call(*arguments):
                await asyncio.sleep(self._seconds.uniform(0, 0.1))
                return await getattr(self._role, name)(*arguments)

            return call

    def slow_collect(scenarios, rollouts, engine, chat, roles, *rest, **options):
        slow = Roles(Slow(roles.user), Slow(roles.judge), Slow(roles.director))
        return collect(scenarios, rollouts, engine, chat, slow, *rest, **options)

    collect = stages.collect
    monkeypatch.setattr(stages, "collect", slow_collect)
    assert content(start(tmp_path / "slow")) == content(undisturbed)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("where", "method", "calls"), [(train, "place", 6), (Checkpoints, "save", 3), (Engine, "advance", 40)]
)
def test_killed_and_continued_it_ends_the_same(
    start, undisturbed, tmp_path, monkeypatch, where, method, calls
):
    whole, left = getattr(where, method), [calls]

    def killing(*arguments, **options):
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        return whole(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, method, killing)
        start(tmp_path / "killed")
    assert content(start(tmp_path / "killed")) == content(undisturbed)
