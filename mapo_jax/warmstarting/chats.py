"""Texts of the warm start: chats from a JSONL file, or synthetic dialogues of the scripted world."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.scripted.helper import synthetic_dialogue
from mapo_jax.environment.scripted.imagine import imagined_scenario
from mapo_jax.errors import UserError

Chat = list[dict[str, str]]  # messages with `role` and `content`, as chat fine-tuning data is written

IMAGINED_SHARE = 0.9  # of the synthetic dialogues; the others are held with the training cards


def read_chats(path: str | Path) -> list[Chat]:
    """Reads a JSONL file with `{"messages": [{"role": ..., "content": ...}, ...]}` on every line.

    A chat may open with a system message; then user and assistant take turns, the user first, and at least
    one reply is there. Other keys beside `messages` are ignored, and so are empty lines.

    Raises:
      UserError: the file cannot be read or holds no chats, or a line breaks these rules; names the line.
    """
    path = Path(path)
    chats = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    chats.append(_parse(line, f"{path}, line {number}"))
    except OSError as error:
        raise UserError(f"cannot read the chats {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    if not chats:
        raise UserError(f"{path} holds no chats; it needs a line of JSON with `messages` for each")
    return chats


def _parse(line: str, where: str) -> Chat:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a list of messages with `role` and `content`")
    chat = [_message(message, f"{where}, message {i + 1}") for i, message in enumerate(messages)]
    first = 1 if chat[0]["role"] == "system" else 0
    for i, message in enumerate(chat[first:]):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise UserError(
                f"{where}, message {first + i + 1}: the role is {message['role']!r}, but it must be "
                f"{expected!r}: after an optional system message, user and assistant take turns"
            )
    if len(chat) - first < 2:
        raise UserError(f"{where}: there is no reply by the assistant to learn from")
    return chat


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be an object with `role` and `content`")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str) or not message[key].strip():
            raise UserError(f"{where}: `{key}` must be text, not {message.get(key)!r}")
    if message["role"] not in ("system", "user", "assistant"):
        raise UserError(f"{where}: the role is {message['role']!r}; it must be system, user or assistant")
    return {"role": message["role"], "content": message["content"]}


def write_chats(path: str | Path, chats: Sequence[Sequence[Mapping[str, str]]]) -> None:
    """Writes what `read_chats` reads."""
    lines = [json.dumps({"messages": list(chat)}, ensure_ascii=False) for chat in chats]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def synthetic_chats(
    cards: Sequence[Scenario], count: int, seed: int, *, turns: int, delayed_opening: bool = True
) -> list[Chat]:
    """Dialogues of mixed quality with the scripted user: every kind of reply, good timing and bad.

    Most are held with imagined cards. A model that has read the phrases of a few dozen cards knows these by
    heart; one that has read thousands takes what it names from the user's message.

    Args:
      cards: training cards.
      count: dialogues. The i-th depends on the seed and i alone.
      turns: turns of each.
      delayed_opening: the world's switch.
    """
    chats = []
    for index in range(count):
        rng = random.Random(f"{seed}:{index}:warmstart")
        card = imagined_scenario(rng) if rng.random() < IMAGINED_SHARE else rng.choice(cards)
        chats.append(synthetic_dialogue(card, rng.getrandbits(31), turns, delayed_opening=delayed_opening))
    return chats
