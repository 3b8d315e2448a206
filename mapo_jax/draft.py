"""Drafts scenario cards from kept conversations with the configured judge's model, for a person to edit.

    python -m mapo_jax.draft CONVERSATIONS --output FILE.yaml --config configs/live.yaml [key=value ...]

CONVERSATIONS is the folder of `mapo_jax.serve --conversations`; conversations that were held with a scenario
are left out. The model is asked to replace names and places. A card that holds one that was found in the
conversation is refused; words that may be names are listed above it. Read every card before you use it.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mapo_jax.chat_log import read_chats
from mapo_jax.commands import command_parser, run_command
from mapo_jax.config import Config, load_config
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.calls import Complete
from mapo_jax.environment.live.draft import draft_card
from mapo_jax.environment.live.traces import doubtful, without_capitals
from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.idle import refuse_unread
from mapo_jax.model.sharding import make_mesh
from mapo_jax.role_models import keep_calls, open_models
from mapo_jax.settings import parse_settings

NOTE = """# Drafts from real conversations. Read and edit each: nothing in it may lead back to a person. Then:
# python -m mapo_jax.environment.scenario check FILE, and python -m mapo_jax.rate for the start states.
"""


async def _draft_all(
    chats: Sequence[Mapping[str, Any]], complete: Complete, concurrency: int
) -> list[dict[str, Any] | RoleFailure]:
    free = asyncio.Semaphore(concurrency)

    async def one(index: int, chat: Mapping[str, Any]) -> dict[str, Any] | RoleFailure:
        async with free:
            try:
                return await draft_card(f"draft-{index:03d}", chat["messages"], complete)
            except RoleFailure as failure:
                return failure

    return await asyncio.gather(*(one(index, chat) for index, chat in enumerate(chats, start=1)))


def run(options: argparse.Namespace) -> None:
    """Drafts and writes the cards."""
    refuse_unread("draft", options.overrides)
    config = load_config(options.config, options.overrides)
    chats = [chat for chat in read_chats(options.conversations) if "scenario" not in chat]
    if not chats:
        raise UserError(f"every conversation in {options.conversations} was held with a scenario")
    folder = options.output.parent / f"{options.output.stem}.calls"
    with (
        asyncio.Runner() as runner,
        open_models(config, folder, make_mesh(config.mesh), runner, ("judge",)) as (callers, _),
        keep_calls(callers, folder),
    ):
        if callers["judge"] is None:
            raise UserError("`environment.judge.model` is empty; name the model that is to draft")
        drafts = runner.run(_draft_all(chats, callers["judge"], config.environment.concurrency))
    pairs = [(draft, chat) for draft, chat in zip(drafts, chats, strict=True) if isinstance(draft, dict)]
    failures = [draft for draft in drafts if isinstance(draft, RoleFailure)]
    if not pairs:
        raise UserError(f"no card could be drafted ({failures[0]})")
    notes = [_note(card, chat["messages"]) for card, chat in pairs]
    texts = (yaml.safe_dump([card], sort_keys=False, allow_unicode=True, width=110) for card, _ in pairs)
    lines = (text for pair in zip(notes, texts, strict=True) for text in pair)
    write_whole(options.output, NOTE + "".join(lines))
    print(f"{len(pairs)} drafts in {options.output}; read and edit them before use")
    print(f"{folder} holds the model's answers, also refused ones with names; delete it when you are done")
    if marked := sum(map(bool, notes)):
        print(f"{marked} of them may hold names; the line above each says which words to look at")
    if failures:
        print(f"{len(failures)} conversations gave none ({failures[0]}); the same command tries them again")


def _note(card: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> str:
    """A comment with what a person must look at; empty if there is nothing."""
    said = [message["content"] for message in messages]
    words = ", ".join(doubtful(card, said))
    note = f"# Said in the conversation too, and perhaps a name: {words}\n" if words else ""
    if without_capitals(said):
        note += "# The conversation is in a script without capitals: names in it were not looked for.\n"
    return note


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_parser("draft", "Drafts cards from kept conversations.")
    parser.add_argument("conversations", type=Path, help="the folder of `serve --conversations`")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.yaml")
    parser.add_argument("--config", metavar="FILE|NAME", help="YAML file with environment.judge")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parse_settings(Config, parser, arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
