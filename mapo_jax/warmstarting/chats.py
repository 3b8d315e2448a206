"""Texts of the warm start: chats from a JSONL file, or synthetic dialogues of the scripted world."""

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
from mapo_jax.files import encodable
from mapo_jax.json_files import read_values
from mapo_jax.tokenizer import END, END_OF_TEXT, START

# Messages with `role` and `content`, as in data for fine-tuning; a reply with `weight` 0 has no loss.
Chat = list[dict[str, Any]]

IMAGINED_SHARE = 0.9  # share of the synthetic dialogues with imagined cards; the rest use the training cards
_TEXT_PARTS = ("text", "input_text", "output_text", None)
_THINK_BLOCK = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_CONTROL = (START, END, END_OF_TEXT, "<think>", "</think>")


def read_chats(path: str | Path, note: Callable[[str], None] = lambda text: None) -> list[Chat]:
    """Reads a JSONL file with `{"messages": [{"role": ..., "content": ...}, ...]}` on every line.

    A chat may begin with a system message; then user and assistant take turns, the user first, with at least
    one reply to learn from. A reply with `"weight": 0` is context without loss. Content is text, or a list of
    text parts, which are joined. Reasoning is removed (a think block at the start of a reply, and
    `reasoning_content`), as Qwen3's template removes it from a dialogue with thinking off: after its empty
    think block stands the answer alone. Other keys and empty lines are ignored.

    Args:
      note: called with a message if replies had reasoning.

    Raises:
      UserError: the file cannot be read or holds no chats, or a line breaks these rules; names the line.
    """
    values = read_values(path, "chats", convert=lambda value: value)  # keeps surrogates, which are refused
    parsed = [parse_chat(row, place) for place, row in values]
    if reasoned := sum(count for _, count in parsed):
        note(f"{path}: {reasoned:,} replies have think blocks, which are left out; their answers are learnt")
    return [chat for chat, _ in parsed]


def parse_chat(row: Any, where: str) -> tuple[Chat, int]:
    """The chat of a line, and how many of its replies had reasoning; the rules are those of `read_chats`.

    Args:
      row: a mapping with `messages`.
      where: names the chat in errors.

    Raises:
      UserError: the chat breaks the rules.
    """
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a list of messages with `role` and `content`")
    places = [f"{where}, message {number}" for number in range(1, len(messages) + 1)]
    chat = [_message(message, place) for message, place in zip(messages, places, strict=True)]
    first = 1 if chat[0]["role"] == "system" else 0
    for i, message in enumerate(chat[first:]):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise UserError(
                f"{places[first + i]}: the role is {message['role']!r}, but it must be {expected!r}: after "
                "an optional system message, user and assistant take turns"
            )
    replies = range(first + 1, len(chat), 2)
    if not replies:
        raise UserError(f"{where}: there is no reply by the assistant to learn from")
    if all(chat[i].get("weight") == 0 for i in replies):
        raise UserError(f"{where}: every reply has `weight` 0: there is nothing to learn; leave it out")
    reasoned = 0
    for i in replies:
        answer = _answer(chat[i]["content"], places[i])
        reasoned += answer != chat[i]["content"] or bool(messages[i].get("reasoning_content"))
        chat[i]["content"] = answer
    return chat, reasoned


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be an object with `role` and `content`")
    read = {"role": message.get("role"), "content": _joined(message.get("content"))}
    for key, value in read.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: `{key}` must be text, not {reprlib.repr(message.get(key))}")
        if encodable(value) != value:
            raise UserError(f"{where}: `{key}` holds half a surrogate pair, which is no character")
    if read["role"] not in ("system", "user", "assistant"):
        raise UserError(
            f"{where}: the role is {reprlib.repr(read['role'])}; it must be system, user or assistant"
        )
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise UserError(f"{where}: `{key}` cannot be learnt; leave it or the chat out")
    weight, reply = message.get("weight"), read["role"] == "assistant"
    if weight is None:
        return read
    if isinstance(weight, bool) or weight not in ((0, 1) if reply else (0,)):
        rule = "0 (no loss) or 1" if reply else "0, as replies alone are learnt"
        raise UserError(f"{where}: `weight` is {reprlib.repr(weight)}; it must be {rule}")
    return read | {"weight": 0} if reply and weight == 0 else read


def _joined(content: Any) -> Any:
    """The text of a list of text parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = [p.get("text") if isinstance(p, dict) and p.get("type") in _TEXT_PARTS else p for p in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _answer(reply: str, where: str) -> str:
    """A reply without the think block at its start."""
    block = _THINK_BLOCK.match(reply)
    answer = reply[block.end() :] if block else reply
    if not answer.strip():
        raise UserError(
            f"{where}: the reply ends with its think block; give it an answer or leave the chat out"
        )
    if token := next((token for token in _CONTROL if token in answer), None):
        raise UserError(f"{where}: the reply holds {token}, which would be learnt as altered text; remove it")
    return answer


def write_chats(path: str | Path, chats: Sequence[Sequence[Mapping[str, str]]]) -> None:
    """Writes what `read_chats` reads."""
    lines = [json.dumps({"messages": list(chat)}, ensure_ascii=False) for chat in chats]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def synthetic_chats(
    cards: Sequence[Scenario], count: int, seed: int, *, turns: int, delayed_opening: bool = True
) -> list[Chat]:
    """Dialogues of mixed quality with the scripted user: every kind of reply, good timing and bad.

    Most use imagined cards. A model that has read the phrases of a few dozen cards memorises these; one that
    has read thousands copies what it names from the user's message.

    Args:
      cards: training cards.
      count: number of dialogues. The i-th depends on the seed and i alone.
      turns: turns of each.
      delayed_opening: as `environment.delayed_opening`.
    """
    chats = []
    for index in range(count):
        rng = random.Random(f"{seed}:{index}:warmstart")
        card = imagined_scenario(rng) if rng.random() < IMAGINED_SHARE else rng.choice(cards)
        chats.append(synthetic_dialogue(card, rng.getrandbits(31), turns, delayed_opening=delayed_opening))
    return chats
