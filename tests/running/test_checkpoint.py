import ast
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mapo_jax.config import known_keys, load_config, to_yaml, updated
from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.learning.optimizer import make_optimizer
from mapo_jax.learning.train_state import TrainState, create_state
from mapo_jax.running import checkpoint
from mapo_jax.running.checkpoint import (
    Checkpoints,
    open_params,
    read_progress,
    restore_params,
    save_base,
)
from mapo_jax.running.metrics import MetricWriter
from mapo_jax.running.run_folder import (
    BASE_FOLDER,
    HARMLESS_KEYS,
    best_steps,
    checkpoint_folder,
    claim,
    cut_back,
    refuse_lost_checkpoints,
)
from tests.forked import run_forked

OPTIMIZER = make_optimizer(load_config().optimizer, 10)
PROGRESS = {"seed": 7, "data": {"next_index": 5, "epoch": [1, 2]}, "configuration": "training:\n  seed: 7\n"}


def make_state(seed=0, *, updates=2, reference=True) -> TrainState:
    """A state with non-zero moments and random values."""
    random = np.random.default_rng(seed)
    params = {
        "embed": {"embedding": random.normal(size=(5, 3)).astype(np.float32)},
        "layers": {"norm": {"scale": random.normal(size=(2, 3)).astype(np.float32)}},
    }
    state = create_state(jax.tree.map(jnp.array, params), OPTIMIZER, reference=reference)
    for _ in range(updates):
        gradient = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), params)
        _, moments = OPTIMIZER.transform.update(gradient, state.opt_state, state.params)
        state = replace(state, opt_state=moments, step=state.step + 1)
    return state


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("reference", [True, False])
def test_round_trip_is_bitwise_and_complete(tmp_path, reference):
    state = make_state(reference=reference)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(state) is None
        checkpoints.save(3, state, PROGRESS)
    with Checkpoints(tmp_path) as checkpoints:
        restored, progress = checkpoints.restore_latest(make_state(1, updates=0, reference=reference))
    assert_same_bits(restored, state)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(restored.opt_state))
    assert progress == {**PROGRESS, "step": 3}


def test_buffers_may_be_donated_while_the_save_goes_on(tmp_path):
    double = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), donate_argnums=0)
    state = make_state()
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = double(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore_latest(state)
    assert_same_bits(restored, expected)


def test_newest_and_best_are_kept(tmp_path):
    (tmp_path / "evaluations").mkdir()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, score in enumerate([0.1, 0.9, 0.3, None, 0.2]):
            checkpoints.save(step, make_state(step), {})
            if score is not None:  # the weights of a step are evaluated after they were saved
                file = tmp_path / "evaluations" / f"step_{step:06d}.json"
                file.write_text(json.dumps({"return/mean": score}))
        checkpoints.wait()
        assert checkpoints.steps == [1, 3, 4]
        assert best_steps(tmp_path, checkpoints.steps) == [1, 4]
        (tmp_path / "evaluations" / "step_000003.json").write_text('{"return/mean": 7')  # cut
        (tmp_path / "evaluations" / "step_000004.json").write_text("null")
        assert best_steps(tmp_path, checkpoints.steps) == [1]
        checkpoints.save(4, make_state(9), {})  # already saved: left alone
        restored, _ = checkpoints.restore_latest(make_state())
        assert_same_bits(restored, make_state(4))


def test_an_interrupted_save_is_ignored_and_cleaned_away(tmp_path):
    """A process that dies with a save under way, as by SIGKILL."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
    script = f"""
        import os, jax.numpy as jnp, optax
        from mapo_jax.running.checkpoint import Checkpoints
        from mapo_jax.learning.train_state import TrainState
        big = jnp.arange(20_000_000, dtype=jnp.float32)
        Checkpoints({str(tmp_path)!r}).save(2, TrainState({{"big": big}}, (), jnp.int32(1)), {{}})
        os._exit(9)
    """
    assert run_forked(textwrap.dedent(script)).returncode == 9
    left = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert len(left) == 2 and left[1].startswith("2.orbax-checkpoint-tmp"), "the save was not interrupted"

    assert checkpoint_folder(tmp_path).name == "1"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        restored, _ = checkpoints.restore_latest(make_state(1))
        checkpoints.save(2, make_state(2), {})
    assert_same_bits(restored, make_state())
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert_same_bits(restore_params(checkpoint_folder(tmp_path), make_state().params), make_state(2).params)


def test_restores_into_the_templates_shardings(tmp_path):
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), make_state(1)
        )
        restored, _ = checkpoints.restore_latest(template)
    assert_same_bits(restored, make_state())
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored))


def test_weights_alone_for_another_run(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, PROGRESS)
        checkpoints.save(2, make_state(2), PROGRESS)
    assert_same_bits(restore_params(checkpoint_folder(tmp_path, 1), state.params), state.params)
    assert_same_bits(restore_params(checkpoint_folder(tmp_path), state.params), make_state(2).params)
    assert read_progress(checkpoint_folder(tmp_path))["seed"] == 7

    with pytest.raises(UserError, match=r"has an evaluation; give its number"):
        checkpoint_folder(tmp_path, "best")
    write_whole(tmp_path / "evaluations" / "step_000001.json", '{"return/mean": 0.5}')
    assert checkpoint_folder(tmp_path, "best").name == "1"
    with pytest.raises(UserError, match=r"no checkpoint of step 5; it has 1, 2"):
        checkpoint_folder(tmp_path, 5)
    with pytest.raises(UserError, match=r"nowhere holds no whole checkpoint; train there first"):
        checkpoint_folder(tmp_path / "nowhere")


def test_weights_that_do_not_fit_are_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
    folder, params = checkpoint_folder(tmp_path), make_state().params
    wider = {**params, "embed": {"embedding": np.zeros((5, 4), np.float32)}}
    with pytest.raises(UserError, match=r"params.embed.embedding has shape \(5, 3\) in .* and \(5, 4\) here"):
        restore_params(folder, wider)
    with pytest.raises(UserError, match=r"has no params.head.kernel; use the configuration"):
        restore_params(folder, {**params, "head": {"kernel": np.zeros((3, 5), np.float32)}})
    with pytest.raises(UserError, match=r"has params.layers.norm.scale, which this model does not"):
        restore_params(folder, {"embed": params["embed"]})


def test_a_damaged_checkpoint_says_so(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
    for file in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:3])
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"1 \(step 1\) is damaged: state/"),
    ):
        checkpoints.restore_latest(make_state())


def saved_twice(folder):
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), PROGRESS)


def flipped(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)


def test_one_damaged_byte_is_refused_and_the_remedy_works(tmp_path):
    """In every file that a restore reads, at its beginning, middle and end."""
    saved_twice(tmp_path)
    folder = tmp_path / "checkpoints" / "2"
    read = [file for name in ("state", "progress") for file in (folder / name).rglob("*") if file.is_file()]
    read = [file for file in read if file.name != "commit_success.txt"]
    assert len(read) > 8
    with Checkpoints(tmp_path) as checkpoints:
        for file in read:
            for place in (0, file.stat().st_size // 2, -3):
                flipped(file, place)
                with pytest.raises(UserError, match=rf"2 \(step 2\) is damaged: .*{file.name} ") as told:
                    checkpoints.restore_latest(make_state())
                remedy = f"remove that folder to go on from the one before it, {folder.with_name('1')}"
                assert remedy in str(told.value)
                flipped(file, place)
        restored, _ = checkpoints.restore_latest(make_state())
    assert_same_bits(restored, make_state(2))
    flipped(read[0], 5)
    shutil.rmtree(folder)
    with Checkpoints(tmp_path) as checkpoints:
        restored, progress = checkpoints.restore_latest(make_state())
    assert_same_bits(restored, make_state(1))
    assert progress == {**PROGRESS, "step": 1}


@pytest.mark.parametrize(
    "name", ["state/checksums.json", "state/manifest.ocdbt", "progress/metadata", "state"]
)
def test_a_missing_part_of_a_checkpoint_is_refused(tmp_path, name):
    saved_twice(tmp_path)
    part = tmp_path / "checkpoints" / "2" / name
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    for read in (
        lambda: restore_params(checkpoint_folder(tmp_path), make_state().params),
        lambda: open_params(checkpoint_folder(tmp_path), make_state().params),
        lambda: Checkpoints(tmp_path).restore_latest(make_state()),
    ):
        if name == "progress/metadata" and read.__code__.co_names[0] != "Checkpoints":
            continue  # parameters alone need no progress
        with pytest.raises(UserError, match=r"2 \(step 2\) is damaged: "):
            read()


def test_without_an_earlier_checkpoint_no_removal_is_advised(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), PROGRESS)
        checkpoints.wait()
        flipped(tmp_path / "checkpoints" / "1" / "state" / "_METADATA", 9)
        with pytest.raises(UserError, match="no checkpoint before it: start a new run in another"):
            checkpoints.restore_latest(make_state())


def test_the_frozen_weights_have_checksums_too(tmp_path):
    params = make_state().params
    save_base(tmp_path, params)
    save_base(tmp_path, params)  # replaces the first
    assert_same_bits(restore_params(tmp_path / BASE_FOLDER, params), params)
    files = [file for file in (tmp_path / "base" / "state").rglob("*") if file.is_file()]
    for file in files:
        if file.name in ("commit_success.txt", "_CHECKPOINT_METADATA"):  # orbax's, and never read
            continue
        flipped(file, file.stat().st_size // 2)
        for read in (restore_params, open_params):
            with pytest.raises(UserError, match=rf"base \(the frozen weights\) is damaged: .*{file.name}"):
                read(tmp_path / BASE_FOLDER, params)
        flipped(file, file.stat().st_size // 2)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match="put it back from a copy"):
        restore_params(tmp_path / BASE_FOLDER, params)


def test_a_checkpoint_of_an_earlier_version_is_read_and_its_lack_said(tmp_path, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), PROGRESS)
        checkpoints.wait()
        folder = tmp_path / "checkpoints" / "1"
        (folder / "state" / "checksums.json").unlink()
        (folder / "progress" / "metadata").write_text(json.dumps({**PROGRESS, "step": 1}))
        restored, progress = checkpoints.restore_latest(make_state(3))
    assert_same_bits(restored, make_state())
    assert progress == {**PROGRESS, "step": 1} and "without checksums" in caplog.text


def test_a_missing_platform_is_not_blamed_on_the_checkpoint(tmp_path):
    saved_twice(tmp_path)
    script = f"""
        import numpy as np
        from mapo_jax.commands import run_command
        from mapo_jax.running.checkpoint import restore_params
        from mapo_jax.running.run_folder import checkpoint_folder
        from jax import ShapeDtypeStruct
        template = {{"embed": {{"embedding": ShapeDtypeStruct((5, 3), np.float32)}},
                     "layers": {{"norm": {{"scale": ShapeDtypeStruct((2, 3), np.float32)}}}}}}
        raise SystemExit(run_command(lambda: restore_params(checkpoint_folder({str(tmp_path)!r}), template)))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
    )
    assert result.returncode == 2 and "JAX_PLATFORMS=nonsense" in result.stderr, result.stderr
    assert "remove" not in result.stderr


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of one megabyte; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_clear_error_and_harms_nothing(tiny_disk):
    state = make_state()
    big = replace(state, params={"big": jnp.asarray(np.random.default_rng(0).random(10**6, np.float32))})
    with (
        pytest.raises(UserError, match=r"the disk that holds .*checkpoints is full; free some space"),
        Checkpoints(tiny_disk) as checkpoints,
    ):
        checkpoints.save(1, state, PROGRESS)
        checkpoints.save(2, big, PROGRESS)
    with Checkpoints(tiny_disk) as checkpoints:
        assert checkpoints.steps == [1]
        restored, progress = checkpoints.restore_latest(make_state(1))
    assert_same_bits(restored, state)
    assert progress["step"] == 1


def test_a_full_disk_at_once_is_the_same_error(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(checkpoints._manager, "save", lambda *_, **__: raise_(full))
        with pytest.raises(UserError, match="is full"):
            checkpoints.save(1, make_state(), {})


def raise_(error):
    raise error


def test_claim_makes_a_folder_and_continues_the_same_run(tmp_path):
    folder = tmp_path / "runs" / "one"
    config = load_config(overrides=["algorithm.discount=0.9"])
    with claim(folder, config) as continues:
        assert not continues
    assert load_config(folder / "config.yaml") == config
    harmless = updated(config, {"logging.progress": False})
    with claim(folder, harmless) as continues:
        assert continues
    assert load_config(folder / "config.yaml") == config


def test_claim_continues_a_run_of_version_0_1_where_nothing_changes(tmp_path):
    config, file = load_config(), tmp_path / "run" / "config.yaml"
    with claim(file.parent, config):
        pass
    stored = file.read_text()
    file.write_text(stored.replace("rollout:\n", "rollout:\n  top_p: 1.0\n  lanes: null\n"))
    with claim(file.parent, config) as continues:
        assert continues
    file.write_text(stored.replace("rollout:\n", "rollout:\n  lanes: 4\n"))
    with pytest.raises(UserError, match=r"`rollout.lanes` \(4\) is gone"), claim(file.parent, config):
        pass


@pytest.mark.parametrize(
    "advised",
    [
        "rollout.copy_weights=false",
        "model.remat=block",
        "model.attention=xla",
        "training.microbatch_tokens=1",
        "rollout.slots=2",
        "mesh.tensor=2",
        "environment.judge.extra_body={slots: 2, tokens: 512}",
    ],
)
def test_a_run_continues_with_what_errors_tell_to_change(tmp_path, advised):
    with claim(tmp_path / "run", load_config()):
        pass
    with claim(tmp_path / "run", load_config(overrides=[advised])) as continues:
        assert continues


# Raised before anything is written, or about folders and servers of the user.
RAISED_EARLY = {
    "capacity.py": {
        "lower `rollout.max_tokens`",
        "lower `rollout.max_reply_tokens` or raise `rollout.max_tokens`",
    },
    "engine.py": {"raise `rollout.max_tokens` or shorten the prompt"},  # about prompts outside of dialogues
    "role_models.py": {"check environment..url, .model and .key_variable"},
}


def advice():
    """The remedies in the errors of a run, after the semicolon: (file, words)."""
    package = Path(checkpoint.__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        if file.relative_to(package).parts[0] not in (
            "learning",
            "running",
            "rollout",
            "model",
            "run.py",
            "stages.py",
            "role_models.py",
            "world.py",
        ):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                parts = [
                    n.value
                    for n in ast.walk(node)
                    if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                for words in "".join(parts).split("; ")[1:]:
                    yield file.name, words


def test_errors_advise_what_a_run_may_change_or_a_new_run():
    seen = set()
    for file, words in advice():
        named = {key for key in known_keys() if re.search(rf"\b{re.escape(key)}\b", words)}
        seen |= named
        before, new_run, _ = words.partition("new run")
        fixed = {
            key for key in named if re.search(rf"\b{re.escape(key)}\b", before if new_run else words)
            and not key.startswith(HARMLESS_KEYS)
        }  # fmt: skip
        assert not fixed or words in RAISED_EARLY.get(file, ()), (file, words)
    assert {"model.remat", "rollout.copy_weights", "training.microbatch_tokens", "rollout.max_tokens"} <= seen


def test_claim_refuses_what_is_not_this_run(tmp_path):
    def refuses(folder, config, sentence):
        before = sorted((entry, entry.stat().st_mtime_ns) for entry in tmp_path.rglob("*"))
        with pytest.raises(UserError, match=sentence), claim(folder, config):
            pass
        assert before == sorted((entry, entry.stat().st_mtime_ns) for entry in tmp_path.rglob("*"))

    folder = tmp_path / "run"
    with claim(folder, load_config()):
        pass
    refuses(
        folder,
        load_config(overrides=["algorithm.discount=0.5"]),
        r"run holds a run with algorithm.discount=0.85, not 0.5; choose another run.directory, or",
    )
    refuses(
        folder,
        load_config(overrides=["training.seed=3", "algorithm.discount=0.5"]),
        r"algorithm.discount=0.85, not 0.5 \(and 1 more: training.seed\)",
    )
    (folder / "checkpoints" / "45").mkdir(parents=True)
    refuses(
        folder,
        load_config(overrides=["training.steps=60"]),
        r"train its weights further in a new folder: python -m mapo_jax.train --config \S+/run/config.yaml "
        r"model.path=\S+/run run.directory=NEW training.steps=60",
    )
    (folder / "config.yaml").write_text("- a\n- list\n")
    refuses(folder, load_config(), r"config.yaml is no configuration of a run")
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").touch()
    refuses(other, load_config(), r"photos holds files but no run \(cat.png, ...\); choose a new or empty")
    refuses(other / "cat.png", load_config(), r"cat.png is a file; choose a folder")


def test_what_is_advised_for_more_steps_goes_on_with_the_runs_own_settings(tmp_path):
    """Also in a folder whose name a shell would cut, and with the roles of a live world."""
    folder = tmp_path / "my runs" / "it's one"
    settings = ["environment.judge.implementation=a:B", "algorithm.estimator=grpo", "training.seed=3"]
    with claim(folder, load_config(overrides=settings)):
        (folder / "checkpoints" / "45").mkdir(parents=True)
    more = load_config(overrides=[*settings, "training.steps=12"])
    with pytest.raises(UserError) as caught, claim(folder, more):
        pass
    words = shlex.split(str(caught.value).rpartition("python -m mapo_jax.train ")[2])
    assert words[0] == "--config"
    found = load_config(words[1], words[2:])
    assert found == updated(more, {"model.path": str(folder), "run.directory": "NEW"})


def test_a_run_folder_belongs_to_one_process_and_a_killed_one_frees_it(tmp_path):
    config = load_config()
    with (
        claim(tmp_path / "run", config),
        pytest.raises(UserError, match=r"another process is training in .*run; wait for it, stop it, or"),
        claim(tmp_path / "run", config),
    ):
        pass
    with claim(tmp_path / "run", config) as continues:
        assert continues


def write_run(folder):
    """Steps 0 to 3, and the half-written files of a kill."""
    with MetricWriter(folder, tensorboard=False) as writer:
        for step in range(4):
            writer.write(step, {"reward/mean": step / 2})
    for name in (
        "dialogues/step_000001.jsonl",
        "dialogues/step_000003.jsonl",
        "evaluations/step_000002.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward/me')
    (folder / "dialogues" / ".step_000004.jsonl.x8k2").write_text("half")


def test_cut_back_leaves_what_the_checkpoint_knows(tmp_path):
    write_run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert cut_back(tmp_path, 2) == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:3])
    assert [entry.name for entry in (tmp_path / "dialogues").iterdir()] == ["step_000001.jsonl"]
    assert [entry.name for entry in (tmp_path / "evaluations").iterdir()] == ["step_000002.json"]

    once = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    cut_back(tmp_path, 2)
    assert once == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    cut_back(tmp_path, -1)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    cut_back(tmp_path / "new", -1)


def test_cut_back_keeps_whole_steps_and_drops_only_torn_tails(tmp_path):
    write_run(tmp_path)
    cut_back(tmp_path, 3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert (tmp_path / "dialogues" / "step_000003.jsonl").exists()


def test_what_the_metrics_lack_is_said(tmp_path):
    write_run(tmp_path)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:2], "null\n", "{}\n", "[" * 10**5 + "\n", *lines[3:]]))
    damaged, lacking = cut_back(tmp_path, 3)
    assert "3 damaged lines of" in damaged
    assert "lacks the rows of 1 of the 3 finished steps (from 2 to 2)" in lacking
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 3]
    assert cut_back(tmp_path, 3) == [lacking]
    file.unlink()
    assert "lacks the rows of 3 of the 3" in cut_back(tmp_path, 3)[0]


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tmp_path):
    config = load_config(overrides=["checkpoint.every=2", "evaluation.every=50"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 5):
            writer.write(step, {"reward/mean": 0.0})
        refuse_lost_checkpoints(tmp_path, config)  # the save of step 2 may never have ended
        writer.write(5, {"reward/mean": 0.0})
        with pytest.raises(UserError, match=r"up to step 5, but no whole checkpoint is left in checkpoints/"):
            refuse_lost_checkpoints(tmp_path, config)
    rarer = updated(config, {"checkpoint.every": 10})
    refuse_lost_checkpoints(tmp_path, rarer)  # as it may have been when the steps were taken


@pytest.mark.parametrize("content", ["", "{", "null", "[1]", '{"return/mean": "x"}', '{"return/mean": null}'])
def test_an_evaluation_that_cannot_be_read_ranks_no_checkpoint(tmp_path, content):
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "step_000001.json").write_text(content)
    (tmp_path / "evaluations" / "step_000002.json").write_text('{"return/mean": -1.0}')
    assert best_steps(tmp_path, [1, 2, 3]) == [2]


def test_cut_back_on_a_full_disk_harms_nothing(tmp_path, monkeypatch):
    write_run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("mapo_jax.files.os.fsync", lambda _: raise_(full))
    with pytest.raises(UserError, match="is full"):
        cut_back(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
