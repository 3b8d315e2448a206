"""Rows of the warm start: chats as the tokens that RL will see, packed to one length and dealt by grain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int

from mapo_jax.errors import UserError
from mapo_jax.learning.update import SupervisedBatch
from mapo_jax.rollout.rows import ChatFormat, Row

_OPEN_ROWS = 64  # rows under way while packing: more pack tighter and slower


@dataclass(frozen=True)
class PackedRows:
    """All rows of a warm start, [N, L] each; fields as in `SupervisedBatch`."""

    tokens: Int[np.ndarray, "N L"]
    positions: Int[np.ndarray, "N L"]
    segments: Int[np.ndarray, "N L"]
    mask: Bool[np.ndarray, "N L"]
    fill: float  # share of the tokens that belong to a text

    def __len__(self) -> int:
        return len(self.tokens)


class Renderer:
    """Renders chats as token rows, exactly as `rollout.collect` builds them."""

    def __init__(self, tokenizer, history: str, system_prompt: str | None):
        self._tokenizer, self._history, self._system_prompt = tokenizer, history, system_prompt
        self._formats: dict[str | None, ChatFormat] = {}

    def _format(self, system_prompt: str | None) -> ChatFormat:
        if system_prompt not in self._formats:
            self._formats[system_prompt] = ChatFormat(self._tokenizer, self._history, system_prompt)
        return self._formats[system_prompt]

    def pieces(
        self, chat: Sequence[Mapping[str, Any]], length: int, turns: int | None = None, where: str = "a chat"
    ) -> list[Row]:
        """Rows of a chat, cut between turns where it is longer than a row.

        Every piece begins as a dialogue begins. The reply tokens, and the end of turn behind each, are
        marked `sampled`: they are what is learnt. A reply with `weight` 0 is not, and a piece with nothing to
        learn is left out.

        Args:
          chat: messages; a system message of its own replaces the configured one.
          length: most tokens of a piece.
          turns: most turns of a piece; None for as many as fit.
          where: names the chat in errors.

        Raises:
          UserError: one turn alone is longer than a row.
        """
        system = self._system_prompt
        if chat[0]["role"] == "system":
            system, chat = chat[0]["content"], chat[1:]
        format = self._format(system)
        exchanges = [
            (user["content"], reply["content"]) for user, reply in zip(chat[0::2], chat[1::2], strict=False)
        ]
        learnt = [reply.get("weight", 1) == 1 for reply in chat[1::2]]
        if self._history == "per_turn":
            rows = [
                self._rendered_turn(format, exchanges[: i + 1]) for i in range(len(exchanges)) if learnt[i]
            ]
            for number, row in enumerate(rows):
                _check_length(len(row), length, where, number)
            return rows
        rows: list[Row] = []
        row, held = Row(), 0
        for number, (user, reply) in enumerate(exchanges):
            tokens = self._encode(format, reply)
            prompt = format.next_user(user) if held else ()
            if held and (held == turns or len(row) + len(prompt) + len(tokens) > length):
                rows.append(row)
                row, held = Row(), 0
            row = row.with_prompt(prompt if held else format.start(user))
            if learnt[number]:
                row = row.with_reply(tokens, (0.0,) * len(tokens), held)
            else:
                row = row.with_prompt(tokens)
            held += 1
            _check_length(len(row), length, where, number)
        rows.append(row)
        return [row for row in rows if any(row.sampled)]

    def _rendered_turn(self, format: ChatFormat, exchanges: Sequence[tuple[str, str]]) -> Row:
        messages = []
        for user, reply in exchanges:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        tokens = self._encode(format, messages.pop()["content"])
        return (
            Row()
            .with_prompt(format.prompt(messages))
            .with_reply(tokens, (0.0,) * len(tokens), len(exchanges) - 1)
        )

    def _encode(self, format: ChatFormat, reply: str) -> tuple[int, ...]:
        ids = self._tokenizer.encode(format.plain(reply), add_special_tokens=False)
        return (*ids, *format.end_of_turn)


def _check_length(found: int, length: int, where: str, turn: int) -> None:
    if found > length:
        raise UserError(
            f"{where}: turn {turn + 1} has {found} tokens and does not fit a row; shorten it, or raise "
            f"`warmstart.row_tokens` ({length})"
        )


def pack(pieces: Sequence[Row], length: int) -> PackedRows:
    """Puts pieces side by side into rows of `length` tokens, first fit, in the order given.

    A token sees its own piece only: pieces are segments, and positions begin anew with each.
    """
    rows: list[list[Row]] = []
    room: list[int] = []
    for piece in pieces:
        first_open = max(0, len(rows) - _OPEN_ROWS)
        for i in range(first_open, len(rows)):
            if room[i] >= len(piece):
                break
        else:
            rows.append([])
            room.append(length)
            i = len(rows) - 1
        rows[i].append(piece)
        room[i] -= len(piece)

    shape = (len(rows), length)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segments, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row):
            end = start + len(piece)
            tokens[i, start:end] = piece.ids
            mask[i, start:end] = piece.sampled
            positions[i, start:end] = np.arange(len(piece))
            segments[i, start:end] = segment
            start = end
        segments[i, start:] = len(row)  # padding is a segment of its own
    used = sum(map(len, pieces)) / tokens.size
    return PackedRows(tokens, positions, segments, mask, used)


def batches(rows: PackedRows, size: int, seed: int) -> grain.DatasetIterator:
    """Endless batches of `size` rows, shuffled anew every pass; its position can be saved and set.

    Raises:
      UserError: fewer rows than a batch needs.
    """
    if len(rows) < size:
        raise UserError(
            f"the chats fill {len(rows)} rows, fewer than `warmstart.rows` ({size}) of one update; "
            "give more chats or lower it"
        )
    dataset = (
        grain.MapDataset.source(range(len(rows)))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(size)
        .map(
            lambda chosen: SupervisedBatch(
                rows.tokens[chosen], rows.positions[chosen], rows.segments[chosen], rows.mask[chosen]
            )
        )
    )
    # Rows lie in memory: one thread ahead of the update is plenty, and leaves the cores to it.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
