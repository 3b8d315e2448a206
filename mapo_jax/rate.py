"""Estimates the start state of cards that have none, with the configured judge's model.

    python -m mapo_jax.rate CARDS --output FILE.jsonl --config configs/live.yaml [key=value ...]

Writes every card with its start, and the evidence for each level to FILE.evidence.jsonl. Estimates are cached
beside the output, so that the same command continues after a stop.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import track

from mapo_jax.commands import command_parser, run_command
from mapo_jax.config import Config, load_config
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.calls import Complete
from mapo_jax.environment.live.start import StartState, estimate_start
from mapo_jax.environment.scenario import Scenario, read_cards, to_mapping
from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.idle import refuse_unread
from mapo_jax.model.sharding import make_mesh
from mapo_jax.role_models import keep_calls, open_models
from mapo_jax.settings import parse_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_parser("rate", "Estimates missing start states with the judge's model.")
    parser.add_argument("cards", type=Path, help="a file or a folder of cards")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--config", metavar="FILE|NAME", help="YAML file with environment.judge")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parse_settings(Config, parser, arguments)

    def command() -> None:
        refuse_unread("rate", options.overrides)
        config = load_config(options.config, options.overrides)
        scenarios, problems = read_cards(options.cards)
        if problems:
            raise UserError(problems[0])
        if options.output.suffix != ".jsonl":
            raise UserError(f"--output is {options.output}; its name must end with .jsonl")
        folder = options.output.parent / f"{options.output.stem}.calls"
        missing = [card for card in scenarios if not card.start]
        with (
            asyncio.Runner() as runner,
            open_models(config, folder, make_mesh(config.mesh), runner, ("judge",)) as (callers, _),
            keep_calls(callers, folder),
        ):
            if callers["judge"] is None:
                raise UserError("`environment.judge.model` is empty; name the model that is to estimate")
            starts = runner.run(_estimate(missing, callers["judge"], config.environment.concurrency))
        failed = [f"{name}: {start}" for name, start in starts.items() if isinstance(start, RoleFailure)]
        if failed:
            raise UserError(
                f"{len(failed)} of {len(scenarios)} cards could not be estimated ({failed[0]}); the others "
                f"are cached in {folder}, and the same command asks for the missing ones again"
            )
        cards = [card if card.start else replace(card, start=starts[card.id].levels) for card in scenarios]
        _write_rows(options.output, map(to_mapping, cards))
        evidence = ({"id": card.id, **asdict(starts[card.id])} for card in missing)
        _write_rows(options.output.with_suffix(".evidence.jsonl"), evidence)
        print(f"{len(cards)} cards in {options.output}, {len(missing)} start states estimated")

    return run_command(command)


async def _estimate(
    cards: Sequence[Scenario], judge: Complete, concurrency: int
) -> dict[str, StartState | RoleFailure]:
    """The start state of each card by its id, or the failure of its call."""
    free = asyncio.Semaphore(concurrency)

    async def estimate(card: Scenario) -> tuple[str, StartState | RoleFailure]:
        async with free:
            try:
                return card.id, await estimate_start(card, judge)
            except RoleFailure as failure:
                return card.id, failure

    estimates = asyncio.as_completed([estimate(card) for card in cards])
    starts = dict([await each for each in track(estimates, "start states", total=len(cards))])
    return {card.id: starts[card.id] for card in cards}


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
