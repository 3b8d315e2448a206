"""Nothing is lost: complete checkpoints, and a run folder that is cut back to the one it restarts from.

A run that is killed at any moment and started again with the same command goes on from its last whole
checkpoint. The order that makes this exact: first a step's metrics and dialogues are written, then the step
is saved. So whatever a checkpoint's step wrote is there, and what came after it is cut off (`cut_back`) and
written again, the same.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mapo_jax.commands import machine_errors
from mapo_jax.config import HELD_OUT, ROLES, Config, differing_keys, load_config, to_yaml
from mapo_jax.errors import UserError
from mapo_jax.files import (
    CHECKSUMS_FILE,
    as_path,
    checksums,
    differing,
    in_bucket,
    read_checksums,
    read_object,
    write_checksums,
    write_whole,
)
from mapo_jax.learning.train_state import TrainState
from mapo_jax.running.metrics import METRICS_FILE, full_disk_is_a_user_error, read_row, read_rows

LOG = logging.getLogger("mapo_jax.checkpoint")  # without a handler of its own: standard error

CHECKPOINTS_FOLDER = "checkpoints"
BASE_FOLDER = "base"  # of a run with adapters: the frozen weights, once for all its checkpoints
CONFIG_FILE = "config.yaml"
_CHECKSUM = "crc32"  # of the other values of the JSON mapping, beside them
_PIECE_BYTES = 16 * 2**20  # most bytes of an array that lie together on the disk
STEP_FOLDERS = ("dialogues", "evaluations")  # of files named step_000010.*
# Keys that change no number of a run but by rounding: a run continues under other values of them, such as
# on other machines. What an error tells to change is among them, or the error says that it takes a new run.
_ROLE_KEYS = (
    "url",
    "key_variable",
    "requests_per_minute",
    "tokens_per_minute",
    "prices",
    "extra_body.slots",  # of an engine, whose room changes no answer
    "extra_body.tokens",
)

HARMLESS_KEYS = (
    "run.",
    "mesh.",  # it changes the order of sums, and so the last bits; as do the next three
    "model.remat",
    "model.attention",
    "rollout.copy_weights",
    "rollout.slots",
    "training.microbatch_tokens",
    "logging.",
    "checkpoint.",
    "environment.concurrency",
    *(f"environment.{name}_seconds" for name in ("call", "step")),
    "environment.failure_share",
    "environment.pause_minutes",
    *(f"environment.{role}.{key}" for role in (*ROLES, HELD_OUT) for key in _ROLE_KEYS),
)


class Checkpoints:
    """The checkpoints of one run: asynchronous, complete, restored into any sharding.

    A checkpoint holds the parameters, the optimizer's state, the frozen reference if there is one, a JSON
    mapping with everything else that the run continues from (step, seeds, position in the data,
    configuration), and the checksums of all that, without which it does not count as whole. They are checked
    before anything is read. An interrupted save leaves a folder under a temporary name, which is never read
    and is removed before the next save.
    """

    def __init__(self, run_folder: Path | str, *, keep: int = 2, keep_best: int = 1) -> None:
        """Opens `run_folder/checkpoints`, and begins to remove what an interrupted save left there.

        Args:
          keep: newest checkpoints kept.
          keep_best: of those whose weights were evaluated, the best ones by validation return, kept beside
            the newest.
        """
        # Its errors all reach us as exceptions; the library's own tracebacks would bury the one sentence.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        run_folder = as_path(run_folder)
        self.folder = _absolute(run_folder) / CHECKPOINTS_FOLDER
        kept = [preservation_policy.LatestN(keep)]
        if keep_best:
            kept.append(_Best(run_folder, keep_best))
        with full_disk_is_a_user_error(self.folder):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                ),
            )

    @property
    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending; waits for a save under way."""
        self.wait()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, progress: Mapping[str, Any]) -> None:
        """Starts to save; returns when the state is copied, so that its buffers may be donated.

        A step that is already saved is left as it is. With several processes all call it, for the same step.

        Args:
          step: finished steps.
          state: what is trained.
          progress: JSON values: everything else that the run continues from.

        Raises:
          UserError: the disk is full, at this save or at the one before. Earlier checkpoints are whole.
        """
        with full_disk_is_a_user_error(self.folder):
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                return
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=_in_pieces(_to_saved(state)),
                    progress=ocp.args.JsonSave(_with_checksum({**progress, "step": step})),
                ),
                force=True,
            )

    def wait(self) -> None:
        """Returns when nothing is being saved any more. Raises as `save` does."""
        with full_disk_is_a_user_error(self.folder):
            self._manager.wait_until_finished()

    def restore_latest(self, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the latest whole checkpoint.

        Args:
          template: arrays or `jax.ShapeDtypeStruct`s with shardings: where every array goes. Shardings may
            differ from those that were saved.

        Returns:
          The state and the progress mapping (its `step` says where the run stands); None without a
          checkpoint.

        Raises:
          UserError: the saved state does not fit the template, or cannot be read.
        """
        if not (steps := self.steps):
            return None
        folder = self.folder / str(steps[-1])
        return _from_saved(_restore(folder, _to_saved(template)), template), read_progress(folder)

    def close(self) -> None:
        """Finishes the save under way and closes the manager. Raises as `save` does."""
        with full_disk_is_a_user_error(self.folder):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except UserError:
            if error is None:  # else it has most likely been said already
                raise


class _Best(preservation_policy.PreservationPolicy):
    """Keeps the checkpoints with the best evaluations, which are made after they were saved."""

    def __init__(self, run_folder: Path, count: int) -> None:
        self._folder, self._count = run_folder, count

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = best_steps(self._folder, [checkpoint.step for checkpoint in checkpoints])[: self._count]
        return [checkpoint.step in best for checkpoint in checkpoints]


def best_steps(run_folder: Path | str, steps: Sequence[int]) -> list[int]:
    """Those of `steps` after which the run was evaluated, by validation return, best first."""
    folder = as_path(run_folder) / "evaluations"
    returns = {}
    for step in steps:
        evaluation = read_object(folder / f"step_{step:06d}.json") or {}
        if isinstance(value := evaluation.get("return/mean"), (int, float)):
            returns[step] = value
    return sorted(returns, key=lambda step: (returns[step], step), reverse=True)


def whole_steps(run_folder: Path | str) -> list[int]:
    """Steps of a run's whole checkpoints, ascending. Reads only: an unfinished save has another name.

    Or, in a bucket, where nothing can be renamed, lacks the mark of a finished one.
    """
    folder = as_path(run_folder) / CHECKPOINTS_FOLDER
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        int(entry.name)
        for entry in entries
        if entry.name.isdecimal() and (not in_bucket(entry) or ocp.utils.is_checkpoint_finalized(entry))
    )


def _absolute(path: Path) -> Path:
    return path if in_bucket(path) else path.absolute()


def checkpoint_folder(run_folder: Path | str, step: int | None = None) -> Path:
    """The folder of one whole checkpoint of a run, the latest by default. Reads only.

    Raises:
      UserError: the run has none, or none of that step.
    """
    folder = as_path(run_folder) / CHECKPOINTS_FOLDER
    steps = whole_steps(run_folder)
    if not steps:
        raise UserError(f"{run_folder} holds no whole checkpoint; train there first, or name another run")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"{run_folder} holds no checkpoint of step {step}; it has {known}")
    return folder / str(steps[-1] if step is None else step)


def read_progress(checkpoint: Path | str) -> dict[str, Any]:
    """The JSON mapping saved with a checkpoint.

    Raises:
      UserError: it is damaged, or cannot be read.
    """
    folder = _absolute(as_path(checkpoint))
    saved = read_object(folder / "progress" / "metadata") or {}
    checksum = saved.pop(_CHECKSUM, None)
    summed = (folder / "state" / CHECKSUMS_FILE).exists()
    if "step" not in saved or summed != (checksum is not None) or (summed and checksum != _checksum(saved)):
        raise _damaged(folder, "progress/metadata")
    return saved


def _with_checksum(progress: Mapping[str, Any]) -> dict[str, Any]:
    progress = json.loads(json.dumps(progress))
    return {**progress, _CHECKSUM: _checksum(progress)}


def _checksum(progress: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(progress, sort_keys=True).encode())


def restore_params(run_folder: Path | str, template: Any, *, step: int | None = None) -> Any:
    """The parameters alone of a run's checkpoint: to start another run from, to export or to serve.

    Args:
      template: the parameters' tree as arrays or `jax.ShapeDtypeStruct`s, with shardings if they matter.
      step: which checkpoint; the latest by default.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, or a parameter is missing, surplus or of
        another shape.
    """
    return _restore(checkpoint_folder(run_folder, step), {"params": template})["params"]


def save_base(run_folder: Path | str, params: Any) -> None:
    """Writes the frozen weights of a run with adapters, whole or not at all; replaces earlier ones.

    Raises:
      UserError: the disk is full.
    """
    folder = _absolute(as_path(run_folder)) / BASE_FOLDER
    with full_disk_is_a_user_error(folder), ocp.AsyncCheckpointer(_Summing()) as checkpointer:
        checkpointer.save(folder / "state", args=_in_pieces({"params": params}), force=True)
        checkpointer.wait_until_finished()


def restore_base(run_folder: Path | str, template: Any) -> Any:
    """What `save_base` wrote; arguments and errors as of `restore_params`."""
    return _restore(as_path(run_folder) / BASE_FOLDER, {"params": template})["params"]


class _Summing(ocp.PyTreeCheckpointHandler):
    """Writes the checksums of what is saved beside it, before it takes its name.

    Every process computes those of the files that it wrote, in the background as the save itself, and the
    first puts them together.
    """

    async def async_save(self, directory: Path, *args: Any, **options: Any) -> list[ocp.future.Future]:
        written = await super().async_save(directory, *args, **options)
        if jax.process_count() == 1:
            return written
        return [ocp.future.ChainedFuture(written, lambda: self._sum_own(directory))]

    def _sum_own(self, directory: Path) -> None:
        own = f"ocdbt.process_{jax.process_index()}"
        found = checksums(directory / own) if (directory / own).is_dir() else {}
        content = {f"{own}/{name}": value for name, value in found.items()}
        write_whole(directory / f"{_PART}{jax.process_index()}", json.dumps(content))

    def finalize(self, directory: Path) -> None:
        super().finalize(directory)
        parts = [file for file in directory.iterdir() if file.name.startswith(_PART)]
        known = {name: value for file in parts for name, value in (read_object(file) or {}).items()}
        for file in parts:
            file.unlink()
        # orbax writes the time of the commit into that file afterwards; no restore reads it
        write_checksums(directory, known, without="_CHECKPOINT_METADATA")


_PART = "checksums.process_"


@ocp.args.register_with_handler(_Summing, for_save=True, for_restore=True)
class _Save(ocp.args.PyTreeSave):
    """What `_Summing` saves."""


def _in_pieces(saved: Any) -> _Save:
    """How arrays are stored: in pieces, stacked matrices layer by layer, so that one can be read alone."""

    def options(leaf: Any) -> ocp.SaveArgs:
        if leaf.nbytes <= _PIECE_BYTES:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=_PIECE_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())

    return _Save(saved, save_args=jax.tree.map(options, saved))


def open_params(
    run_folder: Path | str, template: Any, *, step: int | None = None
) -> Callable[[str, int | None], np.ndarray]:
    """Opens the parameters of a run's checkpoint to be read one by one, as `huggingface.Reader`.

    Args:
      template: the parameters' tree as `jax.ShapeDtypeStruct`s.
      step: which checkpoint; the latest by default.

    Returns:
      A function from a path ("layers/attention/q/kernel") and a layer, or None for all of the array, to an
      array; only what is asked for is read.

    Raises:
      UserError: there is no such checkpoint, it cannot be read, or a parameter is missing or of another
        shape.
    """
    return _open(checkpoint_folder(run_folder, step), template)


def open_base(run_folder: Path | str, template: Any) -> Callable[[str, int | None], np.ndarray]:
    """Opens what `save_base` wrote as `open_params` does a checkpoint's parameters."""
    return _open(as_path(run_folder) / BASE_FOLDER, template)


def _open(folder: Path, template: Any) -> Callable[[str, int | None], np.ndarray]:
    _refuse_damage(folder)
    state = _absolute(folder) / "state"
    stores = {}
    with _readable(folder):
        saved = ocp.PyTreeCheckpointHandler().metadata(state).tree
        _check(folder, {"params": saved.get("params", {})}, {"params": template})
        for path, _ in _leaves(template):
            base = {"driver": "ocdbt", "base": state.as_uri(), "path": f"params.{_dotted(path)}/"}
            spec = {"driver": "zarr", "kvstore": base}
            stores[_dotted(path).replace(".", "/")] = tensorstore.open(spec, read=True, open=True)
        stores = {path: store.result() for path, store in stores.items()}

    def read(path: str, layer: int | None) -> np.ndarray:
        store = stores[path] if layer is None else stores[path][layer]
        with _readable(folder):
            return store.read().result()

    return read


def _to_saved(state: TrainState) -> dict[str, Any]:
    # The optimizer's named tuples become a flat dict, so that the format is names and arrays only. The base
    # beside adapters never changes: it lies in the run's folder once.
    saved = {
        "params": state.params,
        "optimizer": {_dotted(path): leaf for path, leaf in _leaves(state.opt_state)},
        "step": state.step,
    }
    if state.reference is not None:
        saved["reference"] = state.reference
    return saved


def _from_saved(saved: Mapping[str, Any], template: TrainState) -> TrainState:
    moments = [saved["optimizer"][_dotted(path)] for path, _ in _leaves(template.opt_state)]
    return TrainState(
        params=saved["params"],
        opt_state=jax.tree.unflatten(jax.tree.structure(template.opt_state), moments),
        step=saved["step"],
        reference=saved.get("reference"),
    )


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _restore(folder: Path, target: Mapping[str, Any]) -> Any:
    """Restores the parts of a checkpoint that `target` names, shapes checked (orbax would cut or pad)."""
    _refuse_damage(folder)
    abstract = jax.tree.map(_abstract, target)
    handler = ocp.PyTreeCheckpointHandler()
    state = _absolute(folder) / "state"
    with _readable(folder):
        saved = handler.metadata(state).tree
        _check(folder, {part: saved.get(part, {}) for part in target}, abstract)
        return handler.restore(
            state,
            args=ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,
            ),
        )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check(folder: Path, saved: Any, wanted: Any) -> None:
    have = {_dotted(path): tuple(leaf.shape) for path, leaf in _leaves(saved)}
    want = {_dotted(path): tuple(leaf.shape) for path, leaf in _leaves(wanted)}
    remedy = "use the configuration that the run was started with"
    for name, shape in want.items():
        if name not in have:
            raise UserError(f"the checkpoint {folder} has no {name}; {remedy}")
        if have[name] != shape:
            raise UserError(
                f"{name} has shape {have[name]} in the checkpoint {folder} and {shape} here; {remedy}"
            )
    for name in have:
        if name not in want:
            raise UserError(f"the checkpoint {folder} has {name}, which this model does not; {remedy}")


def _refuse_damage(folder: Path) -> None:
    """Compares a checkpoint's files with their checksums; of several processes each does its share.

    Raises:
      UserError: one is not as it was saved.
    """
    state = _absolute(folder) / "state"
    if not state.is_dir():
        raise _damaged(folder, "state")
    try:
        known = read_checksums(state)
    except ValueError:
        raise _damaged(folder, f"state/{CHECKSUMS_FILE}") from None
    if known is None:
        if folder.name != BASE_FOLDER and _CHECKSUM in (read_object(folder / "progress" / "metadata") or {}):
            raise _damaged(folder, f"state/{CHECKSUMS_FILE}")
        LOG.warning("%s was saved without checksums, by an earlier version: damage goes unnoticed", folder)
        return
    names = sorted(known)
    own = {name: known[name] for name in names[jax.process_index() :: jax.process_count()]}
    first = names.index(found) if (found := next(differing(state, own), None)) is not None else len(names)
    if jax.process_count() > 1:
        first = int(np.min(multihost_utils.process_allgather(np.int32(first))))
    if first < len(names):
        raise _damaged(folder, f"state/{names[first]}")


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What orbax and tensorstore say of a checkpoint that they cannot read, as a UserError."""
    try:
        with machine_errors(), full_disk_is_a_user_error(folder):
            yield
    except UserError:
        raise
    except jax.errors.JaxRuntimeError:  # such as too little memory: nothing is wrong with the files
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint {folder} cannot be read ({type(error).__name__}: {reason}); {_remedy(folder)}"
        ) from error


def _damaged(folder: Path, file: str) -> UserError:
    what = f"step {folder.name}" if folder.name.isdecimal() else "the frozen weights"
    return UserError(
        f"the checkpoint {folder} ({what}) is damaged: {file} is missing or not as it was saved; "
        f"{_remedy(folder)}"
    )


def _remedy(folder: Path) -> str:
    """What a user can do about a checkpoint that cannot be read."""
    if not folder.name.isdecimal():
        return "put it back from a copy of the run, or start a new run in another run.directory"
    earlier = [step for step in whole_steps(folder.parent.parent) if step < int(folder.name)]
    if not earlier:
        return "there is no checkpoint before it: start a new run in another run.directory"
    return f"remove that folder to go on from the one before it, {folder.with_name(str(earlier[-1]))}"


@contextmanager
def claim(run_folder: Path | str, config: Config) -> Iterator[bool]:
    """Takes a run folder for this process, or refuses a foreign one before anything is touched.

    Writes `config.yaml` into a new folder, and takes it away again if the context fails before anything else
    was written. While the context is open no other process can claim the folder; a killed process frees it.

    Yields:
      Whether the folder holds an earlier part of this very run, to be continued.

    Raises:
      UserError: it is no folder, holds something else than a run, holds a run of another configuration, or
        another process is at work in it; the sentence says which, and what to do.
    """
    folder = as_path(run_folder)
    with _unwritable_is_a_user_error(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"`run.directory` {folder} is a file; choose a folder")
        file = folder / CONFIG_FILE
        if file.exists():
            _same_configuration(file, config)
        elif folder.exists():
            foreign = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
            if foreign:
                raise UserError(
                    f"`run.directory` {folder} holds files but no run ({foreign[0]}, ...); "
                    "choose a new or empty folder"
                )
        with full_disk_is_a_user_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        continues = file.exists()
        if continues:
            _same_configuration(file, config)  # it may have been written while we were waiting
        else:
            with full_disk_is_a_user_error(file):
                write_whole(file, to_yaml(config))
        try:
            yield continues
        except BaseException:
            written = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
            if written == {CONFIG_FILE} and not continues:
                file.unlink()  # nothing had begun: the folder is free for another configuration
            raise


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process of this machine, or of others that share its file system, is at work in the folder.

    A bucket knows no locks: there the file says who came last, and shows that writing is allowed.
    """
    file = folder / ".lock"
    if in_bucket(folder):
        with _unwritable_is_a_user_error(folder):
            write_whole(file, f"{socket.gethostname()}, process {os.getpid()}\n")
        yield
        return
    with _unwritable_is_a_user_error(folder), full_disk_is_a_user_error(folder):
        lock = open(file, "w")  # noqa: SIM115  (held open below)
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
def _unwritable_is_a_user_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Libraries for buckets have errors of their own; on a disk only the system's say that it may not be.
        if not isinstance(error, OSError) and not in_bucket(folder):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = "pip install gcsfs" if isinstance(error, ImportError) else "check the name and your rights"
        raise UserError(f"`run.directory` {folder} cannot be used ({reason}); {remedy}") from error


def _same_configuration(file: Path, config: Config) -> None:
    try:
        there = load_config(file)
    except UserError as error:
        raise UserError(
            f"{file} is no configuration of a run ({error}); choose another run.directory, or remove that "
            "folder"
        ) from error
    keys = [key for key in differing_keys(there, config) if not key.startswith(HARMLESS_KEYS)]
    if not keys:
        return
    key = keys[0]
    others = f" (and {len(keys) - 1} more: {', '.join(keys[1:4])})" if len(keys) > 1 else ""
    saved, wanted = _at(there.model_dump(), key), _at(config.model_dump(), key)
    raise UserError(
        f"{file.parent} holds a run with {key}={saved!r}, not {wanted!r}{others}; "
        "choose another run.directory, or the run's own configuration to continue it"
    )


def _at(tree: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def refuse_lost_checkpoints(run_folder: Path | str, config: Config) -> None:
    """Looks at a run folder without a whole checkpoint, which is about to begin again from step 0.

    Raises:
      UserError: the run came so far that it must have had one.
    """
    folder = as_path(run_folder)
    reached = [row["step"] for row in read_rows(folder / METRICS_FILE)]
    reached += [number for name in STEP_FOLDERS for _, number in _step_files(folder / name)]
    saved = load_config(folder / CONFIG_FILE).checkpoint.every
    every = min(config.evaluation.every, max(config.checkpoint.every, saved))
    if max(reached, default=0) > 2 * every:  # a save that begins waits for the one before it
        raise UserError(
            f"{folder} holds what a run wrote up to step {max(reached)}, but no whole checkpoint is left in "
            f"{CHECKPOINTS_FOLDER}/; put one back from a copy, or choose another run.directory"
        )


def cut_back(run_folder: Path | str, step: int) -> list[str]:
    """Removes from a run folder everything that was written after `step`, and what a kill left half written.

    `metrics.jsonl` keeps its whole lines up to the step; `dialogues/` and `evaluations/` their files
    `step_N.*` with N up to it. (Event files only grow: see `metrics.MetricWriter`.) Each file is replaced as
    a whole, so a kill in here harms nothing; once more gives the same.

    Args:
      step: finished steps of the checkpoint that the run goes on from; -1 to begin again.

    Returns:
      What was found to be lost, in sentences.

    Raises:
      UserError: the disk is full.
    """
    folder = as_path(run_folder)
    with full_disk_is_a_user_error(folder):
        for place in (folder, *(folder / name for name in STEP_FOLDERS)):
            for leftover in (
                () if in_bucket(place) else place.glob(".*.*.*")
            ):  # temporary names of files.write_whole: .NAME.SUFFIX.RANDOM
                leftover.unlink()
        for name in STEP_FOLDERS:
            for file, number in _step_files(folder / name):
                if number > step:
                    file.unlink()
        return _cut_metrics(folder / METRICS_FILE, step)


def _step_files(folder: Path) -> list[tuple[Path, int]]:
    found = ((file, re.match(r"step_(\d+)", file.name)) for file in folder.glob("step_*"))
    return [(file, int(number.group(1))) for file, number in found if number]


def _cut_metrics(file: Path, step: int) -> list[str]:
    data = file.read_bytes() if file.exists() else b""
    lines = data.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # torn by a kill
    rows = [(line, row) for line in lines if (row := read_row(line)) is not None]
    kept = b"".join(line for line, row in rows if row["step"] <= step)
    if not kept:
        file.unlink(missing_ok=True)
    elif kept != data:
        write_whole(file, kept)
    lost = []
    if broken := len(lines) - len(rows):
        lost.append(f"{broken} damaged {'line' if broken == 1 else 'lines'} of {file} removed")
    have = {row["step"] for _, row in rows if "reward/mean" in row}
    if missing := [number for number in range(1, step + 1) if number not in have]:
        lost.append(
            f"{file} lacks the rows of {len(missing)} of the {step} finished steps (from {missing[0]} to "
            f"{missing[-1]}); they are lost, the weights are not"
        )
    return lost
