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
from mapo_jax.errors import UserError
from mapo_jax.model.sharding import make_mesh
from mapo_jax.rollout.engine import Engine
from mapo_jax.running import forecast
from mapo_jax.running.checkpoint import Checkpoints
from mapo_jax.running.memory import forecast_memory
from mapo_jax.running.metrics import METRICS_FILE
from mapo_jax.running.run_folder import checkpoint_folder, whole_steps

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


def test_killed_in_update_save_and_rollout_it_ends_the_same(start, undisturbed, tmp_path, monkeypatch):
    """The dialogues of the steps under way are held again by the weights that the checkpoint has kept."""

    def dying(function, calls):
        left = iter(range(calls - 1))

        def call(*arguments, **options):
            if next(left, None) is None:
                raise Killed
            return function(*arguments, **options)

        return call

    for where, method, calls in ((train, "place", 6), (Checkpoints, "save", 2), (Engine, "advance", 5)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(where, method, dying(getattr(where, method), calls))
            start(tmp_path / "killed")
    assert 0 < max(whole_steps(tmp_path / "killed")) < STEPS
    assert content(start(tmp_path / "killed")) == content(undisturbed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rollout.ahead=-1"], r"`rollout\.ahead`"),
        (
            ["rollout.ahead=1", "environment.family=live"]
            + [f"environment.{role}.model=engine:x" for role in ("user", "judge", "director")],
            r"`rollout\.ahead` is 1; it must be 0 with environment\.user\.model=engine:x",
        ),
    ],
)
def test_settings_that_it_cannot_go_with(settings, message):
    with pytest.raises(UserError, match=message):
        load_config(None, settings)


def test_the_memory_of_every_step_under_way_is_counted(monkeypatch):
    """Caches and weights of N + 1 steps, during updates too; what they do not fit is refused with figures."""
    found = {}
    for ahead in (0, 2):
        config = load_config(None, [f"rollout.ahead={ahead}"])
        model, mesh = forecast.model_shape(config), make_mesh(config.mesh, jax.devices()[:1])
        found[ahead] = forecast_memory(config, model, mesh)
    caches, copy = "KV caches (float32)", "weights that are trained"
    assert found[2].held[caches] == 3 * found[0].rollout[caches] and not found[2].rollout
    assert found[2].held["weights of 3 steps (float32)"] == 3 * found[0].held[copy]
    needed = sum(found[2].held.values()) + found[2].update["gradient"]
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: needed - 1)
    with pytest.raises(UserError, match=r"`rollout\.ahead` is 2, with which each device needs .* KV caches"):
        forecast.check_memory(config, model, mesh)
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: needed)
    forecast.check_memory(config, model, mesh)


def test_the_forecast_says_what_it_would_bring(monkeypatch, tmp_path):
    """Ten turns of 10 s of calls and an opening of 4 s; the devices' time is that of the run's steps."""
    settings = ["environment.family=live", "rollout.rollouts=8", "rollout.max_turns=10"]
    settings += [f"run.directory={tmp_path}"]
    for role, seconds in (("user", 4), ("judge", 5), ("director", 1)):
        settings += [f"environment.{role}.{key}" for key in ("model=m", "url=http://a", f"seconds={seconds}")]
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "perf/device_busy": 0.5, "timing_s/step": 80.0}\n')
    config = load_config(None, [*settings, "environment.concurrency=128"])
    title, *lines = forecast.ahead_table(config, forecast.model_shape(config), make_mesh(config.mesh))
    assert "40 s, measured" in title
    assert [int(line.split()[1]) for line in lines] == [144, 72, 50]  # 64 dialogues x 100 s / 128 are 50 s
    assert forecast.ahead_table(load_config(), None, None) == []
