"""One run on several processes: how they join, exchange values and share dialogues and devices.

For a single process every function here is the identity. Of several, each holds its share of the dialogues
with its own users and judges, on its own devices. Cells and token rows are gathered; then every process runs
the same programs in the same order on the whole mesh.
"""

import json
import math
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mapo_jax.commands import Sentinel, exit_now, printable
from mapo_jax.config import Config, RolloutConfig, known_keys, updated, value_of
from mapo_jax.errors import UserError
from mapo_jax.model.qwen import Params, QwenConfig, in_precision, parameter_shapes
from mapo_jax.model.sharding import MESH_AXES, ROLLOUT_RULES, param_shardings, with_shardings
from mapo_jax.peers import AGAIN, Peers
from mapo_jax.running.stop import Interrupted

T = TypeVar("T")

STATUS = 3  # exit status of a process that exits because another one failed
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_TASKS = ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")  # number of processes under Open MPI and Slurm
# Messages of `jax.distributed.initialize` without a cluster, or after the first use of jax.
_NO_CLUSTER = ("coordinator_address should be defined", "must be called before any JAX calls")


@dataclass(frozen=True)
class Processes(AbstractContextManager):
    """The processes of a run, as one of them knows them; a context manager that disconnects at its end."""

    index: int = 0
    count: int = 1
    peers: Peers | None = None  # with several processes

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes the run's common files and shows its progress."""
        return self.index == 0

    def share(self, total: int) -> slice:
        """The indices of this process's share of `total` items; the shares in order are all items."""
        return slice(self.index * total // self.count, (self.index + 1) * total // self.count)

    def exchange(self, what: str, value: Any) -> list[Any]:
        """The values (JSON) of all processes, in their order; a barrier. `what` names the call."""
        return [value] if self.peers is None else self.peers.exchange(what, value)

    def report(self, what: str, value: Any) -> list[Any] | None:
        """The values of all processes in process 0; None in the others, which do not wait."""
        return [value] if self.peers is None else self.peers.exchange(what, value, everybody=False)

    def together(self, what: str, work: Callable[[], T]) -> T:
        """The result of `work` in this process, such as its dialogues; returns when all have finished.

        Raises:
          Interrupted: a process was interrupted or raised UserError. All raise it, and so stay at the same
            point of the program; the one with the error has it as the cause.
        """
        if self.peers is None:
            return work()
        problem = reason = result = None
        try:
            result = work()
        except Interrupted as error:
            problem, reason = error, str(error)
        except UserError as error:
            problem, reason = error, f"process {self.index}: {error}"
        reasons = [reason for reason in self.exchange(what, reason) if reason is not None]
        if reasons:
            raise Interrupted(reasons[0]) from problem
        return result

    def gather(self, tree: T) -> T:
        """The arrays of all processes, concatenated along their first axis, in every process.

        Args:
          tree: numpy arrays of the same shapes in every process. An array that is distributed over the
            devices of all processes is returned whole.
        """
        return tree if self.count == 1 else multihost_utils.process_allgather(tree, tiled=True)

    @contextmanager
    def exit_on_error(self) -> Iterator[None]:
        """On an error in this process, notifies the other processes and exits at once.

        Otherwise this process and the others would wait for each other.
        """
        try:
            yield
        except BaseException as error:
            if self.peers is None or self.peers.over:
                raise
            bad_input = isinstance(error, UserError)
            reason = printable(str(error) if bad_input else f"{type(error).__name__}: {error}")
            if bad_input:
                print(f"error: {reason}", file=sys.stderr)
            else:
                traceback.print_exc()
            self.peers.leave(reason)
            exit_now(2 if bad_input else 1)

    def finish(self) -> None:
        """The final barrier; afterwards each process may exit at any time."""
        if self.peers is not None and not self.peers.over:
            self.exchange("the end", None)
            self.peers.leave()

    def __exit__(self, *_: object) -> None:
        if self.peers is not None:
            jax.distributed.shutdown()  # waits for the others
            Sentinel.dismiss()


SINGLE = Processes()  # a run of one process


def join(config: Config) -> Processes:
    """Connects this process to the others of its run; call it before anything uses a device.

    There are several processes if `JAX_COORDINATOR_ADDRESS` (HOST:PORT of process 0), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` are set, or where `jax.distributed.initialize` finds them itself: on Cloud TPU, under
    Slurm and under Open MPI. Otherwise the run has one process.

    Raises:
      UserError: the variables are invalid, processes are missing, or they differ in configuration or code;
        the same error in every process that is there.
    """
    jax.config.update("jax_enable_preemption_service", False)  # running.stop.StopRequest handles signals
    named = any(map(os.environ.get, (ADDRESS, COUNT, INDEX)))
    peers = _join_named(config) if named else _join_cluster(config)
    return SINGLE if peers is None else Processes(peers.index, peers.count, peers)


def _join_named(config: Config) -> Peers | None:
    """The processes given by environment variables; None for a single one."""
    address, count, index = _from_variables()
    if count == 1:
        return None
    bind = os.environ.get(BIND) or address
    # Before jax's service, which aborts this process if another is missing, without naming that one.
    peers = _meet(config, _listener(bind) if index == 0 else _host_and_port(address), count, index)
    try:
        _initialize(config, address, count, index, coordinator_bind_address=bind)
    except RuntimeError as error:
        reason = f"jax.distributed.initialize failed: {printable(str(error))}"
        peers.leave(reason)
        raise UserError(reason) from error
    return peers


def _join_cluster(config: Config) -> Peers | None:
    """The processes that jax finds itself; None if there is no other."""
    if next(filter(None, map(os.environ.get, _TASKS)), None) == "1":
        return None  # jax would give a single process only one of its GPUs
    Sentinel.post(
        f"not all processes of this cluster came within {config.run.join_seconds:g} s; start the same "
        f"command on every host, or set {COUNT}=1 for a run of one process"
    )
    try:
        _initialize(config)
    except Exception as error:  # of any type: cluster libraries raise their own
        Sentinel.dismiss()
        if any(message in str(error) for message in _NO_CLUSTER):
            return None
        raise UserError(
            f"this looks like a cluster, but its processes cannot be found ({error}); set {ADDRESS}, {COUNT} "
            f"and {INDEX}, or {COUNT}=1 for a run of one process"
        ) from error
    count, index = jax.process_count(), jax.process_index()
    if count > 1:
        # jax has no public call for the address of process 0, so process 0 broadcasts it.
        listener = _listener(f"{_own_address()}:0") if index == 0 else None
        where = json.dumps(listener.getsockname()[:2] if listener else None).encode().ljust(80)
        address = multihost_utils.broadcast_one_to_all(np.frombuffer(where, np.uint8)).tobytes()
        try:
            return _meet(config, listener or tuple(json.loads(address)), count, index)
        except UserError:
            Sentinel.dismiss()
            jax.distributed.shutdown()
            raise
    Sentinel.dismiss()
    jax.distributed.shutdown()
    return None


def _initialize(config: Config, *where: Any, **bind: str) -> None:
    """Starts jax's service. It detects the failures that `Peers` detects later, and gives no sentence."""
    silent = math.ceil(config.run.silent_seconds)
    jax.distributed.initialize(
        *where,
        initialization_timeout=math.ceil(config.run.join_seconds),
        heartbeat_timeout_seconds=2 * silent,
        shutdown_timeout_seconds=silent,
        **bind,
    )


def _meet(config: Config, where: socket.socket | tuple[str, int], count: int, index: int) -> Peers:
    """Connects to all processes, and compares configuration and code."""
    join, silent = config.run.join_seconds, config.run.silent_seconds
    try:
        peers = Peers(where, count, index, join, silent, _end_with)
    except TimeoutError as error:
        raise UserError(
            f"process 0 at {where[0]}:{where[1]} could not be reached within {join:g} s by process {index} "
            f"of {count}; start the same command there, and see that the port is open"
        ) from error
    agree(peers, _about(config))
    Sentinel.post(f"process {index} of {count} was killed, or aborted because process 0 is gone; {AGAIN}")
    return peers


def agree(peers: Peers, about: dict[str, str]) -> None:
    """Compares what must be the same in all processes.

    Args:
      about: name -> value as text.

    Raises:
      UserError: the first name in which a process differs from process 0; the same in every process.
    """
    first, *others = peers.exchange("configuration", about)
    for other, values in enumerate(others, start=1):
        for name in dict.fromkeys((*first, *values)):
            here, there = first.get(name, "nothing"), values.get(name, "nothing")
            if here != there:
                peers.leave()
                raise UserError(
                    f"processes 0 and {other} disagree: {name} is {here} in process 0 and {there} in "
                    f"process {other}; start the same command with the same code on every host"
                )


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
    """A socket that listens at this address only."""
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
    with suppress(OSError):
        if not (named := socket.gethostbyname(socket.gethostname())).startswith("127."):
            return named
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address for documentation; nothing is sent
        return probe.getsockname()[0]
    return "127.0.0.1"


def _about(config: Config) -> dict[str, str]:
    """What must be the same in all processes, the most helpful for an error first."""
    settings = {f"`{key}`": repr(value_of(config, key)) for key in known_keys()}
    code = blake2b(digest_size=6)
    package = Path(__file__).parents[1]
    for file in sorted(file for file in package.rglob("*") if file.suffix in (".py", ".yaml")):
        code.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return settings | {"jax's version": jax.__version__, "the code (its digest)": code.hexdigest()}


# --- Devices. ---


def process_count(mesh: Mesh) -> int:
    """The number of processes that the devices of a mesh belong to."""
    return len({device.process_index for device in mesh.devices.flat})


def rollout_mesh(mesh: Mesh, processes: Processes) -> Mesh:
    """The mesh that this process samples on: its own devices, with `tensor` as in training.

    A single process samples on the training mesh.

    Raises:
      UserError: a `tensor` group of the mesh spans several processes.
    """
    if processes.count == 1:
        return mesh
    tensor = mesh.shape["tensor"]
    groups = mesh.devices.reshape(-1, tensor)
    local_groups = [group for group in groups if group[0].process_index == processes.index]
    if any(device.process_index != group[0].process_index for group in groups for device in group):
        local = sum(device.process_index == processes.index for device in mesh.devices.flat)
        raise UserError(
            f"`mesh.tensor` is {tensor}; it must divide the {local} devices of one process, which holds "
            "dialogues on its own devices"
        )
    devices = np.asarray(local_groups).reshape(1, len(local_groups), tensor)
    return Mesh(devices, MESH_AXES, axis_types=mesh.axis_types)


def rollout_weights(
    config: QwenConfig, mesh: Mesh, processes: Processes, dtype: str
) -> Callable[[Params], Params]:
    """A function from the training weights to this process's sampling weights, on its `rollout_mesh`.

    One program on the whole mesh casts them to the compute dtype and gathers over `fsdp`; norms keep float32.
    A single process samples with the training weights themselves.
    """
    if processes.count == 1:
        return lambda params: params
    shapes = parameter_shapes(config)
    local = param_shardings(shapes, rollout_mesh(mesh, processes), ROLLOUT_RULES)
    training = param_shardings(shapes, mesh)
    gathered = jax.jit(
        lambda params: jax.lax.with_sharding_constraint(in_precision(params, dtype), training),
        out_shardings=param_shardings(shapes, mesh, ROLLOUT_RULES),
    )

    def localize(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        shards = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)

    return lambda params: jax.tree.map(localize, gathered(params), local)


def abstract_rollout_weights(
    params: Params, config: QwenConfig, own_mesh: Mesh, dtype: str, rules=ROLLOUT_RULES
) -> Params:
    """The result of `rollout_weights` for one of several processes, as `jax.ShapeDtypeStruct`s.

    Args:
      params: the weights or their shapes.
      own_mesh: the process's `rollout_mesh`.
      dtype: of computation; norms and adapters keep theirs.
      rules: their sharding; `sharding.RULES` for the engine's copy.
    """
    shardings = param_shardings(parameter_shapes(config), own_mesh, rules)
    return with_shardings(in_precision(params, dtype), shardings)


def share_of(rollout: RolloutConfig, processes: int) -> RolloutConfig:
    """One process's share of a step's scenarios and slots.

    Raises:
      UserError: they are no multiple of the number of processes.
    """
    totals = {name: size for name in ("scenarios", "slots") if (size := getattr(rollout, name)) is not None}
    for name, size in totals.items():
        if size % processes:
            raise UserError(
                f"`rollout.{name}` is {size}; it must be a multiple of the {processes} processes, "
                "each of which holds its share"
            )
    return updated(rollout, {name: size // processes for name, size in totals.items()})
