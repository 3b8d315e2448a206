"""Texts of the warm start: chats from a JSONL file, or synthetic dialogues of the scripted world."""

from __future__ import annotations

import json
import random
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.scripted.helper import synthetic_dialogue
from mapo_jax.environment.scripted.imagine import imagined_scenario
from mapo_jax.errors import UserError
from mapo_jax.tokenizer import END, END_OF_TEXT, START

# Messages with `role` and `content`, as in data for fine-tuning; a reply with `weight` 0 is not learnt.
Chat = list[dict[str, Any]]

IMAGINED_SHARE = 0.9  # of the synthetic dialogues; the others are held with the training cards
_TEXT_PARTS = ("text", "input_text", "output_text", None)
_THOUGHTS = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_CONTROL = (START, END, END_OF_TEXT, "<think>", "</think>")


def read_chats(path: str | Path, note: Callable[[str], None] = lambda text: None) -> list[Chat]:
    """Reads a JSONL file with `{"messages": [{"role": ..., "content": ...}, ...]}` on every line.

    A chat may open with a system message; then user and assistant take turns, the user first, and at least
    one reply is there to learn from. A reply with `"weight": 0` is read and not learnt. Content is text, or a
    list of text parts, which are joined. Reasoning is left out (a think block that a reply begins with, and
    `reasoning_content`), as Qwen3's template leaves it out of a dialogue with thinking off: behind its empty
    think block stands the answer alone. Other keys are ignored, and so are empty lines.

    Args:
      note: is told how many replies had reasoning.

    Raises:
      UserError: the file cannot be read or holds no chats, or a line breaks these rules; names the line.
    """
    path = Path(path)
    chats, reasoned = [], 0
    try:
        # What is not UTF-8 becomes surrogates, which no line of UTF-8 has: so the line can be named.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    chat, more = _parse(line, f"{path}, line {number}")
                    chats.append(chat)
                    reasoned += more
    except OSError as error:
        raise UserError(f"cannot read the chats {path}: {error.strerror}") from error
    if not chats:
        raise UserError(f"{path} holds no chats; it needs a line of JSON with `messages` for each")
    if reasoned:
        note(f"{path}: {reasoned:,} replies have think blocks, which are left out; their answers are learnt")
    return chats


def _parse(line: str, where: str) -> tuple[Chat, int]:
    """The chat of a line, and how many of its replies had reasoning."""
    if not _is_text(line):
        raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{where}: brackets are nested too deep for a chat") from error
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
    if all(message.get("weight") == 0 for message in chat[first + 1 :: 2]):
        raise UserError(
            f"{where}: every reply has `weight` 0, so there is nothing to learn; leave the line out"
        )
    reasoned = 0
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            answer = _answer(message["content"], f"{where}, message {i + 1}")
            reasoned += answer != message["content"] or bool(messages[i].get("reasoning_content"))
            message["content"] = answer
    return chat, reasoned


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be an object with `role` and `content`")
    read = {"role": message.get("role"), "content": _joined(message.get("content"))}
    for key, value in read.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: `{key}` must be text, not {reprlib.repr(message.get(key))}")
        if not _is_text(value):
            raise UserError(f"{where}: `{key}` holds half a surrogate pair, which is no character")
    if read["role"] not in ("system", "user", "assistant"):
        raise UserError(
            f"{where}: the role is {reprlib.repr(read['role'])}; it must be system, user or assistant"
        )
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise UserError(f"{where}: `{key}` cannot be learnt; leave it or the chat out")
    weight = message.get("weight")
    if weight is None:
        return read
    learnt = (0, 1) if read["role"] == "assistant" else (0,)
    if isinstance(weight, bool) or weight not in learnt:
        rule = "be 0 (not learnt) or 1" if len(learnt) == 2 else "be 0, as replies alone are learnt"
        raise UserError(f"{where}: `weight` is {reprlib.repr(weight)}; it must {rule}")
    return read | {"weight": 0} if learnt == (0, 1) and weight == 0 else read


def _joined(content: Any) -> Any:
    """The text of a list of text parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_PARTS else part
        for part in content
    ]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _answer(reply: str, where: str) -> str:
    """A reply without the think block that it begins with."""
    answer = _THOUGHTS.sub("", reply, count=1) if _THOUGHTS.match(reply) else reply
    if not answer.strip():
        raise UserError(
            f"{where}: the reply ends with its think block; give it an answer or leave the chat out"
        )
    for token in _CONTROL:
        if token in answer:
            raise UserError(
                f"{where}: the reply holds {token}, which would be learnt as mangled text; remove it"
            )
    return answer


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogates
        return False
    return True


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
