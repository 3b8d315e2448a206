"""Speed of the warm start on a CPU, with and without keeping the working memory of programs.

    python benchmarks/memory.py [--rounds 2] [--updates 150]

Each round runs two processes in turn, the second with `commands.prepare_jax`; both compile everything. Prints
tokens per second and the ratio of each round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WORKER = """
import json, sys
from rich.console import Console
from mapo_jax.commands import prepare_jax
from mapo_jax.config import load_config
from mapo_jax.warmstart import RECORD, run_warmstart

kept, updates, folder = sys.argv[1:]
if kept == "kept":
    prepare_jax(folder + "/programs")
overrides = [f"warmstart.steps={updates}", "warmstart.dialogues=300", "warmstart.min_naming_ratio=0"]
config = load_config(None, [*overrides, "logging.progress=false", f"warmstart.cache={folder}"])
result = run_warmstart(config, console=Console(quiet=True))
print(json.loads((result / RECORD).read_text())["tokens_per_second"])
"""


def speed(memory: str, updates: int) -> float:
    """Tokens per second of the updates after the first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", WORKER, memory, str(updates), folder]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        return float(subprocess.check_output(command, env=environment, text=True, timeout=900).split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds")
    parser.add_argument("--updates", type=int, default=150, help="updates of each warm start")
    options = parser.parse_args()
    for number in range(1, options.rounds + 1):
        freed, kept = (speed(memory, options.updates) for memory in ("freed", "kept"))
        print(f"round {number}: {freed:,.0f} freed, {kept:,.0f} kept, ratio {kept / freed:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
