"""What a policy is worth: EMPA, EmoBench, EQ-Bench, and real conversations judged turn by turn.

    python -m mapo_jax.evaluate empa                         --model FOLDER|RUN | --trajectories FILE.jsonl
    python -m mapo_jax.evaluate emobench  --items FILE.jsonl   --model FOLDER|RUN | --answers FILE.jsonl
    python -m mapo_jax.evaluate eqbench   --questions FILE.json --model FOLDER|RUN | --answers FILE.json
    python -m mapo_jax.evaluate dialogues --transcripts FILE.jsonl

`--endpoint URL` instead of `--model` asks an OpenAI-compatible server.

Whatever a model says is saved before it is scored, so that an evaluation which was stopped goes on with the
same command, and what was saved can be scored again without any model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from mapo_jax.commands import run_command
from mapo_jax.evaluating import tables
from mapo_jax.evaluation import empa
from mapo_jax.files import write_whole


def run_empa(options: argparse.Namespace, console: Console) -> None:
    """EMPA's indices and EPM-Q."""
    cases = empa.read_cases(options.trajectories)
    models = empa.summarize_models(cases, seed=options.seed)
    _show(console, tables.empa_tables(models))
    if left_out := sum(case is None for case in cases):
        console.print(f"{left_out} dialogues left out: they ended in an error or have no scored turn")
    _write_json(options.json, models, console)


def _show(console: Console, shown: Sequence[Any]) -> None:
    for table in shown:
        console.print(table)


def _write_json(file: str | None, scores: Any, console: Console) -> None:
    if file is not None:
        write_whole(file, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
        console.print(f"written to {file}", soft_wrap=True, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mapo_jax.evaluate",
        description=__doc__.split("\n\n")[0],
    )
    commands = parser.add_subparsers(required=True, metavar="{empa,emobench,eqbench,dialogues}")

    command = commands.add_parser("empa", help="EMPA: long dialogues with users on scenario cards")
    command.set_defaults(command=run_empa)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--trajectories", metavar="FILE", help="score saved levels again: JSONL of model, start, levels"
    )
    _common(command)
    return parser


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", metavar="FILE", help="write the scores there too")
    command.add_argument("--seed", type=int, default=0, help="of sampling and intervals (default: 0)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input, 128 + n stopped by signal n."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    return run_command(lambda: options.command(options, console))


if __name__ == "__main__":
    raise SystemExit(main())
