"""The table of all recipes on all slices: the list of its lines, saved results, and its text in README.md."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mapo_jax.config import Config, load_config
from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from tpu.bounds import bounds
from tpu.costs import PARTS, dollars, step_seconds
from tpu.hlo import KINDS
from tpu.programs import PROGRAMS, Job, Result, compile_program, gib, make_job

FOLDER = Path(__file__).parent
RESULTS, README = FOLDER / "compiled.json", FOLDER / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def summary(job: Job, results: Sequence[Result]) -> Table:
    """A column per program: bytes per device by kind, collectives, compile time, lower bounds of its time."""
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
        row(kind, (gib(r.arguments.get(kind, 0) + r.beside.get(kind, 0)) for r in results))
    row("temporary", (gib(r.temporary) if r.compiled else "" for r in results))
    row("together", (gib(r.bytes) if r.compiled else "" for r in results))
    row("memory of a chip", (gib(r.memory) for r in results))
    row("fits", ("yes" if r.fits else "NO" for r in results))
    for kind in KINDS:
        row(f"{kind}: in the text, largest", (_collective(r, kind) for r in results))
    row("gathered whole", (", ".join(r.gathered) for r in results))
    row("reads of the chip's memory", (gib(r.read) for r in results))
    row("seconds to compile", (f"{r.seconds:.0f}" for r in results))
    row("at least, by operations", (f"{r.bounds['operations']:.3f} s" for r in results))
    row("at least, by bytes", (f"{r.bounds['bytes']:.3f} s" if "bytes" in r.bounds else "" for r in results))
    return table


def _collective(result: Result, kind: str) -> str:
    entry = result.collectives.get(kind)
    return f"{entry['operations']}, {entry['largest'] / 2**20:.1f} MiB" if entry else ""


@dataclass(frozen=True)
class Entry:
    """A recipe on a slice, with a line of the table for each program."""

    recipe: str
    slice: str
    overrides: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        return ["--config", f"configs/{self.recipe}.yaml", "--slice", self.slice, *self.overrides]

    @property
    def command(self) -> str:
        return " ".join(["python -m tpu.compile", *self.arguments])


_LORA, _INT8 = ("lora.rank=32",), ("rollout.cache=int8",)
_HALF = ("rollout.scenarios=32", "training.minibatch_scenarios=16")
_FOUR = ("mesh.tensor=4",)

# In order of importance, since the table is filled from the top: each recipe on its slice, then smaller
# slices and other chips for all weights, then for adapters.
ENTRIES = (
    Entry("qwen3_32b_v5p", "v5p-128"),
    Entry("qwen3_32b_v6e", "v6e-256"),
    Entry("qwen3_14b_v5p", "v5p-64"),
    Entry("qwen3_8b_v5p", "v5p-64"),
    Entry("qwen3_8b_v6e", "v6e-64"),
    Entry("qwen2.5_7b_v5p", "v5p-32"),
    Entry("qwen3_32b_v5p", "v5p-64"),
    Entry("qwen3_32b_v5p", "v5p-32"),
    Entry("qwen3_32b_v5p", "v5p-32", _INT8),
    Entry("qwen3_14b_v5p", "v5p-16"),
    Entry("qwen3_14b_v5p", "v6e-16", (*_FOUR, *_INT8)),
    Entry("qwen3_14b_v5p", "v5e-128", (*_FOUR, *_HALF)),
    Entry("qwen3_8b_v5p", "v5p-16"),
    Entry("qwen3_8b_v5p", "v5p-8"),
    Entry("qwen3_8b_v6e", "v6e-16"),
    Entry("qwen3_8b_v6e", "v5e-64"),
    Entry("qwen2.5_7b_v5p", "v5p-8"),
    Entry("qwen2.5_7b_v5p", "v6e-8", _FOUR),
    Entry("qwen2.5_7b_v5p", "v5e-64", _FOUR),
    Entry("qwen3_32b_v5p", "v5p-32", _LORA),
    Entry("qwen3_14b_v5p", "v5p-8", _LORA),
    Entry("qwen3_14b_v5p", "v6e-16", (*_FOUR, *_LORA)),
    Entry("qwen3_8b_v6e", "v6e-16", _LORA),
    Entry("qwen3_8b_v6e", "v5e-32", _LORA),
    Entry("qwen2.5_7b_v5p", "v5p-8", _LORA),
    Entry("qwen2.5_7b_v5p", "v6e-8", (*_FOUR, *_LORA)),
    Entry("qwen2.5_7b_v5p", "v5e-32", (*_FOUR, *_LORA)),
)


def fill_table(file: Path, table: Path, console: Console) -> bool:
    """Compiles the programs of ENTRIES that `file` lacks, saves each result, and rewrites the table.

    A result belongs to one configuration of its recipe: if the configuration has changed, it is compiled
    again.

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
                known[key]["bounds"] = bounds(job, program)  # by the current formulas, which need no compiler
                continue
            result = compile_program(job, program, arguments=[*entry.arguments, "--programs", program])
            console.print(summary(job, [result]))
            known[key] = {"configuration": digest, "made_by": made_by, **asdict(result)}
            write_whole(file, json.dumps(known, indent=1) + "\n")
            write_table(table, known)
        train, _, generate = (known[f"{entry.command} {program}"] for program in PROGRAMS)
        copy = generate["arguments"].get("copy of the weights", 0)
        train["step"] = step_seconds(
            job, {p: known[f"{entry.command} {p}"]["bounds"] for p in PROGRAMS}, copy
        )
        train["chips"] = job.mesh.size
    write_whole(file, json.dumps(known, indent=1) + "\n")
    write_table(table, known)
    return all(
        f"{entry.command} {program}" in known and _result(known, entry, program).good
        for entry in ENTRIES
        for program in PROGRAMS
    )


def _digest(config: Config) -> str:
    """A hash of the sections on which the programs depend."""
    sections = ("model", "lora", "mesh", "rollout", "algorithm", "optimizer", "training")
    text = json.dumps({name: getattr(config, name).model_dump() for name in sections})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _result(known: dict[str, Any], entry: Entry, program: str) -> Result | None:
    saved = known.get(f"{entry.command} {program}")
    return saved and Result(**{field.name: saved[field.name] for field in fields(Result)})


def _made_by() -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True
    ).stdout.strip()
    versions = (f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    return ", ".join([f"commit {commit or 'unknown'}", *versions])


def write_table(file: Path, known: dict[str, Any]) -> None:
    """Writes the results between the markers in a Markdown file.

    Raises:
      UserError: the file lacks the markers.
    """
    text = file.read_text() if file.exists() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{file} has no lines {BEGIN} and {END} for the table")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_whole(file, before + BEGIN + "\n" + table_text(known) + END + after)


def table_text(known: dict[str, Any]) -> str:
    """The Markdown table of the results, a line for each program."""
    lines = [
        "| recipe | slice | program | weights, moments | cache | temporary | together, of a chip's | fits "
        "| known after | at least |",
        "|---|---|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for entry, program in itertools.product(ENTRIES, PROGRAMS):
        name = f"| {', '.join([entry.recipe, *entry.overrides])} | {entry.slice} | {program} "
        result = _result(known, entry, program)
        if result is None:
            lines.append(f"{name}| | | | | not compiled yet | | |")
            continue
        sizes = result.arguments | result.beside
        state = ("weights", "moments", "reference", "copy of the weights")
        lines.append(
            f"{name}| {gib(sum(sizes.get(kind, 0) for kind in state))} "
            f"| {gib(sizes.get('cache', 0))} | {gib(result.temporary)} "
            f"| {gib(result.bytes) if result.compiled else ''}, {gib(result.memory)} "
            f"| {'yes' if result.fits else 'no'} | {result.seconds:.0f} s "
            f"| {max(result.bounds.values()):.3f} s |"
        )
    lines += ["", *_step_lines(known)]
    made = sorted({entry["made_by"] for entry in known.values()})
    lines += ["", f"Compiled by {'; '.join(made)}. The command of each line:", ""]
    lines += [f"- `{entry.command}`" for entry in ENTRIES]
    return "\n".join(lines) + "\n"


def _step_lines(known: dict[str, Any]) -> list[str]:
    """The Markdown table of what a step takes and costs (`costs.py`)."""
    lines = [
        f"| recipe | slice | chips | seconds of a step | {' | '.join(PARTS)} | chip hours | dollars |",
        f"|---|---|---:|---:|{'---:|' * len(PARTS)}---:|---:|",
    ]
    for entry in ENTRIES:
        if not (step := known.get(f"{entry.command} train", {}).get("step")):
            continue
        chips, seconds = known[f"{entry.command} train"]["chips"], sum(step.values())
        shares = " | ".join(f"{step[part] / seconds:.0%}" for part in PARTS)
        hours = chips * seconds / 3600
        lines.append(
            f"| {', '.join([entry.recipe, *entry.overrides])} | {entry.slice} | {chips} | {seconds:,.0f} "
            f"| {shares} | {hours:.1f} | {dollars(entry.slice, hours):.0f} |"
        )
    return lines
