"""A dry run makes the checks of a run, and says what differs, how large it is and how long it takes."""

import os
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

from mapo_jax import train
from mapo_jax.config import load_config
from mapo_jax.dry_run import dry_run
from mapo_jax.model.sharding import make_mesh
from mapo_jax.running import forecast
from mapo_jax.running.memory import forecast_memory
from tests.forked import run_forked


def said(capsys, *arguments):
    status = train.main(["--dry-run", *arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_the_summary_fits_a_screen_and_full_has_the_rest(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default folder may hold a run
    folder = tmp_path / "run"
    settings = ["training.steps=3", "algorithm.estimator=grpo", "algorithm.turn_weight=0.5"]
    status, shown, _ = said(capsys, *settings, f"run.directory={folder}")
    lines = shown.splitlines()
    assert status == 0 and len(lines) <= 30 and not folder.exists()
    assert all(len(line) <= 80 or str(folder) in line for line in lines)
    assert "training:\n  steps: 3\n" in shown and "seed:" not in shown
    words = " ".join(shown.split())
    assert "up to" in words and "two quiet CPU cores" in words and "a new run" in words
    assert "no effect algorithm.turn_weight (needs algorithm.estimator=mapo)" in words
    estimates = [said(capsys, *settings, f"evaluation.scenarios={count}")[1] for count in (16, 100)]
    assert len({re.search(r"up to [^:]*", text)[0] for text in estimates}) == 1  # there are 16 cards
    status, full, _ = said(capsys, *settings, f"run.directory={folder}", "--full")
    assert status == 0 and "  seed: 0\n" in full and "AdamW's moments" in full and "sharding" in full


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["environment.judge.implementation=no_module:X"], "no_module:X"),
        (["environment.judge.implementation=json:JSONDecoder"], "async def score"),
        (["environment.scenarios=/nowhere"], "/nowhere"),
        (["rollout.scenarios=65", "training.minibatch_scenarios=1"], "at most the 64 training scenarios"),
        (["logging.wandb=true"], "wandb is not installed"),
        (["model.path=/nowhere"], "/nowhere"),
        (["environment.user.url=http://x/v1"], "that role has no model"),
        (["environment.judge.model=engine:/nowhere"], "/nowhere"),
        (
            ["environment.judge.model=engine:Qwen/Qwen3-0.6B", "environment.judge.extra_body={tokens: 2048}"],
            "`environment.judge.max_tokens`",
        ),
        (
            [f"environment.judge.{key}" for key in ("model=m", "url=http://x/v1", "key_variable=NOKEY")],
            "NOKEY, which is empty or not set",
        ),
    ],
)  # fmt: skip
def test_what_a_run_refuses_before_its_first_step(settings, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, shown, error = said(capsys, *settings, f"run.directory={tmp_path / 'run'}")
    assert (status, shown) == (2, "") and words in error and error.count("\n") == 1


def test_sizes_that_do_not_fit_the_devices_are_refused(tmp_path):
    script = """
        import sys
        from mapo_jax import train

        judge = ["environment.judge.model=engine:Qwen/Qwen3-0.6B", "environment.judge.extra_body={slots: 3}"]
        for settings in (["warmstart.rows=3"], ["rollout.slots=3"], judge):
            assert train.main(["--dry-run", f"run.directory={sys.argv[1]}", *settings]) == 2
        sys.exit(0)
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    done = run_forked(textwrap.dedent(script), [tmp_path / "run"], env=os.environ | {"XLA_FLAGS": flags})
    errors = done.stderr.splitlines()
    assert done.returncode == 0 and len(errors) == 3, done.stderr
    assert "`warmstart.rows` is 3" in errors[0]
    assert "3 resident cannot be cut over the 2 devices" in errors[1]
    assert "3 slots cannot be cut over the 2 devices" in errors[2]


def test_a_run_without_its_checkpoints_is_refused(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"step": 40}\n')
    status, _, error = said(capsys, f"run.directory={tmp_path}")
    assert status == 2 and "no whole checkpoint is left" in error


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for folder, words in (
        (tmp_path / "file" / "run", "a part of that path is a file"),
        ("/proc/x", "/proc/x"),
    ):
        status, _, error = said(capsys, f"run.directory={folder}")
        assert status == 2 and words in error and "cannot be used" in error and error.count("\n") == 1
    assert said(capsys, f"run.directory={tmp_path / 'a' / 'run'}")[0] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("gib", [0.05, 0.1])
def test_a_run_that_does_not_fit_is_refused(gib, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: int(gib * 2**30))
    status, _, error = said(capsys, f"run.directory={tmp_path / 'run'}")
    assert status == 2 and "does not fit" in error


def test_a_folder_of_another_run_is_refused_and_ones_own_is_continued(tmp_path):
    config = load_config(None, [f"run.directory={tmp_path}"])
    (tmp_path / "checkpoints" / "30").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"step": 30, "timing_s/step": 4.0}\n')
    words = " ".join(dry_run(config).split())
    assert "continues after step 30, 10 steps left, about 40 s at its pace" in words


def test_a_model_as_judge_is_named_with_its_calls_and_its_price(tmp_path):
    judge = ["model=m", "url=http://judge.example/v1", "prices=[2, 10]"]
    work = ["training.steps=90", f"run.directory={tmp_path / 'run'}"]
    settings = [f"environment.judge.{key}" for key in judge]
    words = " ".join(dry_run(load_config(None, [*settings, *work])).split())
    assert "judge m at http://judge.example/v1 (24," in words and "at its prices" in words
    assert "the others scripted" in words and "user" not in words.split("world", 1)[1]


ROLES = [f"environment.{role}.model=engine:Qwen/Qwen3-0.6B" for role in ("user", "judge", "director")]
SLOTS = [
    f"environment.{role}.extra_body={{slots: 3, tokens: 3000}}" for role in ("user", "judge", "director")
]


def test_engines_of_roles_are_in_the_memory(tmp_path, monkeypatch):
    """Qwen3-0.6B: 596,049,920 weights, of which 65,536 norms in float32; 28 layers x 8 heads of 128."""
    common = ["environment.family=live", "model.dtype=bfloat16", f"run.directory={tmp_path / 'run'}", *ROLES]

    def held(*settings):
        config = load_config(None, [*common, *settings])
        return config, forecast_memory(config, forecast.model_shape(config), make_mesh(config.mesh))

    config, shared = held(*SLOTS)
    cache = 28 * 2 * 8 * 128 * 2 * 3 * 3000
    assert shared.held["KV caches of roles (bfloat16)"] == cache
    assert shared.held["models of roles (bfloat16)"] == 2 * (596_049_920 + 65_536)
    _, two = held(*SLOTS, "environment.judge.temperature=0.5")
    assert two.roles == 2 * shared.roles
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: 2**30)
    with pytest.raises(ValueError, match=r"lower extra_body\.slots .* which need 2\.1 GiB"):
        dry_run(config)


def test_the_command_for_ones_own_model_fits_a_machine_with_24_gib(capsys, monkeypatch):
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: 23 * 2**30)
    for module in ("dry_run", "running.policy"):
        monkeypatch.setattr(f"mapo_jax.{module}.cached", lambda name: None)  # nothing is downloaded
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    command = re.search(r"`python -m mapo_jax.train (--config \S+ model.path=\S+) --dry-run`", readme)[1]
    status, shown, _ = said(capsys, *shlex.split(command))
    assert status == 0 and "17 GiB" in readme and "16.752 while talking" in shown
    words = " ".join(shown.split())
    assert (
        "not here; the run fetches them, or hf download Qwen/Qwen3-0.6B, hf download Qwen/Qwen3-4B" in words
    )
