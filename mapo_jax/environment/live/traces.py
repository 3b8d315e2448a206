"""What in a drafted card may lead back to the person: addresses, and words of the conversation.

A name is found by its capital. One in lower case, or at the start of every sentence that has it, can only be
listed with all other rare words, for a person to look at; one in a script without capitals is not found.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from mapo_jax.environment.scenario import load_scenarios

_ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.\w+|https?://|\bwww\.|\+?\d[\d ()/-]{7,}\d")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_POSSESSIVE = re.compile(r"['\u2019]s$")
_FULL_STOP = r"(?<!\bMr|\bMs|\bDr|\bSt)(?<!\bMrs)(?<!\b[A-Z])\."
_SENTENCE_START = re.compile(rf"(?:^|[!?\u2026:\n]|{_FULL_STOP})[\s\"'\u2018\u201c(\[*_-]*$")
# Capitalised, and yet no trace of anybody. Without the months and days that are names too.
_CAPITALS = {
    "i", "i'm", "i'd", "i'll", "i've", "mum", "mom", "mommy", "mummy", "dad", "daddy", "mama", "papa",
    "grandma", "grandpa", "god", "christmas", "easter", "monday", "tuesday", "wednesday", "thursday",
    "friday", "saturday", "sunday", "january", "february", "march", "july", "september", "october",
    "november", "december", "english", "tv", "ok", "ai",
}  # fmt: skip


def strings(value: Any) -> Iterator[str]:
    """The texts in a JSON value, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


@lru_cache
def _ordinary() -> frozenset[str]:
    """Words that the embedded cards write in lower case."""
    texts = strings([dataclasses.asdict(card) for card in load_scenarios()])
    return frozenset(_plain(word) for text in texts for word, _ in _words(text) if word.islower())


def _words(text: str) -> Iterator[tuple[str, bool]]:
    """Each word, and whether a sentence begins with it."""
    text = unicodedata.normalize("NFKC", text)
    for match in _WORD.finditer(text):
        yield match[0], bool(_SENTENCE_START.search(text, max(0, match.start() - 20), match.start()))


def _plain(word: str) -> str:
    return _POSSESSIVE.sub("", word.replace("\u2019", "'")).casefold()


def _capitalised(texts: Iterable[str]) -> set[str]:
    """Words with a capital inside of a sentence; ordinary words that are shouted are none."""
    words = (pair for text in texts if not text.isupper() for pair in _words(text))
    shown = {word for word, first in words if word[0].isupper() and not first}
    return {_plain(w) for w in shown if not (w.isupper() and _plain(w) in _ordinary())} - _CAPITALS


def trace(card: Any, said: Iterable[str]) -> str | None:
    """The first thing in a card that leads back to a person: an address, a number, or a name that was said.

    Args:
      card: a JSON value.
      said: the texts of the conversation.
    """
    texts = list(strings(card))
    if address := next(filter(None, map(_ADDRESS.search, texts)), None):
        return address[0]
    names = _capitalised(said) - _ordinary()
    return next((word for text in texts for word, _ in _words(text) if _plain(word) in names), None)


def doubtful(card: Any, said: Iterable[str]) -> list[str]:
    """Words of a card, in order, that were said in the conversation and may be names.

    That is a word that no embedded card has in lower case; and an ordinary one that has a capital in both.
    """
    said = list(said)
    heard = {_plain(word) for text in said for word, _ in _words(text)} - _CAPITALS
    rare, capitalised = heard - _ordinary(), _capitalised(said)
    shared = (
        word
        for text in strings(card)
        for word, _ in _words(text)
        if _plain(word) in rare or (word[0].isupper() and _plain(word) in capitalised)
    )
    return list(dict.fromkeys(shared))


def without_capitals(texts: Iterable[str]) -> bool:
    """Whether a script is used that has no capitals, such as Chinese."""
    return any(unicodedata.category(character) == "Lo" for text in texts for character in text)
