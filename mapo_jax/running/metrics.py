"""Metrics of a run: one JSON line per step, TensorBoard event files, and the count of compiled programs.

docs/metrics.md lists the metrics. Their names follow the field: `reward/*`, `actor/*`, `sampler/*`,
`advantages/*`, `response_length/*`, `turns/*`, `timing_s/*`, `perf/*`, `judge/*`.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from mapo_jax.errors import UserError
from mapo_jax.files import append_line, as_path, copy_files, disk_errors, in_bucket, write_whole
from mapo_jax.settings import flat

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
EVENTS_COPIED_EVERY = 60.0  # seconds; only for a bucket
TIME = "timing_s/unix"  # when a row was written
WANDB_ID_FILE = ".wandb_id"  # of the run at Weights & Biases, which a continued run goes on with
COMPARED = ("evaluation/return/mean", "evaluation/epm_q", "return/mean")  # with the hyper-parameters
_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


def to_json_line(step: int, metrics: Mapping[str, Any]) -> str:
    """One strict JSON line: `step` first, then the metrics; values that are not finite become null."""
    row: dict[str, Any] = {"step": int(step)}
    for name, value in metrics.items():
        if not isinstance(value, (str, bool)) and value is not None:
            value = value.item() if hasattr(value, "item") else value
            if not math.isfinite(value):
                value = None
        row[name] = value
    return json.dumps(row, allow_nan=False) + "\n"


@contextmanager
def _no_torch() -> Iterator[None]:
    """Keeps tensorboardX from importing torch, which takes seconds; no metric is a torch tensor."""
    sys.modules.setdefault("torch", None)
    try:
        yield
    finally:
        if sys.modules["torch"] is None:
            del sys.modules["torch"]


def read_row(line: str | bytes) -> dict[str, Any] | None:
    """A row of `metrics.jsonl`; None for an invalid line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` in order, without invalid lines; empty without the file."""
    lines = file.read_bytes().splitlines() if file.exists() else ()
    return [row for line in lines if (row := read_row(line)) is not None]


class MetricWriter(AbstractContextManager):
    """Appends each step's metrics to `metrics.jsonl`, and optionally to event files and Weights & Biases.

    A row is one system call, so a kill leaves at most one incomplete line at the end, which
    `run_folder.cut_back` removes.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        tensorboard: bool = True,
        wandb: bool = False,
        configuration: Mapping[str, Any] | None = None,
        after: int = -1,
    ) -> None:
        """Opens the writers.

        Args:
          folder: the run folder, which exists.
          tensorboard: write event files below `tensorboard/`.
          wandb: log to Weights & Biases as well.
          configuration: the run's, which Weights & Biases and TensorBoard's hyper-parameters show.
          after: the finished step that the run continues from. TensorBoard purges later steps from event
            files, and gets that step's rows again from `metrics.jsonl`.

        Raises:
          UserError: `wandb` without the package; the disk is full.
        """
        folder = as_path(folder)
        self._path = folder / METRICS_FILE
        self._wandb = _start_wandb(folder, configuration) if wandb else None
        self._events = None
        if tensorboard:
            self._target = folder / EVENTS_FOLDER
            self._local = Path(tempfile.mkdtemp(prefix="mapo_jax.")) if in_bucket(folder) else self._target
            self._copied = time.monotonic()
            with disk_errors(self._target):
                self._open_events(after, flat(configuration or {}))

    def _open_events(self, after: int, configuration: Mapping[str, Any]) -> None:
        # SummaryWriter of the package writes in a thread: `flush` does not wait for it, and its errors are
        # lost. The import takes half a second.
        with _no_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.summary import hparams

        self._local.mkdir(parents=True, exist_ok=True)
        resumed = self._target.is_dir() and any(self._target.iterdir())
        self._events = EventsWriter(str(self._local / "events"), filename_suffix=f".{time.time_ns()}")
        if resumed:
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=max(after, 0), wall_time=time.time(), session_log=start))
            for row in read_rows(self._path):
                if row["step"] >= after:
                    self._write_event(row.pop("step"), row)
        if configuration:
            plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in configuration.items()}
            for summary in hparams(plain, dict.fromkeys(COMPARED))[:2]:  # without the end of the session
                self._events.write_event(Event(wall_time=time.time(), summary=summary))
        self._events.flush()

    def _write_event(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Writes all metrics of a row as one record, which is whole or absent."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=float("nan") if value is None else float(value))
            for name, value in metrics.items()
            if name != TIME  # a float32 has steps of two minutes there; it is the event's own time
        ]
        wall_time = metrics.get(TIME) or time.time()
        self._events.write_event(Event(step=step, wall_time=wall_time, summary=Summary(value=values)))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one step's metrics.

        A row equal to the last one of the file is skipped: a killed run repeats its last evaluation.

        Raises:
          UserError: the disk is full. Rows written before are whole.
        """
        with disk_errors(self._path):
            line = to_json_line(step, metrics).encode()
            if _ends_with_line(self._path, line):
                return
            append_line(self._path, line)
            if self._events is not None:
                self._write_event(step, metrics)
                self._events.flush()
                if time.monotonic() - self._copied > EVENTS_COPIED_EVERY:
                    self._copy_events()
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def write_dialogues(self, step: int, dialogues: Sequence[tuple[str, str]]) -> None:
        """Writes sample dialogues, each with its title, where they can be read beside the curves."""
        if self._events is not None:
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.summary import text

            for title, content in dialogues:
                summary = text(f"dialogues/{title}", f"```\n{content}\n```")
                self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            with disk_errors(self._path.parent / EVENTS_FOLDER):
                self._events.flush()
        if self._wandb is not None:
            table = self._wandb.Table(columns=["card", "dialogue"], data=list(map(list, dialogues)))
            self._wandb.log({"evaluation/dialogues": table}, step=step)

    def last(self, name: str) -> float | None:
        """The last value of a metric in the file; None without one."""
        rows = reversed(read_rows(self._path))
        return next((row[name] for row in rows if isinstance(row.get(name), (int, float))), None)

    def close(self) -> None:
        """Flushes and closes all files."""
        if self._events is not None:
            with disk_errors(self._path.parent / EVENTS_FOLDER):
                self._events.close()
                self._copy_events()
        if self._wandb is not None:
            self._wandb.finish()

    def _copy_events(self) -> None:
        """Copies event files to a bucket, whose objects cannot grow."""
        if self._local != self._target:
            copy_files(self._local, self._target)
            self._copied = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.close()


def _ends_with_line(path: Path, line: bytes) -> bool:
    if not path.exists():
        return False
    if in_bucket(path):
        end = path.read_bytes()[-len(line) - 1 :]
    else:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - len(line) - 1))
            end = file.read()
    return end in (line, b"\n" + line)


def import_wandb() -> ModuleType:
    """The package wandb. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "`logging.wandb` is true but the package wandb is not installed; "
            "`pip install wandb`, or set logging.wandb=false"
        ) from error
    return wandb


def _start_wandb(folder: Path, configuration: Mapping[str, Any] | None) -> ModuleType:
    wandb, file = import_wandb(), folder / WANDB_ID_FILE
    if not file.exists():
        with disk_errors(file):
            write_whole(file, secrets.token_hex(4))
    wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "mapo_jax",
        name=folder.name,
        id=file.read_text(),
        resume="allow",
        dir=str(folder),
        config=dict(configuration or {}),
    )
    return wandb


class CompileCounter:
    """Counts the programs that are requested from XLA, by name, inside its context.

    Programs in the persistent compilation cache count too, so the count does not depend on earlier runs.
    Programs in this process's memory do not count, so a steady step adds none:

        with CompileCounter() as counter:
            ... warm up ...
            with counter.steady("step 3"):
                ... one step ...
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.seconds = 0.0

    @property
    def count(self) -> int:
        """Programs requested so far."""
        return len(self.names)

    def take_seconds(self) -> float:
        """Seconds of compilation or reading from the cache since the last call."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def _listen(self, event: str, duration: float, **details: Any) -> None:
        if event == _BACKEND_COMPILE:
            self.names.append(str(details.get("fun_name", "?")))
            self.seconds += duration

    def __enter__(self) -> CompileCounter:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @contextmanager
    def steady(self, what: str = "a steady step") -> Iterator[None]:
        """Asserts that nothing is compiled in its body.

        Raises:
          AssertionError: with the names of the compiled programs.
        """
        before = self.count
        yield
        assert self.count == before, f"{what} compiled {self.count - before}: {self.names[before:]}"
