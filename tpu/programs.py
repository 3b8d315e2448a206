"""Compiles one program of a training run for a TPU slice, on a machine without a TPU.

The programs are those of `mapo_jax.train`, made by the same functions from shapes instead of arrays: the
update, and the engine's prefill and generate, each at its longest. Needs libtpu (requirements-tpu.txt).
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mapo_jax.config import Config
from mapo_jax.learning.batch import microbatch_rows, row_lengths
from mapo_jax.learning.programs import abstract_batch, loss_tokens, make_programs, minibatch_rows
from mapo_jax.learning.train_state import abstract_state
from mapo_jax.model.qwen import QwenConfig, parameter_shapes
from mapo_jax.model.sharding import MESH_AXES, host_order, make_mesh, param_shardings, row_shards
from mapo_jax.rollout.engine import Engine
from mapo_jax.running.policy import make_engine
from mapo_jax.running.processes import (
    Processes,
    abstract_rollout_weights,
    process_count,
    rollout_mesh,
    share_of,
)
from tpu import memory
from tpu.bounds import bounds
from tpu.hlo import Collective, collectives
from tpu.reads import bytes_read
from tpu.shapes import STOP_IDS, TOKENIZER_IDS, model_shape
from tpu.slices import ONE_HOST, chip, slice_devices

PROGRAMS = ("train", "prefill", "generate")
GIB = 2**30


def gib(size: float) -> str:
    """Bytes as text; empty for none."""
    return f"{size / GIB:.2f} GiB" if size else ""


@dataclass(frozen=True)
class Job:
    """A recipe and the slice for which its programs are compiled."""

    config: Config
    model: QwenConfig
    slice: str
    mesh: Mesh

    @functools.cached_property
    def processes(self) -> Processes:
        """The first of the slice's processes."""
        return Processes(0, process_count(self.mesh))

    @functools.cached_property
    def engine(self) -> Engine:
        """The sampler of one process, with its share of the dialogues on its own devices."""
        rollout = share_of(self.config.rollout, self.processes.count)
        return make_engine(
            self.model,
            STOP_IDS,
            TOKENIZER_IDS,
            rollout,
            rollout.temperature,
            dtype=self.config.model.dtype,
            mesh=self.sampling_mesh,
        )

    @functools.cached_property
    def sampling_mesh(self) -> Mesh:
        """The mesh of one process's sampler: a one-host slice, as libtpu compiles only for whole slices."""
        mesh = rollout_mesh(self.mesh, self.processes)
        if self.processes.count == 1:
            return mesh
        host = host_order(slice_devices(ONE_HOST[self.slice.split("-")[0]]))
        return Mesh(np.asarray(host).reshape(mesh.devices.shape), MESH_AXES, axis_types=mesh.axis_types)


@dataclass(frozen=True)
class Result:
    """The result of compiling one program. Bytes are those of one device."""

    program: str
    compiled: bool
    seconds: float  # of compilation
    memory: int  # bytes of a chip that programs may use
    bounds: dict[str, float]  # lower bounds of the program's time, in seconds
    arguments: dict[str, int]  # bytes of the program's arguments, by kind
    beside: dict[str, int]  # bytes of other data in memory at the same time
    temporary: int = 0  # bytes that the program needs in addition, its code included
    read: int = 0  # bytes of the chip's memory that it reads, a loop's once; 0 if no code was generated
    # kind -> number of operations, bytes of the largest
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    gathered: list[str] = field(default_factory=list)  # all-gathers of whole activations or logits
    error: str = ""  # the compiler's message if compilation failed

    @property
    def bytes(self) -> int:
        """All memory that a device needs while the program runs."""
        return sum(self.arguments.values()) + sum(self.beside.values()) + self.temporary

    @property
    def fits(self) -> bool:
        return self.compiled and self.bytes <= self.memory

    @property
    def good(self) -> bool:
        """Whether it fits and puts no whole activations or logits on every device."""
        return self.fits and not self.gathered


def make_job(config: Config, slice_name: str, layers: int | None = None) -> Job:
    """The job of a recipe on a slice.

    Raises:
      UserError: an unknown model or slice, a mesh that does not fit them, or no libtpu.
    """
    model = model_shape(config, layers)
    mesh = make_mesh(config.mesh, slice_devices(slice_name))
    job = Job(config, model, slice_name, mesh)
    share_of(config.rollout, job.processes.count)  # like a run on the slice, these two raise UserError
    rollout_mesh(mesh, job.processes)
    return job


def compile_program(
    job: Job, program: str, folder: Path | None = None, arguments: Sequence[str] | None = None
) -> Result:
    """Compiles one of PROGRAMS. If it does not fit the slice, the result says so; that is not an error.

    Args:
      folder: where the compiler's reports and the program's text are kept.
      arguments: of `python -m tpu.compile` for this program: then it is compiled by that command, and only
        until its memory is assigned. The size of the code is unknown and counts as 0.
    """
    with tempfile.TemporaryDirectory() as temporary:
        return _compile(job, program, folder or Path(temporary), arguments)


def _compile(job: Job, program: str, folder: Path, command: Sequence[str] | None) -> Result:
    function, arguments, sizes, beside = _programs(job)[program]
    limit = int(chip(job.slice).memory)
    result = functools.partial(Result, program, memory=limit, bounds=bounds(job, program), beside=beside)
    needed = sum(sizes.values()) + sum(beside.values())
    if needed > limit:
        error = f"its arguments alone take {gib(needed)} of the {gib(limit)} that a chip has"
        return result(compiled=False, seconds=0.0, arguments=sizes, error=error)
    started, code, read, error = time.monotonic(), 0, 0, ""
    if command is not None:
        memory.assign(folder, command)
    else:
        lowered = function.trace(*arguments).lower(lowering_platforms=("tpu",))
        try:
            compiled = lowered.compile(compiler_options=memory.dump_options(folder))
            code = compiled.memory_analysis().generated_code_size_in_bytes
            read = bytes_read(compiled.as_text())
        except jax.errors.JaxRuntimeError as problem:
            if "RESOURCE_EXHAUSTED" not in str(problem):
                raise
            error = " ".join(str(problem).split())[:400]
    seconds, total = time.monotonic() - started, memory.assigned(folder)
    if total is None:
        return result(
            compiled=False, seconds=seconds, arguments=sizes, error=error or "no memory was assigned"
        )
    operations = collectives(memory.optimised(folder))
    by_kind: dict[str, dict[str, int]] = {}
    for operation in operations:
        entry = by_kind.setdefault(operation.kind, {"operations": 0, "largest": 0})
        entry["operations"] += 1
        entry["largest"] = max(entry["largest"], operation.bytes)
    return result(
        compiled=not error,
        seconds=seconds,
        arguments=sizes,
        temporary=total - sum(sizes.values()) + code,
        read=read,
        collectives=by_kind,
        gathered=unwanted_gathers(job, program, operations),
        error=error,
    )


def _programs(job: Job) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, int], dict[str, int]]]:
    """Program -> (jitted function, abstract arguments, their bytes by kind, bytes of other data)."""
    config, model, mesh = job.config, job.model, job.mesh
    programs = make_programs(config, model, TOKENIZER_IDS, mesh)
    state = abstract_state(
        parameter_shapes(model, config.model.dtype),
        programs.optimizer,
        shardings=param_shardings(parameter_shapes(model), mesh),
        reference=config.algorithm.kl_coefficient > 0,
    )
    batch = abstract_batch(config, mesh)
    training = {
        "weights": _bytes(state.weights),
        "moments": _bytes(state.opt_state),
        "reference": _bytes(state.reference),
    }
    table = {"train": (programs.update, (state, batch), training | {"batch": _bytes(batch)}, {})}
    weights = state.weights
    if job.processes.count > 1:
        weights = abstract_rollout_weights(weights, model, job.sampling_mesh, config.model.dtype)
    for name, (function, arguments) in job.engine.abstract_programs(weights).items():
        kinds = {"cache": _bytes(arguments[1])}
        beside = training
        if job.engine.copy_weights or job.processes.count > 1:
            kinds["copy of the weights"] = _bytes(arguments[0])
        else:
            kinds["weights"] = training["weights"]
            beside = {kind: size for kind, size in training.items() if kind != "weights"}
        table[name] = (function, arguments, kinds, beside)
    return table


def _bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def unwanted_gathers(job: Job, program: str, operations: Sequence[Collective]) -> list[str]:
    """All-gathers, except of weights, that give a device the hidden states of all rows or whole logits.

    Decoding sends the hidden states of its lanes, one token each, to all devices by design, so for
    `generate` only logits count.
    """
    model, config, length = job.model, job.config, row_lengths(job.config.rollout.max_tokens)[-1]
    if program == "train":
        shards, budget = row_shards(job.mesh), config.training.microbatch_tokens
        rows = microbatch_rows(minibatch_rows(config), length, budget, shards)
        scored = min(loss_tokens(config), length)
        local = max(1, rows // shards)
        limit = min(rows * length * model.hidden_size, local * scored * model.vocab_size)
    elif program == "prefill":
        limit = job.engine.prefill_rows * job.engine.chunk * model.hidden_size
    else:
        limit = job.engine.lanes * model.vocab_size
    weights = _weight_shapes(model, job.mesh if program == "train" else job.sampling_mesh)
    return [
        f"{gather.dtype}{list(gather.shape)}"
        for gather in operations
        if gather.kind == "all-gather" and gather.elements >= limit and _sorted(gather.shape) not in weights
    ]


def _weight_shapes(model: QwenConfig, mesh: Mesh) -> set[tuple[int, ...]]:
    """Shapes of a gathered parameter, of one layer or of all: whole, or cut along one axis of the mesh."""
    shapes = set()
    for leaf in jax.tree.leaves(parameter_shapes(model)):
        for shape in (leaf.shape, leaf.shape[1:]):
            shapes.add(_sorted(shape))
            for index, axis in itertools.product(range(len(shape)), mesh.axis_names):
                part = shape[index] // mesh.shape[axis]
                shapes.add(_sorted((*shape[:index], part, *shape[index + 1 :])))
    return shapes


def _sorted(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))
