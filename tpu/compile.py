"""Compiles a recipe's programs for a TPU slice on a machine without one: do they fit, what would they take?

    python -m tpu.compile --config configs/qwen3_32b_v5p.yaml --slice v5p-128 [key=value ...]
    python -m tpu.compile --config ... --slice ... --forecast     in seconds, from formulas
    python -m tpu.compile --all       compiles what tpu/compiled.json lacks of ENTRIES, and rewrites the table

Needs libtpu (requirements-tpu.txt), and minutes for each program. The programs are those of `mapo_jax.train`,
made by the same functions from shapes instead of arrays: the update, and the engine's prefill and generate,
each at its longest. The exit status is 0 only if everything asked for compiles and fits.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: nothing runs here

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from mapo_jax.commands import run_command
from mapo_jax.config import Config, load_config
from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.learning.batch import microbatch_rows, row_lengths
from mapo_jax.learning.programs import abstract_batch, loss_tokens, make_programs, minibatch_rows
from mapo_jax.learning.train_state import abstract_state
from mapo_jax.model.qwen import QwenConfig, parameter_count, parameter_shapes
from mapo_jax.model.sharding import (
    MESH_AXES,
    host_order,
    make_mesh,
    param_shardings,
    row_shards,
)
from mapo_jax.rollout.engine import Engine
from mapo_jax.running.forecast import memory_table
from mapo_jax.running.memory import forecast_memory
from mapo_jax.running.policy import make_engine
from mapo_jax.running.processes import (
    Processes,
    abstract_rollout_weights,
    process_count,
    rollout_mesh,
    share_of,
)
from tpu.hlo import KINDS, Collective, collectives
from tpu.shapes import STOP_IDS, TOKENIZER_IDS, model_shape
from tpu.slices import ONE_HOST, chip, slice_devices

PROGRAMS = ("train", "prefill", "generate")
FOLDER = Path(__file__).parent
RESULTS, TABLE = FOLDER / "compiled.json", FOLDER / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
GIB = 2**30


@dataclass(frozen=True)
class Job:
    """What is compiled: a recipe and its programs for one slice."""

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
        """What one process samples on: a slice of one host, since libtpu compiles for whole slices alone."""
        mesh = rollout_mesh(self.mesh, self.processes)
        if self.processes.count == 1:
            return mesh
        host = host_order(slice_devices(ONE_HOST[self.slice.split("-")[0]]))
        return Mesh(np.asarray(host).reshape(mesh.devices.shape), MESH_AXES, axis_types=mesh.axis_types)


@dataclass(frozen=True)
class Result:
    """What came of one program. Bytes are those of one device."""

    program: str
    compiled: bool
    seconds: float  # of compilation
    memory: int  # bytes that a chip's programs may use
    bounds: dict[str, float]  # seconds that the program takes at least
    arguments: dict[str, int]  # bytes of what the program is given, by kind
    beside: dict[str, int]  # bytes of what lies in memory meanwhile
    temporary: int = 0  # bytes that the program needs on top
    collectives: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # kind -> operations, bytes of the largest
    gathered: list[str] = field(default_factory=list)  # all-gathers of whole activations or logits
    error: str = ""  # the compiler's, if it gave up

    @property
    def bytes(self) -> int:
        """All that a device must hold while the program runs."""
        return sum(self.arguments.values()) + sum(self.beside.values()) + self.temporary

    @property
    def fits(self) -> bool:
        return self.compiled and self.bytes <= self.memory

    @property
    def good(self) -> bool:
        """It fits, and puts no whole activations or logits on every device."""
        return self.fits and not self.gathered


def make_job(config: Config, slice_name: str, layers: int | None = None) -> Job:
    """Checks that a recipe and a slice go together.

    Raises:
      UserError: an unknown model or slice, a mesh that does not fit them, or no libtpu.
    """
    model = model_shape(config, layers)
    mesh = make_mesh(config.mesh, slice_devices(slice_name))
    job = Job(config, model, slice_name, mesh)
    share_of(config.rollout, job.processes.count)  # these two refuse what a run on the slice would
    rollout_mesh(mesh, job.processes)
    return job


def compile_program(job: Job, program: str) -> Result:
    """Compiles one of PROGRAMS. That it does not fit the slice is a result, not an error."""
    function, arguments, kinds, beside = _programs(job)[program]
    given = dict(memory=int(chip(job.slice).memory), bounds=bounds(job, program), beside=beside)
    held = sum(kinds.values()) + sum(beside.values())
    if held > given["memory"]:
        error = f"what it is given alone takes {_gib(held)} of the {_gib(given['memory'])} that a chip has"
        return Result(program, False, 0.0, arguments=kinds, error=error, **given)
    began = time.monotonic()
    try:
        compiled = function.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = " ".join(str(error).split())[:400]
        seconds = time.monotonic() - began
        return Result(program, False, seconds, arguments=kinds, error=message, **given)
    seconds, memory = time.monotonic() - began, compiled.memory_analysis()
    found = collectives(compiled.as_text())
    summed: dict[str, dict[str, int]] = {}
    for one in found:
        entry = summed.setdefault(one.kind, {"operations": 0, "largest": 0})
        entry["operations"] += 1
        entry["largest"] = max(entry["largest"], one.bytes)
    rest = memory.argument_size_in_bytes - sum(kinds.values())
    # What is given back takes the place of what was given (donated), or is counted as temporary.
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Result(
        program,
        True,
        seconds,
        arguments=kinds | {"other": max(0, rest)},
        temporary=memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + returned,
        collectives=summed,
        gathered=unwanted_gathers(job, program, found),
        **given,
    )


def _programs(job: Job) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, int], dict[str, int]]]:
    """Program -> (jitted function, abstract arguments, their bytes by kind, bytes of what lies beside)."""
    config, model, mesh = job.config, job.model, job.mesh
    programs = make_programs(config, model, TOKENIZER_IDS, mesh)
    state = abstract_state(
        parameter_shapes(model, config.model.dtype),
        programs.optimizer,
        shardings=param_shardings(parameter_shapes(model), mesh),
        reference=config.algorithm.kl_coefficient > 0,
    )
    batch = abstract_batch(config, mesh)
    held = {
        "weights": _bytes(state.weights),
        "moments": _bytes(state.opt_state),
        "reference": _bytes(state.reference),
    }
    found = {"train": (programs.update, (state, batch), held | {"batch": _bytes(batch)}, {})}
    weights = state.weights
    if job.processes.count > 1:
        weights = abstract_rollout_weights(weights, model, job.sampling_mesh, config.model.dtype)
    for name, (function, arguments) in job.engine.abstract_programs(weights).items():
        kinds = {"cache": _bytes(arguments[1])}
        beside = held
        if job.engine.copy_weights or job.processes.count > 1:
            kinds["copy of the weights"] = _bytes(arguments[0])
        else:
            kinds["weights"] = held["weights"]
            beside = {kind: size for kind, size in held.items() if kind != "weights"}
        found[name] = (function, arguments, kinds, beside)
    return found


def _bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def unwanted_gathers(job: Job, program: str, found: Sequence[Collective]) -> list[str]:
    """All-gathers, but of weights, that give a device the hidden states of all rows or whole logits.

    Decoding moves the hidden states of its lanes, a token each, on purpose: there only logits count.
    """
    model, config, length = job.model, job.config, row_lengths(job.config.rollout.max_tokens)[-1]
    if program == "train":
        shards, budget = row_shards(job.mesh), config.training.microbatch_tokens
        rows = microbatch_rows(minibatch_rows(config), length, budget, shards)
        scored = min(loss_tokens(config), length)
        own = max(1, rows // shards)
        limit = min(rows * length * model.hidden_size, own * scored * model.vocab_size)
    elif program == "prefill":
        limit = job.engine.prefill_rows * job.engine.chunk * model.hidden_size
    else:
        limit = job.engine.lanes * model.vocab_size
    weights = _weight_shapes(model, job.mesh if program == "train" else job.sampling_mesh)
    return [
        f"{one.dtype}{list(one.shape)}"
        for one in found
        if one.kind == "all-gather" and one.elements >= limit and _sorted(one.shape) not in weights
    ]


def _weight_shapes(model: QwenConfig, mesh: Mesh) -> set[tuple[int, ...]]:
    """Shapes that a gathered parameter has, of one layer or all: whole, or cut along one axis of the mesh."""
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


# --- What a program takes at least. ---


def bounds(job: Job, program: str) -> dict[str, float]:
    """Seconds that a program takes at least: by its operations, and by the bytes that memory must deliver.

    A weight costs 2 operations a token forward and 4 backward, a frozen one 2 backward; `model.remat: block`
    computes the forward pass twice. Causal attention over a row of L tokens costs 2 L H E operations a token
    and layer forward, twice that backward, and is computed again unless everything is kept; over a cache of C
    tokens it costs 4 C H E. Of the head only loss tokens count, and it is always computed twice.

    The bytes of an update are those of the weights, forward and backward for each micro-batch, in the compute
    dtype, and of the trained ones with their moments, read and written once. Those of a decode step, or of a
    chunk of prompts, are those of the weights and of the caches in use, once. Exchange between chips is in
    neither bound.
    """
    config, model, hardware = job.config, job.model, chip(job.slice)
    heads, head = model.num_heads * model.head_dim, model.vocab_size * model.hidden_size
    body = parameter_count(model) - (head if model.tie_word_embeddings else 2 * head)
    item = jnp.dtype(config.model.dtype).itemsize
    if program == "train":
        rows, length = minibatch_rows(config), row_lengths(config.rollout.max_tokens)[-1]
        scored = min(loss_tokens(config), length)
        backward = 1 if model.lora else 2
        remat = config.model.remat
        operations = rows * (
            (1 + backward + (remat == "block")) * 2 * body * length
            + (3 + (remat != "none")) * model.num_layers * 2 * length * length * heads
            + (2 + backward) * 2 * head * scored
        )
        budget, shards = config.training.microbatch_tokens, row_shards(job.mesh)
        microbatches = rows // microbatch_rows(rows, length, budget, shards)
        trained = parameter_count(model) - (parameter_count(replace(model, lora=None)) if model.lora else 0)
        moved = microbatches * 2 * item * (body + head) / job.mesh.shape["tensor"]
        moved += 2 * 3 * 4 * trained / (job.mesh.size / job.mesh.shape["data"])
        return {
            "operations": operations / job.mesh.size / hardware.operations,
            "bytes": moved / hardware.bandwidth,
        }
    engine = job.engine
    rows, width, steps, logits = {
        "prefill": (engine.prefill_rows, engine.chunk, 1, 0),
        "generate": (engine.lanes, 1, engine.block, head),
    }[program]
    operations = rows * width * (2 * (body + logits) + model.num_layers * 4 * engine.length * heads)
    mesh = job.sampling_mesh
    cache = model.num_layers * 2 * model.num_kv_heads * model.head_dim * item * engine.length
    moved = item * (body + logits) * mesh.shape["data"] + cache * rows
    return {
        "operations": steps * operations / mesh.size / hardware.operations,
        "bytes": steps * moved / mesh.size / hardware.bandwidth,
    }


# --- What is asked, and what is shown. ---


def compile_all(job: Job, programs: Sequence[str], say: Callable[[Result], None]) -> list[Result]:
    """Compiles programs one after another; `say` hears of each as it is there."""
    results = []
    for program in programs:
        results.append(compile_program(job, program))
        say(results[-1])
    return results


def summary(job: Job, results: Sequence[Result]) -> Table:
    """A column for each program: bytes per device by kind, collectives, compile time, bounds."""
    table = Table(title=f"{Path(job.config.model.path).name}, {job.model.num_layers} layers, on {job.slice}")
    table.add_column("per device")
    for result in results:
        table.add_column(result.program, justify="right")

    def row(name: str, cells: Iterable[str]) -> None:
        cells = list(cells)
        if any(cells):
            table.add_row(name, *cells)

    kinds = dict.fromkeys(kind for result in results for kind in (*result.arguments, *result.beside))
    for kind in kinds:
        row(kind, (_gib(r.arguments.get(kind, 0) + r.beside.get(kind, 0)) for r in results))
    row("temporary", (_gib(r.temporary) if r.compiled else "" for r in results))
    row("together", (_gib(r.bytes) if r.compiled else "" for r in results))
    row("memory of a chip", (_gib(r.memory) for r in results))
    row("fits", ("yes" if r.fits else "NO" for r in results))
    for kind in KINDS:
        row(f"{kind}: in the text, largest", (_collective(r, kind) for r in results))
    row("gathered whole", (", ".join(r.gathered) for r in results))
    row("seconds to compile", (f"{r.seconds:.0f}" for r in results))
    row("at least, by operations", (f"{r.bounds['operations']:.3f} s" for r in results))
    row("at least, by bytes", (f"{r.bounds['bytes']:.3f} s" if "bytes" in r.bounds else "" for r in results))
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size else ""


def _collective(result: Result, kind: str) -> str:
    found = result.collectives.get(kind)
    return f"{found['operations']}, {found['largest'] / 2**20:.1f} MiB" if found else ""


# --- The table of everything. ---


@dataclass(frozen=True)
class Entry:
    """A line of the table: a recipe on a slice."""

    recipe: str
    slice: str
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return " ".join(
            [
                "python -m tpu.compile --config",
                f"configs/{self.recipe}.yaml --slice {self.slice}",
                *self.overrides,
            ]
        )


_LORA = ("lora.rank=32",)

# In order of importance: the table is filled from the top. First each recipe on its slice, then smaller ones,
# other chips, and adapters alone.
ENTRIES = (
    Entry("qwen3_32b_v5p", "v5p-128"),
    Entry("qwen3_8b_v5p", "v5p-64"),
    Entry("qwen3_32b_v6e", "v6e-256"),
    Entry("qwen3_8b_v6e", "v6e-64"),
    Entry("qwen3_14b_v5p", "v5p-64"),
    Entry("qwen2.5_7b_v5p", "v5p-32"),
    Entry("qwen3_32b_v5p", "v5p-32", _LORA),
    Entry("qwen3_8b_v5p", "v5p-16"),
    Entry("qwen3_32b_v5p", "v5p-64"),
    Entry("qwen3_8b_v6e", "v6e-16", _LORA),
    Entry("qwen3_14b_v5p", "v5p-16", _LORA),
    Entry("qwen2.5_7b_v5p", "v5p-8", _LORA),
    Entry("qwen3_8b_v6e", "v5e-128", ("rollout.scenarios=32", "training.minibatch_scenarios=16")),
    Entry("qwen3_8b_v6e", "v6e-16"),
    Entry("qwen3_14b_v5p", "v5p-16"),
    Entry("qwen2.5_7b_v5p", "v5p-8"),
    Entry("qwen3_14b_v5p", "v6e-64", ("mesh.tensor=4",)),
    Entry("qwen2.5_7b_v5p", "v6e-16", ("mesh.tensor=4",)),
    Entry("qwen3_8b_v6e", "v5e-64", _LORA),
    Entry("qwen3_14b_v5p", "v6e-16", ("mesh.tensor=4", *_LORA)),
    Entry("qwen2.5_7b_v5p", "v6e-8", ("mesh.tensor=4", *_LORA)),
    Entry("qwen2.5_7b_v5p", "v5e-64", ("mesh.tensor=4",)),
    Entry("qwen3_8b_v5p", "v5p-8"),
    Entry("qwen3_14b_v5p", "v5p-8", _LORA),
    Entry("qwen2.5_7b_v5p", "v5e-32", ("mesh.tensor=4", *_LORA)),
    Entry("qwen3_8b_v6e", "v5e-32", _LORA),
)


def fill_table(file: Path, table: Path, console: Console) -> bool:
    """Compiles what `file` lacks of ENTRIES, saving each program's result; then rewrites the table.

    A result belongs to the recipe as it was: one whose configuration has changed is compiled again.

    Returns:
      Whether everything compiles and fits.
    """
    known = json.loads(file.read_text()) if file.exists() else {}
    wanted = {f"{entry.command} {program}" for entry in ENTRIES for program in PROGRAMS}
    known = {key: result for key, result in known.items() if key in wanted}
    made_by = _made_by()  # before `file` changes
    for entry in ENTRIES:
        config = load_config(FOLDER.parent / "configs" / f"{entry.recipe}.yaml", entry.overrides)
        digest, job = _digest(config), make_job(config, entry.slice)
        for program in PROGRAMS:
            key = f"{entry.command} {program}"
            if known.get(key, {}).get("configuration") == digest:
                known[key]["bounds"] = bounds(job, program)  # today's formulas; no compiler's business
                continue
            result = compile_program(job, program)
            console.print(summary(job, [result]))
            known[key] = {"configuration": digest, "made_by": made_by, **asdict(result)}
            write_whole(file, json.dumps(known, indent=1) + "\n")
            write_table(table, known)
    write_whole(file, json.dumps(known, indent=1) + "\n")
    write_table(table, known)
    return all(
        f"{entry.command} {program}" in known and _result(known, entry, program).good
        for entry in ENTRIES
        for program in PROGRAMS
    )


def _digest(config: Config) -> str:
    """Names what the programs follow from."""
    sections = ("model", "lora", "mesh", "rollout", "algorithm", "optimizer", "training")
    text = json.dumps({name: getattr(config, name).model_dump() for name in sections})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _result(known: dict[str, Any], entry: Entry, program: str) -> Result | None:
    found = known.get(f"{entry.command} {program}")
    return found and Result(**{field.name: found[field.name] for field in fields(Result)})


def _made_by() -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True
    ).stdout.strip()
    versions = (f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    return ", ".join([f"commit {commit or 'unknown'}", *versions])


def write_table(file: Path, known: dict[str, Any]) -> None:
    """Puts the results between the markers in a Markdown file.

    Raises:
      UserError: the file lacks the markers.
    """
    text = file.read_text() if file.exists() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{file} has no lines {BEGIN} and {END} to put the table between")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_whole(file, before + BEGIN + "\n" + table_text(known) + END + after)


def table_text(known: dict[str, Any]) -> str:
    """The Markdown table of the results: a line for each program."""
    lines = [
        "| recipe | slice | program | weights, moments | cache | temporary | together, of a chip's | fits "
        "| compiled in | at least |",
        "|---|---|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for entry, program in itertools.product(ENTRIES, PROGRAMS):
        name = f"| {', '.join([entry.recipe, *entry.overrides])} | {entry.slice} | {program} "
        result = _result(known, entry, program)
        if result is None:
            lines.append(f"{name}| | | | | not compiled yet | | |")
            continue
        held = result.arguments | result.beside
        state = ("weights", "moments", "reference", "copy of the weights")
        lines.append(
            f"{name}| {_gib(sum(held.get(kind, 0) for kind in state))} "
            f"| {_gib(held.get('cache', 0))} | {_gib(result.temporary)} "
            f"| {_gib(result.bytes) if result.compiled else ''}, {_gib(result.memory)} "
            f"| {'yes' if result.fits else 'no'} | {result.seconds:.0f} s "
            f"| {max(result.bounds.values()):.3f} s |"
        )
    made = sorted({entry["made_by"] for entry in known.values()})
    lines += ["", f"Compiled by {'; '.join(made)}. The command of each line:", ""]
    lines += [f"- `{entry.command}`" for entry in ENTRIES]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tpu.compile",
        description="Compiles the programs of a training run for a TPU slice, without a TPU: do they fit, "
        "and what do they take? Minutes for each program.",
    )
    parser.add_argument("--config", metavar="FILE", help="the recipe")
    parser.add_argument(
        "--slice", metavar="NAME", help="such as v5p-64 (a v5p is named by its cores, 2 a chip)"
    )
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="which of %(default)s")
    parser.add_argument("--layers", type=int, help="of the model: so many layers, for a quick look")
    parser.add_argument(
        "--forecast", action="store_true", help="compile nothing: what --dry-run would forecast on the slice"
    )
    parser.add_argument(
        "--all", action="store_true", help=f"what {RESULTS.name} lacks of the table; rewrites it"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    console, good = Console(highlight=False, width=None if sys.stdout.isatty() else 110), False

    def command() -> None:
        nonlocal good
        if options.all:
            good = fill_table(RESULTS, TABLE, console)
            return
        if not options.config or not options.slice:
            raise UserError("say which recipe and which slice: --config configs/NAME.yaml --slice v5p-64")
        programs = options.programs.split(",")
        if not set(programs) <= set(PROGRAMS):
            raise UserError(f"`--programs` is {options.programs!r}; choose of {','.join(PROGRAMS)}")
        name = options.slice.replace("v5litepod-", "v5e-")  # Google's own name for it
        job = make_job(load_config(options.config, options.overrides), name, options.layers)
        if options.forecast:
            memory, limit = forecast_memory(job.config, job.model, job.mesh), chip(name).memory
            console.print("GiB of each chip; the second column while dialogues are held")
            console.print("\n".join(memory_table(memory)), markup=False)
            good = memory.most <= limit
            console.print(f"a chip has {_gib(limit)}: {'it fits' if good else 'it does NOT fit'}")
            return
        results = compile_all(
            job, programs, lambda r: console.print(f"{r.program}: {r.seconds:.0f} s to compile", markup=False)
        )
        console.print(summary(job, results))
        for result in results:
            if result.error:
                console.print(f"{result.program}: {result.error}", markup=False)
        good = all(result.good for result in results)

    return run_command(command) or (0 if good else 1)


if __name__ == "__main__":
    sys.exit(main())
