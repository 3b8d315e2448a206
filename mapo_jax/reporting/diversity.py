"""Diversity of the replies: distinct-n, repeated openings and phrases, and their effect on the reward."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mapo_jax.reporting.comparison import mean
from mapo_jax.reporting.credit import Credit, CreditedBatch
from mapo_jax.reporting.dialogues import SavedBatch

OPENING_WORDS = 4
PHRASE_WORDS = (3, 4, 5)
DISTINCT = (1, 2, 3)
MOST_WORDS = 10_000  # of a batch that are analysed, so that long replies do not take minutes
LETTERS_PER_WORD = 6  # roughly, with the space
TOP = 8
FEWEST_REPLIES = 3  # with a phrase, for its share to count as a shift
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")

Phrase = tuple[str, ...]
Occurrences = dict[Phrase, set[int]]
"""Phrase -> indices of the replies that contain it."""

Reply = tuple[int, list[str], float | None]
"""Index of the dialogue, words, reward."""


@dataclass(frozen=True)
class Repeat:
    """A phrase that several replies share."""

    text: str
    count: int  # replies with the phrase
    share: float  # of all replies
    reward: float | None  # mean reward of the turns with the phrase
    cost: float | None  # that mean minus the mean of the other turns


@dataclass(frozen=True)
class Diversity:
    """Figures of the replies of one batch."""

    step: int
    replies: int
    distinct: tuple[float | None, ...]  # distinct-1, -2, -3 over the same number of words in every batch
    openings: tuple[Repeat, ...]
    phrases: tuple[Repeat, ...]
    own_repeats: float  # share of replies with the opening of an earlier reply of their dialogue
    own_cost: float | None  # mean reward of those minus that of the others


@dataclass(frozen=True)
class Shift:
    """A phrase whose frequency changed."""

    text: str
    before: float  # share of replies
    after: float
    reward: float | None  # mean reward of the turns with the phrase, before and after together
    replies: tuple[int, int]  # that were looked at, before and after


def words(text: str) -> list[str]:
    """Words in lower case."""
    return _WORD.findall(text.lower())


def opening(reply: Sequence[str]) -> Phrase:
    """The first four words, or all if there are fewer."""
    return tuple(reply[:OPENING_WORDS])


def grams(reply: Sequence[str], size: int) -> list[Phrase]:
    """All n-grams of `size` words."""
    return list(zip(*(reply[i:] for i in range(size)), strict=False))


def distinct(replies: Iterable[Sequence[str]], size: int, budget: int) -> float | None:
    """Distinct-n: distinct n-grams over all n-grams of the first `budget` words (Li et al. 2016).

    The figure falls with the amount of text, so compare it at the same budget only. None for fewer words.
    """
    pieces, left = [], budget
    for reply in replies:
        pieces += grams(reply[:left], size)
        left -= len(reply[:left])
        if left <= 0:
            break
    return len(set(pieces)) / len(pieces) if pieces and left <= 0 else None


def analyse(batches: Sequence[SavedBatch], credits: Sequence[Sequence[Credit]]) -> list[Diversity]:
    """The diversity of each batch, with the same word budget for all."""
    replies = [_replies(batch, credit) for batch, credit in zip(batches, credits, strict=True)]
    totals = [sum(len(reply) for _, reply, _ in batch) for batch in replies]
    budget = min((total for total in totals if total >= 0.5 * np.median(totals)), default=0)
    pairs = zip(batches, replies, strict=True)
    return [_analyse(batch.step, entries, budget) for batch, entries in pairs if entries]


def shifts(before: CreditedBatch, after: CreditedBatch, top: int = 6) -> tuple[list[Shift], list[Shift]]:
    """Phrases whose share of replies rose most, and fell most.

    Of phrases that occur in much the same replies only the one that changed most, or the longest, is kept.
    """
    sides = [_replies(*side) for side in (before, after)]
    if not all(sides):
        return [], []
    replies, looked_at = [*sides[0], *sides[1]], (len(sides[0]), len(sides[1]))
    occurrences = _occurrences(
        replies, lambda reply: {g for size in PHRASE_WORDS for g in grams(reply, size)}
    )
    shares, change = {}, {}
    for phrase, where in occurrences.items():
        if len(where) >= FEWEST_REPLIES:
            early = sum(index < len(sides[0]) for index in where)
            shares[phrase] = (early / len(sides[0]), (len(where) - early) / len(sides[1]))
            change[phrase] = shares[phrase][1] - shares[phrase][0]

    def largest(sign: int) -> list[Shift]:
        moved = [phrase for phrase in shares if sign * change[phrase] > 0]
        ranked = sorted(moved, key=lambda p: (-sign * change[p], -len(p), p))
        return [
            Shift(" ".join(p), *shares[p], mean(replies[i][2] for i in occurrences[p]), looked_at)
            for p in _without_overlap(ranked, occurrences, top)
        ]

    return largest(+1), largest(-1)


def _replies(batch: SavedBatch, credits: Sequence[Credit]) -> list[Reply]:
    """Replies of all dialogues, or of every k-th one if there are too many words."""
    letters = sum(len(turn.reply) for dialogue in batch.dialogues for turn in dialogue.turns)
    stride = max(1, round(letters / LETTERS_PER_WORD / MOST_WORDS))
    return [
        (index, words(turn.reply), reward)
        for index in range(0, len(batch.dialogues), stride)
        for turn, reward in zip(batch.dialogues[index].turns, credits[index].rewards, strict=True)
    ]


def _analyse(step: int, replies: list[Reply], budget: int) -> Diversity:
    seen: set[tuple[int, Phrase]] = set()
    repeated = set()  # indices of replies with the opening of an earlier reply of their dialogue
    for index, (dialogue, reply, _) in enumerate(replies):
        if reply and (dialogue, opening(reply)) in seen:
            repeated.add(index)
        seen.add((dialogue, opening(reply)))
    return Diversity(
        step=step,
        replies=len(replies),
        distinct=tuple(distinct((reply for _, reply, _ in replies), n, budget) for n in DISTINCT),
        openings=_repeats(replies, lambda reply: {opening(reply)} if reply else set()),
        phrases=_repeats(replies, lambda reply: set(grams(reply, OPENING_WORDS))),
        own_repeats=len(repeated) / len(replies),
        own_cost=_cost(replies, repeated),
    )


def _repeats(replies: list[Reply], phrases_of: Callable[[list[str]], set[Phrase]]) -> tuple[Repeat, ...]:
    occurrences = _occurrences(replies, phrases_of)
    ranked = sorted(
        (p for p in occurrences if len(occurrences[p]) > 1), key=lambda p: (-len(occurrences[p]), p)
    )

    def repeat(phrase: Phrase) -> Repeat:
        where = occurrences[phrase]
        reward, share = mean(replies[index][2] for index in where), len(where) / len(replies)
        return Repeat(" ".join(phrase), len(where), share, reward, _cost(replies, where))

    return tuple(map(repeat, _without_overlap(ranked, occurrences, TOP)))


def _occurrences(replies: list[Reply], phrases_of: Callable[[list[str]], set[Phrase]]) -> Occurrences:
    occurrences: Occurrences = defaultdict(set)
    for index, (_, reply, _) in enumerate(replies):
        for phrase in phrases_of(reply):
            occurrences[phrase].add(index)
    return occurrences


def _without_overlap(ranked: Sequence[Phrase], occurrences: Occurrences, top: int) -> list[Phrase]:
    """The first `top` phrases; one whose replies overlap by half with those of a kept phrase is skipped."""
    kept: list[Phrase] = []
    for phrase in ranked:
        one = occurrences[phrase]
        if not any(2 * len(one & occurrences[k]) >= min(len(one), len(occurrences[k])) for k in kept):
            kept.append(phrase)
        if len(kept) == top:
            break
    return kept


def _cost(replies: list[Reply], chosen: set[int]) -> float | None:
    """Mean reward of the chosen replies minus that of the others."""
    having = mean(reward for index, (_, _, reward) in enumerate(replies) if index in chosen)
    lacking = mean(reward for index, (_, _, reward) in enumerate(replies) if index not in chosen)
    return None if having is None or lacking is None else having - lacking
