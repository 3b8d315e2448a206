"""Checkpoints of a run: saved in the background, verified by checksums, restored into any sharding."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mapo_jax import files
from mapo_jax.commands import machine_errors
from mapo_jax.errors import UserError
from mapo_jax.learning.train_state import TrainState
from mapo_jax.running.run_folder import BASE_FOLDER, CHECKPOINTS_FOLDER, best_steps, whole_steps

LOG = logging.getLogger("mapo_jax.checkpoint")  # no handler of its own, so it goes to standard error

_CHECKSUM = "crc32"  # key in the progress mapping: the checksum of its other values
_PROCESS_CHECKSUMS = "checksums.process_"  # file that each of several processes writes before the merge
_NONE: Mapping[int, Any] = MappingProxyType({})
_CHUNK_BYTES = 16 * 2**20  # largest stored chunk of an array


class Checkpoints(AbstractContextManager):
    """The checkpoints of one run: asynchronous, complete, restored into any sharding.

    A checkpoint holds the parameters, the optimizer's state, the frozen reference if there is one, a JSON
    mapping with everything else that the run continues from (step, seeds, position in the data,
    configuration), and checksums of all of these. A checkpoint without its checksums is not whole. Checksums
    are compared before anything is read. An interrupted save leaves a folder with a temporary name, which is
    never read, and is removed before the next save.
    """

    def __init__(self, run_folder: Path | str, *, keep: int = 2, keep_best: int = 1) -> None:
        """Opens `run_folder/checkpoints` and starts to remove the folders of interrupted saves.

        Args:
          keep: number of newest checkpoints to keep.
          keep_best: number of checkpoints to keep beside them: those with the best validation return.
        """
        # Errors reach us as exceptions; the library's own tracebacks would bury the one sentence.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        run_folder = files.as_path(run_folder)
        self.folder = _absolute(run_folder) / CHECKPOINTS_FOLDER
        policies = [preservation_policy.LatestN(keep)]
        if keep_best:
            policies.append(_Best(run_folder, keep_best))
        with files.disk_errors(self.folder):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                ),
            )

    @property
    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending; waits for a running save."""
        self.wait()
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        progress: Mapping[str, Any],
        sampling: Mapping[int, Any] = _NONE,
    ) -> None:
        """Starts a save; returns when the state is copied, so that its buffers may be donated.

        Does nothing if the step is already saved. All processes call it for the same step.

        Args:
          step: finished steps.
          state: the training state.
          progress: JSON values: everything else that the run continues from.
          sampling: by version, earlier trained weights, by which dialogues of the steps to come are held.

        Raises:
          UserError: the disk is full, in this save or the one before. Earlier checkpoints are whole.
        """
        if step in self.steps:
            return
        with files.disk_errors(self.folder):
            saved = ocp.args.JsonSave(_with_checksum({**progress, "step": step}))
            args = ocp.args.Composite(state=_chunked(_to_saved(state, sampling)), progress=saved)
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Waits until no save is running. Raises as `save` does."""
        with files.disk_errors(self.folder):
            self._manager.wait_until_finished()

    def restore_latest(self, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest whole checkpoint.

        Args:
          template: arrays or `jax.ShapeDtypeStruct`s with the shardings to restore into, which may differ
            from those of the save.

        Returns:
          The state and the progress mapping with its `step`; None without a checkpoint. `restore_sampling`
          restores the rest.

        Raises:
          UserError: the saved state does not fit the template, or cannot be read.
        """
        if not (steps := self.steps):
            return None
        folder = self.folder / str(steps[-1])
        return _from_saved(_restore(folder, _to_saved(template)), template), read_progress(folder)

    def restore_sampling(self, template: Mapping[int, Any]) -> dict[int, Any]:
        """The `sampling` of the newest whole checkpoint; arguments and errors as of `restore_latest`."""
        if not template:
            return {}
        saved = {str(version): weights for version, weights in template.items()}
        restored = _restore(self.folder / str(self.steps[-1]), {"sampling": saved})["sampling"]
        return {int(version): weights for version, weights in restored.items()}

    def close(self) -> None:
        """Finishes a running save and closes the manager. Raises as `save` does."""
        with files.disk_errors(self.folder):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except UserError:
            if error is None:  # otherwise it most likely repeats the first error
                raise


class _Best(preservation_policy.PreservationPolicy):
    """Keeps the checkpoints with the best evaluations. Evaluations are written after the save."""

    def __init__(self, run_folder: Path, count: int) -> None:
        self._folder, self._count = run_folder, count

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = best_steps(self._folder, [checkpoint.step for checkpoint in checkpoints])[: self._count]
        return [checkpoint.step in best for checkpoint in checkpoints]


def _absolute(path: Path) -> Path:
    return path if files.in_bucket(path) else path.absolute()


# --- Progress. ---


def read_progress(checkpoint: Path | str) -> dict[str, Any]:
    """The JSON mapping saved with a checkpoint.

    Raises:
      UserError: it is damaged or cannot be read.
    """
    folder = _absolute(files.as_path(checkpoint))
    saved = files.read_object(folder / "progress" / "metadata") or {}
    checksum = saved.pop(_CHECKSUM, None)
    expected = files.crc_of(saved) if (folder / "state" / files.CHECKSUMS_FILE).exists() else None
    if "step" not in saved or checksum != expected:
        raise _damaged(folder, "progress/metadata")
    return saved


def _with_checksum(progress: Mapping[str, Any]) -> dict[str, Any]:
    progress = json.loads(json.dumps(progress))
    return {**progress, _CHECKSUM: files.crc_of(progress)}


# --- Saving arrays. ---


def save_base(run_folder: Path | str, params: Any) -> None:
    """Writes the frozen weights of a run with adapters atomically; replaces earlier ones.

    Raises:
      UserError: the disk is full.
    """
    folder = _absolute(files.as_path(run_folder)) / BASE_FOLDER
    with files.disk_errors(folder), ocp.AsyncCheckpointer(_ChecksumHandler()) as checkpointer:
        checkpointer.save(folder / "state", args=_chunked({"params": params}), force=True)
        checkpointer.wait_until_finished()


class _ChecksumHandler(ocp.PyTreeCheckpointHandler):
    """Writes the checksums of the saved files into their folder before it gets its final name.

    Each of several processes sums the files that it wrote, in the background like the save; process 0 merges.
    """

    async def async_save(self, directory: Path, *args: Any, **options: Any) -> list[ocp.future.Future]:
        futures = await super().async_save(directory, *args, **options)
        if jax.process_count() == 1:
            return futures
        return [ocp.future.ChainedFuture(futures, lambda: self._sum_files_of_process(directory))]

    def _sum_files_of_process(self, directory: Path) -> None:
        name = f"ocdbt.process_{jax.process_index()}"
        sums = files.checksums(directory / name) if (directory / name).is_dir() else {}
        content = {f"{name}/{file}": value for file, value in sums.items()}
        files.write_whole(directory / f"{_PROCESS_CHECKSUMS}{jax.process_index()}", json.dumps(content))

    def finalize(self, directory: Path) -> None:
        super().finalize(directory)
        parts = [file for file in directory.iterdir() if file.name.startswith(_PROCESS_CHECKSUMS)]
        known = {name: value for file in parts for name, value in (files.read_object(file) or {}).items()}
        for file in parts:
            file.unlink()
        # orbax writes the time of the commit into that file afterwards; no restore reads it
        files.write_checksums(directory, known, without="_CHECKPOINT_METADATA")


@ocp.args.register_with_handler(_ChecksumHandler, for_save=True, for_restore=True)
class _Save(ocp.args.PyTreeSave):
    """The arguments of a save by `_ChecksumHandler`."""


def _chunked(saved: Any) -> _Save:
    """Stores arrays in chunks, stacked matrices layer by layer, so that a layer can be read alone."""

    def options(leaf: Any) -> ocp.SaveArgs:
        if leaf.nbytes <= _CHUNK_BYTES:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())

    return _Save(saved, save_args=jax.tree.map(options, saved))


def _to_saved(state: TrainState, sampling: Mapping[int, Any] = _NONE) -> dict[str, Any]:
    # The optimizer's named tuples become a flat dict, so that the format has names and arrays only. The base
    # beside adapters never changes: the run folder has it once.
    saved = {"params": state.params, "optimizer": _by_name(state.opt_state), "step": state.step}
    if state.reference is not None:
        saved["reference"] = state.reference
    if sampling:
        saved["sampling"] = {str(version): weights for version, weights in sampling.items()}
    return saved


def _from_saved(saved: Mapping[str, Any], template: TrainState) -> TrainState:
    moments = [saved["optimizer"][name] for name in _by_name(template.opt_state)]
    opt_state = jax.tree.unflatten(jax.tree.structure(template.opt_state), moments)
    return TrainState(saved["params"], opt_state, saved["step"], saved.get("reference"))


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


# --- Reading arrays. ---


def restore_params(folder: Path, template: Any) -> Any:
    """The parameters alone: to start another run from, to export or to serve.

    Args:
      folder: `checkpoint_folder` of a run, or its `BASE_FOLDER`.
      template: the parameters' tree as arrays or `jax.ShapeDtypeStruct`s, with shardings if they matter.

    Raises:
      UserError: they cannot be read, or a parameter is missing, surplus or of another shape.
    """
    return _restore(folder, {"params": template})["params"]


def _restore(folder: Path, template: Mapping[str, Any]) -> Any:
    """Restores the entries of a checkpoint that `template` names; checks shapes (orbax would cut or pad)."""
    state = _verified_state(folder)
    abstract = jax.tree.map(_abstract, template)
    handler = ocp.PyTreeCheckpointHandler()
    with _read_errors(folder):
        saved = handler.metadata(state).tree
        _refuse_other_shapes(folder, {name: saved.get(name, {}) for name in template}, abstract)
        places = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=places, partial_restore=True)
        return handler.restore(state, args=args)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def open_params(folder: Path, template: Any) -> Callable[[str, int | None], np.ndarray]:
    """Opens the parameters to be read one by one, as a `huggingface.Reader`.

    Args:
      folder: `checkpoint_folder` of a run, or its `BASE_FOLDER`.
      template: the parameters' tree as `jax.ShapeDtypeStruct`s.

    Returns:
      A function from a path ("layers/attention/q/kernel") and a layer, or None for all layers, to an array.
      It reads only that array.

    Raises:
      UserError: they cannot be read, or a parameter is missing or of another shape.
    """
    state = _verified_state(folder)
    stores = {}
    with _read_errors(folder):
        saved = ocp.PyTreeCheckpointHandler().metadata(state).tree
        _refuse_other_shapes(folder, {"params": saved.get("params", {})}, {"params": template})
        for name in _by_name(template):
            kvstore = {"driver": "ocdbt", "base": state.as_uri(), "path": f"params.{name}/"}
            spec = {"driver": "zarr", "kvstore": kvstore}
            stores[name.replace(".", "/")] = tensorstore.open(spec, read=True, open=True)
        stores = {path: store.result() for path, store in stores.items()}

    def read(path: str, layer: int | None) -> np.ndarray:
        store = stores[path] if layer is None else stores[path][layer]
        with _read_errors(folder):
            return store.read().result()

    return read


def _refuse_other_shapes(folder: Path, saved: Any, template: Any) -> None:
    there = {name: tuple(leaf.shape) for name, leaf in _by_name(saved).items()}
    here = {name: tuple(leaf.shape) for name, leaf in _by_name(template).items()}
    for name in (*here, *there):
        if name not in there:
            problem = f"the checkpoint {folder} has no {name}"
        elif name not in here:
            problem = f"the checkpoint {folder} has {name}, which this model does not"
        elif there[name] != here[name]:
            problem = f"{name} has shape {there[name]} in the checkpoint {folder} and {here[name]} here"
        else:
            continue
        raise UserError(f"{problem}; use the configuration that the run was started with")


def _verified_state(folder: Path) -> Path:
    """The folder of a checkpoint's arrays, after a comparison with its checksums.

    Each of several processes compares its share of the files.

    Raises:
      UserError: a file is missing or damaged.
    """
    state = _absolute(folder) / "state"
    if not state.is_dir():
        raise _damaged(folder, "state")
    try:
        known = files.read_checksums(state)
    except ValueError:
        raise _damaged(folder, f"state/{files.CHECKSUMS_FILE}") from None
    if known is None:
        progress = files.read_object(folder / "progress" / "metadata") or {}
        if folder.name != BASE_FOLDER and _CHECKSUM in progress:
            raise _damaged(folder, f"state/{files.CHECKSUMS_FILE}")
        LOG.warning("%s was saved without checksums, by an earlier version: damage goes unnoticed", folder)
        return state
    names = sorted(known)
    share = {name: known[name] for name in names[jax.process_index() :: jax.process_count()]}
    damaged = next(files.differing(state, share), None)
    first = len(names) if damaged is None else names.index(damaged)
    if jax.process_count() > 1:
        first = int(np.min(multihost_utils.process_allgather(np.int32(first))))
    if first < len(names):
        raise _damaged(folder, f"state/{names[first]}")
    return state


@contextmanager
def _read_errors(folder: Path) -> Iterator[None]:
    """Raises UserError for the errors of orbax and tensorstore about a checkpoint that cannot be read."""
    try:
        with machine_errors(), files.disk_errors(folder):
            yield
    except (UserError, jax.errors.JaxRuntimeError):  # jax: such as out of memory; the files are not to blame
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
    if not folder.name.isdecimal():
        return "put it back from a copy of the run, or start a new run in another run.directory"
    earlier = [step for step in whole_steps(folder.parent.parent) if step < int(folder.name)]
    if not earlier:
        return "there is no checkpoint before it: start a new run in another run.directory"
    return f"remove that folder to go on from the one before it, {folder.with_name(str(earlier[-1]))}"
