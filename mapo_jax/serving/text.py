"""Sampled ids as text that grows: whole characters only, and nothing that may still become a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from transformers.convert_slow_tokenizer import bytes_to_unicode

from mapo_jax.rollout.rows import ChatFormat

UNFINISHED = "\ufffd"  # what a tokenizer writes for a part of a character


class ReplyText:
    """The text of one reply while it is sampled.

    Attributes:
      text: everything so far, without stop ids and without the stop text.
      ids: the sampled ids that it was read from, stop ids included.
      stopped: whether a stop text has ended it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_ids: Sequence[int], stops: Sequence[str]):
        self._decode, self._stop_ids, self._stops = decode, frozenset(stop_ids), tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._shown: list[int] = []  # ids with a text
        self._start = self._read = 0  # ids[start:read] are decoded again, for the spelling of what follows
        self._given = 0
        self.text, self.ids, self.stopped = "", [], False

    def add(self, ids: Sequence[int], *, last: bool) -> str:
        """What is new in the text after further ids; with `last`, everything that was held back too."""
        # A stop text must be known token by token; else one decoding is enough for all.
        for some in ([i] for i in ids) if self._stops else [ids]:
            if self.stopped:
                break
            self.ids += some
            self._shown += (i for i in some if i not in self._stop_ids)
            self._extend(self._new_text())
        if last and not self.stopped:
            self._extend(self._new_text(whole=True))
        end = len(self.text) if last or self.stopped else len(self.text) - self._held_back()
        new, self._given = self.text[self._given : end], max(end, self._given)
        return new

    def _new_text(self, *, whole: bool = False) -> str:
        before = self._decode(self._shown[self._start : self._read])
        after = self._decode(self._shown[self._start :])
        if after.endswith(UNFINISHED) and not whole:
            return ""
        self._start, self._read = self._read, len(self._shown)
        return after[len(before) :]

    def _extend(self, new: str) -> None:
        begin = max(0, len(self.text) - self._longest)
        self.text += new
        found = [at for stop in self._stops if (at := self.text.find(stop, begin)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop text."""
        for size in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stops):
                return size
        return 0


@lru_cache
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


def speller(chat: ChatFormat) -> Callable[[int], tuple[str, bytes]]:
    """A function of an id that returns its text and its bytes; a part of a character has bytes only."""

    def spell(token: int) -> tuple[str, bytes]:
        text = chat.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if UNFINISHED not in text:
            return text, text.encode()
        spelled = chat.tokenizer.convert_ids_to_tokens(token)
        return text, bytes(_byte_of().get(character, 0x3F) for character in spelled)

    return spell
