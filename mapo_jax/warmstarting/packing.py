"""Rows of the warm start: chats as the tokens that RL will see, packed to one length and batched by grain."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import jax
import numpy as np

from mapo_jax.errors import UserError
from mapo_jax.learning.update import SupervisedBatch
from mapo_jax.rollout.rows import ChatFormat, Row

_OPEN_ROWS = 64  # rows that still take pieces: more rows pack tighter and slower


@dataclass(frozen=True)
class PackedRows:
    """All rows of a warm start."""

    batch: SupervisedBatch  # numpy arrays [N, L]
    fill: float  # share of the tokens that belong to a text

    def __len__(self) -> int:
        return len(self.batch.tokens)


class Renderer:
    """Renders chats as token rows, exactly as `rollout.collect` builds them."""

    def __init__(self, tokenizer, history: str, system_prompt: str | None):
        self._tokenizer, self._history, self._system_prompt = tokenizer, history, system_prompt
        self._format = functools.cache(functools.partial(ChatFormat, tokenizer, history))

    def pieces(
        self, chat: Sequence[Mapping[str, Any]], length: int, turns: int | None = None, where: str = "a chat"
    ) -> list[Row]:
        """Rows of a chat, split between turns where the chat is longer than a row.

        Every piece begins as a dialogue begins. The reply tokens and the end of turn after each are marked
        `sampled`: they have a loss. A reply with `weight` 0 has none; a piece without any loss is left out.

        Args:
          chat: messages; its system message, if any, replaces the configured one.
          length: maximum number of tokens of a piece.
          turns: maximum number of turns of a piece; None for as many as fit.
          where: names the chat in errors.

        Raises:
          UserError: one turn alone is longer than a row.
        """
        system = self._system_prompt
        if chat[0]["role"] == "system":
            system, chat = chat[0]["content"], chat[1:]
        format = self._format(system)
        per_turn = self._history == "per_turn"
        rows: list[Row] = []
        turns_in_row = 0
        for turn, (user, reply) in enumerate(zip(chat[0::2], chat[1::2], strict=False)):
            learnt = reply.get("weight", 1) == 1
            if per_turn and not learnt:
                continue
            text = format.plain(reply["content"])
            ids = (*self._tokenizer.encode(text, add_special_tokens=False), *format.end_of_turn)
            prompt: Sequence[int] = ()
            if turns_in_row and turns_in_row != turns and not per_turn:
                prompt = format.next_user(user["content"])
            if not prompt or len(rows[-1]) + len(prompt) + len(ids) > length:
                prompt = format.prompt(chat[: 2 * turn + 1]) if per_turn else format.start(user["content"])
                rows.append(Row())
                turns_in_row = 0
            row = rows[-1].with_prompt(prompt)
            if learnt:
                rows[-1] = row.with_reply(ids, (0.0,) * len(ids), turn if per_turn else turns_in_row)
            else:
                rows[-1] = row.with_prompt(ids)
            turns_in_row += 1
            if len(rows[-1]) > length:
                raise UserError(
                    f"{where}: turn {turn + 1} has {len(rows[-1])} tokens and does not fit a row; shorten "
                    f"it, or raise `warmstart.row_tokens` ({length})"
                )
        return [row for row in rows if any(row.sampled)]


def pack(pieces: Sequence[Row], length: int) -> PackedRows:
    """Packs pieces into rows of `length` tokens, first fit, in the order given.

    A token attends to its own piece only: pieces are segments, and positions restart in each.
    """
    rows: list[list[Row]] = []
    room: list[int] = []  # free tokens of each row
    for piece in pieces:
        open_rows = range(max(0, len(rows) - _OPEN_ROWS), len(rows))
        i = next((i for i in open_rows if room[i] >= len(piece)), len(rows))
        if i == len(rows):
            rows.append([])
            room.append(length)
        rows[i].append(piece)
        room[i] -= len(piece)

    shape = (len(rows), length)
    tokens, positions, segments = np.zeros((3, *shape), np.int32)
    mask = np.zeros(shape, bool)
    for i, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row):
            place = (i, slice(start, start + len(piece)))
            tokens[place], mask[place] = piece.ids, piece.sampled
            positions[place], segments[place] = np.arange(len(piece)), segment
            start += len(piece)
        segments[i, start:] = len(row)  # padding is a segment of its own
    fill = sum(map(len, pieces)) / tokens.size
    return PackedRows(SupervisedBatch(tokens, positions, segments, mask), fill)


def with_prompts(batch: SupervisedBatch) -> SupervisedBatch:
    """The same rows with a loss for the prompts, too. Every piece must have a reply with a loss."""
    last = (batch.segments * batch.mask).max(axis=1, keepdims=True)
    return replace(batch, mask=batch.segments <= last)


def batches(rows: PackedRows, size: int, seed: int) -> grain.DatasetIterator:
    """Endless batches of `size` rows, shuffled anew in every epoch; its position can be saved and restored.

    Raises:
      UserError: fewer rows than a batch needs.
    """
    if len(rows) < size:
        raise UserError(
            f"the chats fill {len(rows)} rows, fewer than `warmstart.rows` ({size}) of one update; "
            "give more chats or lower it"
        )
    # Not `repeat()`: the length of endless batches of one overflows in grain.
    dataset = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat(2**31).batch(size)
    dataset = dataset.map(lambda chosen: jax.tree.map(lambda array: array[chosen], rows.batch))
    # Rows are in memory: one thread that prefetches is enough, and leaves the cores to the update.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
