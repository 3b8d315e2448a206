"""One run on several processes: who holds what, and how values that all need come together.

Everything here is the identity for a single process. With several, each holds its own share of the dialogues
with its own users and judges, on its own devices; what all of them must know (cells, token rows) is gathered,
and from there on every process runs the same programs in the same order on the whole mesh.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mapo_jax.commands import Sentinel, exit_now, printable
from mapo_jax.config import Config, RolloutConfig, known_keys, updated, value_of
from mapo_jax.errors import UserError
from mapo_jax.model.qwen import Params, QwenConfig, in_precision, parameter_shapes
from mapo_jax.model.sharding import MESH_AXES, ROLLOUT_RULES, param_shardings
from mapo_jax.peers import AGAIN, Peers
from mapo_jax.running.stop import Interrupted

T = TypeVar("T")

STATUS = 3  # exit status of a process that ends because another one did
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_TASKS = ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")  # how many Open MPI and Slurm have started
# What `jax.distributed.initialize` says where there is no cluster, or where jax is at work already.
_NO_CLUSTER = ("coordinator_address should be defined", "must be called before any JAX calls")


@dataclass(frozen=True)
class Processes:
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
        return [value] if self.peers is None else self.peers.exchange(what, value, everybody=False)

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
            if bad_input:
                print(f"error: {words}", file=sys.stderr)
            else:
                traceback.print_exc()
            self.peers.leave(words)
            exit_now(2 if bad_input else 1)

    def part(self) -> None:
        """Says goodbye; all processes stand at the same place, and each may end in its own time."""
        if self.peers is not None and not self.peers.over:
            self.exchange("the end", None)
            self.peers.leave()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.peers is not None:
            jax.distributed.shutdown()  # waits for the others
            Sentinel.dismiss()


def join(config: Config) -> Processes:
    """Makes this process one of a run's, before anything touches a device.

    It is one of several if `JAX_COORDINATOR_ADDRESS` (HOST:PORT of process 0), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` are set, or where `jax.distributed.initialize` finds its processes by itself: on Cloud
    TPU, under Slurm and Open MPI. Otherwise nothing happens.

    Raises:
      UserError: the variables make no sense, processes are missing, or they disagree on the configuration or
        on the code; every process that has come says the same.
    """
    jax.config.update("jax_enable_preemption_service", False)  # signals are heard by interruption.StopRequest
    named = any(map(os.environ.get, (ADDRESS, COUNT, INDEX)))
    peers = _join_named(config) if named else _join_cluster(config)
    return Processes() if peers is None else Processes(peers.index, peers.count, peers)


def _join_named(config: Config) -> Peers | None:
    """The processes that the environment variables name; None for a single one."""
    address, count, index = _from_variables()
    if count == 1:
        return None
    bind = os.environ.get(BIND) or address
    # Before jax's own service, which would end this process where another is missing, and not say which.
    peers = _meet(config, _listener(bind) if index == 0 else _host_and_port(address), count, index)
    try:
        _initialize(config, address, count, index, coordinator_bind_address=bind)
    except RuntimeError as error:
        words = f"jax.distributed.initialize failed: {printable(str(error))}"
        peers.leave(words)
        raise UserError(words) from error
    return peers


def _join_cluster(config: Config) -> Peers | None:
    """The processes that jax finds by itself; None if there are none, or just one."""
    if next(filter(None, map(os.environ.get, _TASKS)), None) == "1":
        return None  # jax would leave a single process one of its GPUs
    Sentinel.post(
        f"not all processes of this cluster came within {config.run.join_seconds:g} s; start the same "
        f"command on every host, or set {COUNT}=1 for a run of one process"
    )
    try:
        _initialize(config)
    except Exception as error:  # whatever a cluster's own library raises
        Sentinel.dismiss()
        if any(words in str(error) for words in _NO_CLUSTER):
            return None
        raise UserError(
            f"this looks like a cluster, but its processes cannot be found ({error}); set {ADDRESS}, {COUNT} "
            f"and {INDEX}, or {COUNT}=1 for a run of one process"
        ) from error
    count, index = jax.process_count(), jax.process_index()
    if count > 1:
        # jax does not say publicly where process 0 is, so that tells the others itself.
        listener = _listener(f"{_own_address()}:0") if index == 0 else None
        where = json.dumps(listener.getsockname()[:2] if listener else None).encode().ljust(80)
        told = multihost_utils.broadcast_one_to_all(np.frombuffer(where, np.uint8))
        try:
            return _meet(config, listener or tuple(json.loads(told.tobytes())), count, index)
        except UserError:
            Sentinel.dismiss()
            jax.distributed.shutdown()
            raise
    Sentinel.dismiss()
    jax.distributed.shutdown()
    return None


def _initialize(config: Config, *where: Any, **bind: str) -> None:
    """jax's own service; it notices what `Peers` notices, later and without a sentence."""
    silent = math.ceil(config.run.silent_seconds)
    jax.distributed.initialize(
        *where,
        initialization_timeout=math.ceil(config.run.join_seconds),
        heartbeat_timeout_seconds=2 * silent,
        shutdown_timeout_seconds=silent,
        **bind,
    )


def _meet(config: Config, where: socket.socket | tuple[str, int], count: int, index: int) -> Peers:
    """All processes, which agree on the configuration and the code."""
    join, silent = config.run.join_seconds, config.run.silent_seconds
    try:
        peers = Peers(where, count, index, join, silent, _end_with)
    except TimeoutError as error:
        raise UserError(
            f"process 0 at {where[0]}:{where[1]} could not be reached within {join:g} s by process {index} "
            f"of {count}; start the same command there, and see that the port is open"
        ) from error
    agree(peers, _about(config))
    Sentinel.post(
        f"process {index} of {count} ended without a word of its own: it was killed, or process 0, on which "
        f"all others depend, is gone; {AGAIN}"
    )
    return peers


def agree(peers: Peers, about: dict[str, str]) -> None:
    """Compares what all processes must agree on: a name of it -> its text.

    Raises:
      UserError: the first name for which a process differs from process 0; the same in every process.
    """
    all_about = peers.exchange("configuration", about, everybody=False)
    refusal = peers.exchange("agreement", all_about and _disagreement(all_about))[0]
    if refusal is not None:
        peers.leave()
        raise UserError(refusal)


def _disagreement(all_about: list[dict[str, str]]) -> str | None:
    first = all_about[0]
    for other, its in enumerate(all_about):
        for name in dict.fromkeys((*first, *its)):
            if first.get(name) != its.get(name):
                texts = first.get(name, "nothing"), its.get(name, "nothing")
                return (
                    f"processes 0 and {other} disagree: {name} is {texts[0]} in process 0 and {texts[1]} in "
                    f"process {other}; start the same command with the same code on every host"
                )
    return None


def _end_with(sentence: str) -> NoReturn:
    print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
    exit_now(STATUS)


def _from_variables() -> tuple[str, int, int]:
    if os.environ.get(COUNT) == "1":
        return "", 1, 0
    for name in (ADDRESS, COUNT, INDEX):
        if not os.environ.get(name):
            raise UserError(f"{name} is not set; several processes need {ADDRESS}, {COUNT} and {INDEX}")
    address = os.environ[ADDRESS]
    for name in (ADDRESS, BIND):
        host, _, port = os.environ.get(name, address).rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"{name} is {os.environ[name]!r}; it must be HOST:PORT of process 0")
    try:
        count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
    except ValueError as error:
        raise UserError(f"{COUNT} and {INDEX} must be whole numbers: {error}") from error
    if not 0 <= index < count:
        raise UserError(f"{INDEX} is {index}; it must be between 0 and {COUNT}-1, which is {count - 1}")
    return address, count, index


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _listener(address: str) -> socket.socket:
    """Listens at this address alone."""
    host, port = _host_and_port(address)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"process 0 cannot listen at {address} ({error}); stop what is at work there, choose another "
            f"port in {ADDRESS}, or name an address of this machine in {BIND}"
        ) from error


def _own_address() -> str:
    """This machine's address in its network."""
    with contextlib.suppress(OSError):
        if not (named := socket.gethostbyname(socket.gethostname())).startswith("127."):
            return named
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address for documentation; nothing is sent
        return probe.getsockname()[0]
    return "127.0.0.1"


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


def rollout_mesh(mesh: Mesh, processes: Processes) -> Mesh:
    """The mesh that this process samples on: its own devices, cut over `tensor` as in training.

    A single process samples on the training mesh itself.

    Raises:
      UserError: a `tensor` group of the mesh lies on several processes.
    """
    if processes.count == 1:
        return mesh
    tensor = mesh.shape["tensor"]
    groups = mesh.devices.reshape(-1, tensor)
    own = [group for group in groups if group[0].process_index == processes.index]
    if any(device.process_index != group[0].process_index for group in groups for device in group):
        local = sum(device.process_index == processes.index for device in mesh.devices.flat)
        raise UserError(
            f"`mesh.tensor` is {tensor}; it must divide the {local} devices of one process, which holds "
            "dialogues on its own devices"
        )
    devices = np.asarray(own).reshape(1, len(own), tensor)
    return Mesh(devices, MESH_AXES, axis_types=mesh.axis_types)


def rollout_weights(
    config: QwenConfig, mesh: Mesh, processes: Processes, dtype: str
) -> Callable[[Params], Params]:
    """The weights as this process samples with them: on its `rollout_mesh`, in the compute dtype.

    One program on the whole mesh gathers what `fsdp` has cut, cast before it travels; norms keep float32, in
    which they are computed. A single process takes the training weights as they are.
    """
    if processes.count == 1:
        return lambda params: params
    local = param_shardings(parameter_shapes(config), rollout_mesh(mesh, processes), ROLLOUT_RULES)
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
