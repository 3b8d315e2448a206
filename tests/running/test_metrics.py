import errno
import json
import os
import sys
import textwrap
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from mapo_jax.config import load_config
from mapo_jax.errors import UserError
from mapo_jax.files import disk_errors
from mapo_jax.run import open_run
from mapo_jax.running.metrics import CompileCounter, MetricWriter, read_rows
from tests.forked import run_forked


def test_a_step_is_one_strict_json_line(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"reward/mean": np.float32(0.5), "turns/max": 8})
        writer.write(2, {"reward/mean": float("nan"), "actor/pg_loss": float("inf")})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 1, "reward/mean": 0.5, "turns/max": 8},
        {"step": 2, "reward/mean": None, "actor/pg_loss": None},
    ]


def test_events_hold_the_scalars(tmp_path, shown_scalars):
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"reward/mean": 0.25})
    assert shown_scalars(tmp_path / "tensorboard") == [(3, "reward/mean", 0.25)]


def test_torch_is_not_imported(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("tensorboardX", "torch")]:
        monkeypatch.delitem(sys.modules, name)
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"reward/mean": 0.5})
    assert "tensorboardX" in sys.modules and "torch" not in sys.modules


def test_a_killed_process_leaves_every_tag_of_its_last_step(tmp_path, shown_scalars):
    """As by SIGKILL right after the row was written: nothing waits in a queue."""
    names = [f"reward/{index}" for index in range(200)]
    script = f"""
        import os
        from mapo_jax.running.metrics import MetricWriter
        MetricWriter({str(tmp_path)!r}).write(7, dict.fromkeys({names!r}, 0.5))
        os._exit(9)
    """
    assert run_forked(textwrap.dedent(script)).returncode == 9
    assert shown_scalars(tmp_path / "tensorboard") == [(7, name, 0.5) for name in names]


def test_a_run_that_goes_on_shows_every_step_once(tmp_path, shown_scalars):
    """It was killed in step 4, after a checkpoint at step 2 with an evaluation that no event file has."""
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 4):
            writer.write(step, {"x": float(step)})
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows[2] = '{"step": 2, "evaluation/x": 5.0, "evaluation/y": null}\n'  # step 3 was cut off
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    with MetricWriter(tmp_path, after=2) as writer:
        writer.write(3, {"x": 30.0})
    shown = shown_scalars(tmp_path / "tensorboard")
    expected = [(1, "x", 1.0), (2, "x", 2.0), (2, "evaluation/x", 5.0), (3, "x", 30.0)]
    assert [scalar for scalar in shown if scalar[1] != "evaluation/y"] == expected
    assert [np.isnan(value) for _, tag, value in shown if tag == "evaluation/y"] == [True]


def test_events_keep_times_zeros_settings_and_dialogues(tmp_path, events_of):
    row = {"kind/ask": 0.0, "timing_s/unix": 1_800_000_000.125}
    configuration = {"training": {"steps": 3}, "model": {"path": None}, "lora": {"targets": ["q"]}}
    with MetricWriter(tmp_path, configuration=configuration) as writer:
        writer.write(1, row)
        writer.write_dialogues(1, [("a-card", "user   Hello.\npolicy Hm.")])
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, **row}]
    with MetricWriter(tmp_path, configuration=configuration, after=1):
        pass  # writes the row again, with its own time
    scalars = [e for e in events_of(tmp_path / "tensorboard") if e.summary.value and e.step]
    rows = [e for e in scalars if e.summary.value[0].tag == "kind/ask"]
    assert [(e.wall_time, len(e.summary.value)) for e in rows] == [(1_800_000_000.125, 1)] * 2
    assert rows[0].summary.value[0].WhichOneof("value") == "simple_value"
    (text,) = [e.summary.value[0] for e in scalars if e.summary.value[0].tag.startswith("dialogues/a-card")]
    assert b"policy Hm." in text.tensor.string_val[0]
    (start,) = {
        value.metadata.plugin_data.content
        for event in events_of(tmp_path / "tensorboard")
        for value in event.summary.value
        if value.tag == "_hparams_/session_start_info"
    }
    assert b"training.steps" in start and b"lora.targets" in start


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_an_event_file_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, code):
    from tensorboardX.event_file_writer import EventsWriter

    def fail(self):
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=r"metrics.jsonl|tensorboard"), MetricWriter(tmp_path) as writer:
        monkeypatch.setattr(EventsWriter, "flush", fail)
        writer.write(1, {"x": 1.0})


@pytest.mark.parametrize(
    "line", ["null", "{}", "[]", "3", '{"step": "x"}', '{"step": true}', "[" * 10**5, "\x00"]
)
def test_a_line_that_is_no_row_is_left_out(tmp_path, line):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"x": 1.0})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
        assert writer.last("x") == 1.0 and writer.last("y") is None
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "x": 1.0}]


def test_wandb_is_used_when_asked_for_and_missed_with_a_remedy(tmp_path, monkeypatch):
    calls, started = [], []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: started.append(options)
    fake.log = lambda values, step: calls.append((step, values))
    fake.finish = lambda: calls.append("finish")
    fake.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    with MetricWriter(tmp_path, tensorboard=False, wandb=True, configuration={"a": 1}) as writer:
        writer.write(1, {"x": 2.0, "y": 0.0})
        writer.write_dialogues(1, [("a-card", "Hello.")])
    table = (1, {"evaluation/dialogues": (["card", "dialogue"], [["a-card", "Hello."]])})
    assert calls == [(1, {"x": 2.0, "y": 0.0}), table, "finish"] and started[0]["config"] == {"a": 1}

    monkeypatch.setenv("WANDB_PROJECT", "mine")
    MetricWriter(tmp_path, tensorboard=False, wandb=True, after=1).close()
    MetricWriter(tmp_path / "other", tensorboard=False, wandb=True).close()
    assert [start["project"] for start in started] == ["mapo_jax", "mine", "mine"]
    assert started[0]["id"] == started[1]["id"] != started[2]["id"]
    assert {start["resume"] for start in started} == {"allow"}

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install wandb.*logging.wandb=false"):
        MetricWriter(tmp_path, tensorboard=False, wandb=True)


def test_a_missing_wandb_is_found_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = load_config(None, ["logging.wandb=true", f"run.directory={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="wandb is not installed"), open_run(config, Console(quiet=True)):
        pass
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_rows_before_whole(tmp_path, monkeypatch):
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer.write(1, {"x": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
    with pytest.raises(UserError, match=r"disk that holds .*metrics.jsonl is full; free some space"):
        writer.write(2, {"x": 2.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_is_recognised_through_wrappers():
    with pytest.raises(UserError), disk_errors("here"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as inner:
            raise RuntimeError("save failed") from inner
    with pytest.raises(UserError), disk_errors("here"):
        raise ValueError("RESOURCE_EXHAUSTED: write: No space left on device [OS error 28]")
    with (
        pytest.raises(UserError, match="here lies on a disk that is read-only"),
        disk_errors("here"),
    ):
        raise OSError(errno.EROFS, "read-only")
    with pytest.raises(ConnectionRefusedError), disk_errors("here"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


def test_counter_names_what_was_compiled_and_a_steady_step_compiles_nothing():
    @jax.jit
    def twice(x):
        return 2 * x

    with CompileCounter() as counter:
        twice(np.zeros(3, np.float32))
        assert counter.count == 1 and "twice" in counter.names[0]
        with counter.steady():
            twice(np.ones(3, np.float32))
        with pytest.raises(AssertionError, match=r"step 7 compiled 1.*twice"), counter.steady("step 7"):
            twice(np.ones(4, np.float32))
    twice(np.ones(5, np.float32))
    assert counter.count == 2, "a closed counter hears nothing"


def test_a_program_from_the_persistent_cache_counts_too(tmp_path):
    """Counting requests, not compilations: the figure must not depend on what an earlier run left."""
    from jax.experimental.compilation_cache import compilation_cache

    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), 0, -1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        function = jax.jit(lambda x: x + 3)
        with CompileCounter() as counter:
            function(np.zeros(3, np.float32))
            assert any(tmp_path.iterdir())
            function.clear_cache()
            function(np.zeros(3, np.float32))
        assert counter.count == 2
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
