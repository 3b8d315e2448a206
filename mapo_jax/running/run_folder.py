"""The run folder: claimed by one run, its whole checkpoints, and cut back to the newest one before a restart.

A run that is killed at any moment and started again with the same command continues from its newest whole
checkpoint. The order of writes makes this exact: the metrics and dialogues of a step are written before its
checkpoint. So a checkpoint's step has all its files; later files are removed (`cut_back`) and written again.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import orbax.checkpoint as ocp

from mapo_jax.config import HELD_OUT, ROLES, Config, differing_keys, load_config, to_yaml
from mapo_jax.errors import UserError
from mapo_jax.files import as_path, disk_errors, in_bucket, read_object, write_whole
from mapo_jax.running.metrics import METRICS_FILE, read_row, read_rows
from mapo_jax.settings import value_at

CHECKPOINTS_FOLDER = "checkpoints"
BASE_FOLDER = "base"  # frozen weights of a run with adapters, stored once for all its checkpoints
CONFIG_FILE = "config.yaml"
BEST = "best"  # in place of a step: the one with the best validation return
STARTS_FILE = "starts.jsonl"  # one row per start: command, versions, machine (`running/origin.py`)
STEP_FOLDERS = ("dialogues", "evaluations")  # of files named step_000010.*

# A run continues under other values of these keys: they change its numbers by rounding at most. An error
# message advises to change one of them, or else to start a new run.
_ROLE_KEYS = (
    "url",
    "key_variable",
    "seconds",
    "requests_per_minute",
    "tokens_per_minute",
    "prices",
    "extra_body.slots",  # the size of an engine changes no answer
    "extra_body.tokens",
)
HARMLESS_KEYS = (
    "run.",
    "mesh.",  # changes the order of sums, and so the last bits, as do the next three
    "model.remat",
    "model.attention",
    "rollout.copy_weights",
    "rollout.slots",
    "training.microbatch_tokens",
    "logging.",
    "checkpoint.",
    "environment.concurrency",
    "environment.call_seconds",
    "environment.step_seconds",
    "environment.failure_share",
    "environment.pause_minutes",
    *(f"environment.{role}.{key}" for role in (*ROLES, HELD_OUT) for key in _ROLE_KEYS),
)


# --- Checkpoints. ---


def whole_steps(run_folder: Path | str) -> list[int]:
    """Steps of a run's whole checkpoints, ascending. Only reads.

    An unfinished save has a temporary name. In a bucket nothing is renamed: there it lacks the commit marker.
    """
    folder = as_path(run_folder) / CHECKPOINTS_FOLDER
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        int(entry.name)
        for entry in entries
        if entry.name.isdecimal() and (not in_bucket(entry) or ocp.utils.is_checkpoint_finalized(entry))
    )


def step_option(text: str) -> int | str:
    """The value of `--step`: a number or BEST."""
    if text != BEST and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor {BEST}")
    return text if text == BEST else int(text)


def checkpoint_folder(run_folder: Path | str, step: int | str | None = None) -> Path:
    """The folder of one whole checkpoint of a run, the newest by default, or BEST. Only reads.

    Raises:
      UserError: the run has none, none of that step, or none with an evaluation.
    """
    steps = whole_steps(run_folder)
    if not steps:
        raise UserError(f"{run_folder} holds no whole checkpoint; train there first, or name another run")
    if step == BEST:
        step = next(iter(best_steps(run_folder, steps)), None)
        if step is None:
            raise UserError(f"no checkpoint of {run_folder} has an evaluation; give its number as the step")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"{run_folder} holds no checkpoint of step {step}; it has {known}")
    return as_path(run_folder) / CHECKPOINTS_FOLDER / str(steps[-1] if step is None else step)


def best_steps(run_folder: Path | str, steps: Sequence[int]) -> list[int]:
    """Those of `steps` that have an evaluation, by validation return, best first."""
    folder = as_path(run_folder) / "evaluations"
    evaluations = {step: read_object(folder / f"step_{step:06d}.json") or {} for step in steps}
    returns = {step: evaluation.get("return/mean") for step, evaluation in evaluations.items()}
    ranked = [step for step in returns if isinstance(returns[step], (int, float))]
    return sorted(ranked, key=lambda step: (returns[step], step), reverse=True)


def refuse_lost_checkpoints(run_folder: Path | str, config: Config) -> None:
    """Checks a run folder without a whole checkpoint before the run starts again from step 0.

    Raises:
      UserError: the run wrote so many steps that it must have had a checkpoint.
    """
    folder = as_path(run_folder)
    reached = [row["step"] for row in read_rows(folder / METRICS_FILE)]
    reached += [number for name in STEP_FOLDERS for _, number in _step_files(folder / name)]
    saved = load_config(folder / CONFIG_FILE)
    every = min(config.evaluation.every, max(config.checkpoint.every, saved.checkpoint.every))
    if max(reached, default=0) > 2 * every:  # a save waits for the one before it
        raise UserError(
            f"{folder} holds what a run wrote up to step {max(reached)}, but no whole checkpoint is left in "
            f"{CHECKPOINTS_FOLDER}/; put one back from a copy, or choose another run.directory"
        )


# --- Claiming the folder. ---


@contextmanager
def claim(run_folder: Path | str, config: Config) -> Iterator[bool]:
    """Locks a run folder for this process; refuses a folder of another run before it writes anything.

    Writes `config.yaml` into a new folder, and removes it if the context fails before any other file was
    written. The lock ends with the context or with the process.

    Yields:
      Whether the folder holds an earlier part of the same run, which is to be continued.

    Raises:
      UserError: it is no folder, holds something other than a run, holds a run of another configuration, or
        another process is training in it.
    """
    folder = as_path(run_folder)
    file = folder / CONFIG_FILE
    refuse_folder(folder, config)
    with _unusable_folder_errors(folder), disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        continues = file.exists()
        if continues:
            _refuse_other_configuration(file, config)  # written while this process waited for the lock
        else:
            with disk_errors(file):
                write_whole(file, to_yaml(config))
        try:
            yield continues
        except BaseException:
            if not continues and _visible_names(folder) == {CONFIG_FILE}:
                file.unlink()  # free for another configuration
            raise


def refuse_folder(folder: Path, config: Config) -> None:
    """Raises UserError unless the folder is new, empty, or holds an earlier part of the run."""
    with _unusable_folder_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"`run.directory` {folder} is a file; choose a folder")
        if (folder / CONFIG_FILE).exists():
            _refuse_other_configuration(folder / CONFIG_FILE, config)
        elif foreign := sorted(_visible_names(folder)):
            raise UserError(
                f"`run.directory` {folder} holds files but no run ({foreign[0]}, ...); "
                "choose a new or empty folder"
            )


def refuse_unwritable(folder: Path) -> None:
    """Raises UserError unless a folder can be made there, or written to; leaves nothing behind."""
    if in_bucket(folder):
        return
    with _unusable_folder_errors(folder), disk_errors(folder):
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        os.rmdir(tempfile.mkdtemp(prefix=".mapo_jax-", dir=place))


def _visible_names(folder: Path) -> set[str]:
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    return {name for name in names if not name.startswith(".")}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the file lock of a run folder, which processes of all machines with this file system respect.

    A bucket has no locks: there the file names the last process, and writing it checks the permission.
    """
    file = folder / ".lock"
    if in_bucket(folder):
        with _unusable_folder_errors(folder):
            write_whole(file, f"{socket.gethostname()}, process {os.getpid()}\n")
        yield
        return
    with _unusable_folder_errors(folder), disk_errors(folder):
        lock = open(file, "w")  # noqa: SIM115  (closed below)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in {folder}; wait for it, stop it, or choose another "
                "run.directory"
            ) from error
        yield


@contextmanager
def _unusable_folder_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Libraries for buckets raise errors of their own kinds; a disk raises only OSError.
        if not isinstance(error, OSError) and not in_bucket(folder):
            raise
        said = getattr(error, "strerror", None) or str(error)
        reason = " ".join(said.split())[:200] or type(error).__name__
        remedy = "pip install gcsfs" if isinstance(error, ImportError) else "check the name and your rights"
        raise UserError(f"`run.directory` {folder} cannot be used ({reason}); {remedy}") from error


def _refuse_other_configuration(file: Path, config: Config) -> None:
    try:
        saved = load_config(file)
    except UserError as error:
        raise UserError(
            f"{file} is no configuration of a run ({error}); choose another run.directory, or remove that "
            "folder"
        ) from error
    keys = [key for key in differing_keys(saved, config) if not key.startswith(HARMLESS_KEYS)]
    if keys:
        values = [value_at(each.model_dump(), keys[0]) for each in (saved, config)]
        others = f" (and {len(keys) - 1} more: {', '.join(keys[1:4])})" if len(keys) > 1 else ""
        remedy = "choose another run.directory, or the run's own configuration to continue it"
        if keys == ["training.steps"] and whole_steps(file.parent):
            remedy = (
                "train its weights further in a new folder: python -m mapo_jax.train --config "
                + shlex.join([str(file), f"model.path={file.parent}"])
                + f" run.directory=NEW training.steps={config.training.steps}"
            )
        raise UserError(
            f"{file.parent} holds a run with {keys[0]}={values[0]!r}, not {values[1]!r}{others}; {remedy}"
        )


# --- Restarting. ---


def cut_back(run_folder: Path | str, step: int) -> list[str]:
    """Removes from a run folder everything that was written after `step`, and half-written files.

    `metrics.jsonl` keeps its whole lines up to the step; `dialogues/` and `evaluations/` keep their files
    `step_N.*` with N up to it. (Event files only grow: see `metrics.MetricWriter`.) Each file is replaced as
    a whole, so this can be interrupted and repeated.

    Args:
      step: finished steps of the checkpoint that the run continues from; -1 to start from the beginning.

    Returns:
      Sentences about lost rows of the metrics.

    Raises:
      UserError: the disk is full.
    """
    folder = as_path(run_folder)
    with disk_errors(folder):
        if not in_bucket(folder):
            for place in (folder, *(folder / name for name in STEP_FOLDERS)):
                for leftover in place.glob(".*.*.*"):  # temporary files of `write_whole`: .NAME.SUFFIX.RANDOM
                    leftover.unlink()
        for name in STEP_FOLDERS:
            for file, number in _step_files(folder / name):
                if number > step:
                    file.unlink()
        return _cut_metrics(folder / METRICS_FILE, step)


def _step_files(folder: Path) -> list[tuple[Path, int]]:
    matches = ((file, re.match(r"step_(\d+)", file.name)) for file in folder.glob("step_*"))
    return [(file, int(match.group(1))) for file, match in matches if match]


def _cut_metrics(file: Path, step: int) -> list[str]:
    data = file.read_bytes() if file.exists() else b""
    lines = data.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # incomplete: the process was killed while it wrote
    rows = [(line, row) for line in lines if (row := read_row(line)) is not None]
    kept = b"".join(line for line, row in rows if row["step"] <= step)
    if not kept:
        file.unlink(missing_ok=True)
    elif kept != data:
        write_whole(file, kept)
    problems = []
    if broken := len(lines) - len(rows):
        problems.append(f"{broken} damaged {'line' if broken == 1 else 'lines'} of {file} removed")
    present = {row["step"] for _, row in rows if "reward/mean" in row}
    if missing := [number for number in range(1, step + 1) if number not in present]:
        problems.append(
            f"{file} lacks the rows of {len(missing)} of the {step} finished steps (from {missing[0]} to "
            f"{missing[-1]}); they are lost, the weights are not"
        )
    return problems
