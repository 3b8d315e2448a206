"""One run on several processes: who holds what, and how values that all need come together.

Everything here is the identity for a single process. With several, each holds its own share of the dialogues
with its own users and judges, on its own devices; what all of them must know (cells, token rows) is gathered,
and from there on every process runs the same programs in the same order on the whole mesh.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mapo_jax.commands import printable
from mapo_jax.config import Config, RolloutConfig, known_keys, updated, value_of
from mapo_jax.errors import UserError
from mapo_jax.model.qwen import Params, QwenConfig, in_precision, parameter_shapes
from mapo_jax.model.sharding import MESH_AXES, ROLLOUT_RULES, param_shardings
from mapo_jax.peers import AGAIN, Peers, Sentinel
from mapo_jax.running.stop import Interrupted

T = TypeVar("T")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@dataclass(frozen=True)
class Hosts:
    """The processes of a run, seen from one of them; a context manager that leaves them in the end."""

    index: int = 0
    count: int = 1
    peers: Peers | None = None  # with several processes

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows what there is one of."""
        return self.index == 0

    def share(self, total: int) -> slice:
        """Which of `total` things are this process's; the shares of all, in order, are all things."""
        return slice(self.index * total // self.count, (self.index + 1) * total // self.count)

    def exchange(self, what: str, value: Any) -> list[Any]:
        """Every process's value (JSON), in their order; waits for all. `what` names the place in the code."""
        return [value] if self.peers is None else self.peers.exchange(what, value)

    def report(self, what: str, value: Any) -> list[Any] | None:
        """Every process's value for the first one; None for the others."""
        return [value] if self.peers is None else self.peers.report(what, value)

    def together(self, what: str, work: Callable[[], T]) -> T:
        """This process's own work, such as holding dialogues; returns when all have done theirs.

        Raises:
          Interrupted: a process was interrupted in it, or had an error. All raise it, so that all stand at
            the same place; the one with the error has it as the cause.
        """
        if self.peers is None:
            return work()
        problem = result = None
        try:
            result = work()
        except (Interrupted, UserError) as error:
            problem = error
        words = str(problem) if isinstance(problem, Interrupted) else f"process {self.index}: {problem}"
        said = [w for w in self.exchange(what, None if problem is None else words) if w is not None]
        if said:
            raise Interrupted(said[0]) from problem
        return result

    def gather(self, tree: T) -> T:
        """Arrays of all processes, joined along their first axis, whole in every process.

        Args:
          tree: numpy arrays, of the same shapes in every process.
        """
        return tree if self.count == 1 else multihost_utils.process_allgather(tree, tiled=True)

    def whole(self, array: jax.Array) -> np.ndarray:
        """All of an array that lies on the devices of all processes. A collective."""
        return np.asarray(array) if self.count == 1 else multihost_utils.process_allgather(array, tiled=True)

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Ends this process at once, with last words for the others, after an error that is its own alone.

        What follows an error would otherwise wait for the others, and they for this one.
        """
        try:
            yield
        except BaseException as error:
            if self.peers is None or self.peers.over:
                raise
            bad_input = isinstance(error, UserError)
            words = printable(str(error) if bad_input else f"{type(error).__name__}: {error}")
            Sentinel.dismiss()
            if bad_input:
                print(f"error: {words}", file=sys.stderr)
            else:
                traceback.print_exc()
            self.peers.leave(words)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2 if bad_input else 1)

    def part(self) -> None:
        """Says goodbye; all processes stand at the same place, and each may end in its own time."""
        if self.peers is not None and not self.peers.over:
            self.exchange("the end", None)
            self.peers.leave()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.peers is not None:
            jax.distributed.shutdown()  # waits for the others
            Sentinel.dismiss()


def join(config: Config) -> Hosts:
    """Makes this process one of a run's, before anything touches a device.

    It is one of several if `JAX_COORDINATOR_ADDRESS` (HOST:PORT of process 0), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` are set, or where jax finds its processes by itself: on Cloud TPU, under Slurm and Open
    MPI. Otherwise nothing happens.

    Raises:
      UserError: the variables make no sense, processes are missing, or they disagree on the configuration or
        on the code; every process that has come says the same.
    """
    place = _from_variables() if any(map(os.environ.get, (ADDRESS, COUNT, INDEX))) else _detected()
    if place is None or place[1] == 1:
        return Hosts()
    address, count, index = place
    peers = Peers(
        address,
        count,
        index,
        about=_about(config),
        join_seconds=config.run.join_seconds,
        silent_seconds=config.run.silent_seconds,
    )
    Sentinel.post(
        f"process {index} of {count} ended without a word of its own: it was killed, or process 0 at "
        f"{address}, on which all others depend, is gone; {AGAIN}"
    )
    jax.config.update("jax_enable_preemption_service", False)  # signals are heard by interruption.StopRequest
    jax.distributed.initialize(address, count, index, initialization_timeout=int(config.run.join_seconds) + 1)
    return Hosts(index, count, peers)


def _from_variables() -> tuple[str, int, int]:
    if os.environ.get(COUNT) == "1":
        return "", 1, 0
    for name in (ADDRESS, COUNT, INDEX):
        if not os.environ.get(name):
            raise UserError(f"{name} is not set; several processes need {ADDRESS}, {COUNT} and {INDEX}")
    address = os.environ[ADDRESS]
    if not address.rpartition(":")[2].isdecimal() or not address.rpartition(":")[0]:
        raise UserError(f"{ADDRESS} is {address!r}; it must be HOST:PORT of process 0")
    try:
        count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
    except ValueError as error:
        raise UserError(f"{COUNT} and {INDEX} must be whole numbers: {error}") from error
    if not 0 <= index < count:
        raise UserError(f"{INDEX} is {index}; it must be between 0 and {COUNT}-1, which is {count - 1}")
    return address, count, index


def _detected() -> tuple[str, int, int] | None:
    """Address, count and index as `jax.distributed.initialize` would find them; None if there are none."""
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [], None, 300)
    except Exception as error:  # whatever a cluster's own library raises
        raise UserError(
            f"this looks like a cluster, but its processes cannot be found ({error}); set {ADDRESS}, {COUNT} "
            f"and {INDEX}, or {COUNT}=1 for a run of one process"
        ) from error
    return None if None in found[:3] else found[:3]


def _about(config: Config) -> dict[str, str]:
    """What processes must agree on, most telling first."""
    settings = {f"`{key}`": repr(value_of(config, key)) for key in known_keys()}
    code = blake2b(digest_size=6)
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        code.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return settings | {"jax's version": jax.__version__, "the code (its digest)": code.hexdigest()}


# --- Devices. ---


def process_count(mesh: Mesh) -> int:
    """How many processes the devices of a mesh belong to."""
    return len({device.process_index for device in mesh.devices.flat})


def rollout_mesh(mesh: Mesh, hosts: Hosts) -> Mesh:
    """The mesh that this process samples on: its own devices, cut over `tensor` as in training.

    A single process samples on the training mesh itself.

    Raises:
      UserError: a `tensor` group of the mesh lies on several processes.
    """
    if hosts.count == 1:
        return mesh
    tensor = mesh.shape["tensor"]
    groups = mesh.devices.reshape(-1, tensor)
    own = [group for group in groups if group[0].process_index == hosts.index]
    if any(device.process_index != group[0].process_index for group in groups for device in group):
        local = sum(device.process_index == hosts.index for device in mesh.devices.flat)
        raise UserError(
            f"`mesh.tensor` is {tensor}; it must divide the {local} devices of one process, which holds "
            "dialogues on its own devices"
        )
    devices = np.asarray(own).reshape(1, len(own), tensor)
    return Mesh(devices, MESH_AXES, axis_types=mesh.axis_types)


def rollout_weights(config: QwenConfig, mesh: Mesh, hosts: Hosts, dtype: str) -> Callable[[Params], Params]:
    """The weights as this process samples with them: on its `rollout_mesh`, in the compute dtype.

    One program on the whole mesh gathers what `fsdp` has cut, cast before it travels; norms keep float32, in
    which they are computed. A single process takes the training weights as they are.
    """
    if hosts.count == 1:
        return lambda params: params
    local = param_shardings(parameter_shapes(config), rollout_mesh(mesh, hosts), ROLLOUT_RULES)
    cut = param_shardings(parameter_shapes(config), mesh)

    gathered = jax.jit(
        lambda params: jax.lax.with_sharding_constraint(in_precision(params, dtype), cut),
        out_shardings=param_shardings(parameter_shapes(config), mesh, ROLLOUT_RULES),
    )

    def own(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        parts = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

    return lambda params: jax.tree.map(own, gathered(params), local)


def abstract_rollout_weights(
    params: Params, config: QwenConfig, own_mesh: Mesh, dtype: str, rules=ROLLOUT_RULES
) -> Params:
    """What `rollout_weights` makes of weights for one of several processes, as `jax.ShapeDtypeStruct`s.

    Args:
      params: the tree of the weights, or of their shapes.
      own_mesh: the process's `rollout_mesh`.
      dtype: of computation; norms and adapters keep theirs.
      rules: how they lie; with `sharding.RULES` as the engine's copy does.
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        in_precision(params, dtype),
        param_shardings(parameter_shapes(config), own_mesh, rules),
    )


def share_of(rollout: RolloutConfig, processes: int) -> RolloutConfig:
    """What one of several processes holds of a step.

    Raises:
      UserError: scenarios or slots cannot be shared evenly.
    """
    shared = {name: getattr(rollout, name) for name in ("scenarios", "slots")}
    for name, size in shared.items():
        if size is not None and size % processes:
            raise UserError(
                f"`rollout.{name}` is {size}; it must be a multiple of the {processes} processes, "
                "each of which holds its share"
            )
    return updated(rollout, {name: size and size // processes for name, size in shared.items()})
