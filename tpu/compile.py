"""Compiles a recipe's programs for a TPU slice without a TPU: whether they fit, and what they need.

    python -m tpu.compile --config configs/qwen3_32b_v5p.yaml --slice v5p-128 [key=value ...]
    python -m tpu.compile --config ... --slice ... --memory       until memory is assigned, in half a minute
    python -m tpu.compile --config ... --slice ... --forecast     by formulas, in seconds
    python -m tpu.compile --all       compiles the lines of the table that tpu/compiled.json lacks

Needs libtpu (requirements-tpu.txt), and minutes for each program. The exit status is 0 only if all requested
programs compile and fit. What is compiled: `programs.py`; lower bounds of time: `bounds.py`; the table:
`table.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: no program runs here

from rich.console import Console

from mapo_jax.commands import run_command
from mapo_jax.config import load_config
from mapo_jax.errors import UserError
from mapo_jax.running.forecast import memory_table
from mapo_jax.running.memory import forecast_memory
from tpu.memory import assigned
from tpu.programs import PROGRAMS, compile_program, gib, make_job
from tpu.slices import chip
from tpu.table import README, RESULTS, fill_table, summary


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tpu.compile",
        description="Compiles the programs of a training run for a TPU slice, without a TPU: whether they "
        "fit, how much memory they need, and a lower bound of their time. Takes minutes per program.",
    )
    parser.add_argument("--config", metavar="FILE", help="the recipe")
    parser.add_argument(
        "--slice", metavar="NAME", help="such as v5p-64 (for v5p the number counts cores, 2 per chip)"
    )
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="which of %(default)s")
    parser.add_argument("--layers", type=int, help="use a model of so many layers, for a quick check")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--memory", action="store_true", help="stop when memory is assigned: no code is generated"
    )
    parser.add_argument("--dump", metavar="FOLDER", help="keep the compiler's reports of one program there")
    what.add_argument(
        "--forecast", action="store_true", help="compile nothing: print what --dry-run would on the slice"
    )
    what.add_argument(
        "--all", action="store_true", help=f"compile the lines of the table that {RESULTS.name} lacks"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    console, good = Console(highlight=False, width=None if sys.stdout.isatty() else 110), False

    def command() -> None:
        nonlocal good
        if options.dump and (options.all or options.forecast):
            raise UserError("`--dump` keeps reports of one program; leave it out with --all and --forecast")
        if options.all:
            good = fill_table(RESULTS, README, console)
            return
        if not options.config or not options.slice:
            raise UserError("no recipe or no slice; give --config configs/NAME.yaml --slice v5p-64")
        programs = options.programs.split(",")
        if not set(programs) <= set(PROGRAMS):
            raise UserError(f"`--programs` is {options.programs!r}; choose from {','.join(PROGRAMS)}")
        if options.dump and len(programs) > 1:
            raise UserError("`--dump` keeps the reports of one program; add --programs train, or another")
        folder = Path(options.dump) if options.dump else None
        if folder and assigned(folder) is not None:
            raise UserError(f"{folder} has the reports of a program already; give another folder to --dump")
        name = options.slice.replace("v5litepod-", "v5e-")  # Google's name for v5e
        job = make_job(load_config(options.config, options.overrides), name, options.layers)
        if options.forecast:
            memory, limit = forecast_memory(job.config, job.model, job.mesh), chip(name).memory
            console.print("GiB of each chip; the second column is while dialogues are collected")
            console.print("\n".join(memory_table(memory)), markup=False)
            good = memory.most <= limit
            console.print(f"a chip has {gib(limit)}: {'it fits' if good else 'it does NOT fit'}")
            return
        results = []
        for program in programs:
            command = None
            if options.memory:
                file = str(Path(options.config).absolute())
                command = ["--config", file, "--slice", name, "--programs", program, *options.overrides]
                command += ["--layers", str(options.layers)] if options.layers else []
            results.append(compile_program(job, program, folder, command))
            console.print(f"{program}: {results[-1].seconds:.0f} s to compile", markup=False)
        console.print(summary(job, results))
        for result in results:
            if result.error:
                console.print(f"{result.program}: {result.error}", markup=False)
        good = all(result.good for result in results)

    return run_command(command) or (0 if good else 1)


if __name__ == "__main__":
    sys.exit(main())
