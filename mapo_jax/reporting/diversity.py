"""How varied the replies are, which openings and phrases repeat, and what they cost in reward."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mapo_jax.reporting.credit import Credit
from mapo_jax.reporting.folder import SavedBatch

OPENING_WORDS = 4
PHRASE_WORDS = (3, 4, 5)
DISTINCT = (1, 2, 3)
MOST_WORDS = 10_000  # of a batch that are looked at, so that long replies do not take minutes
LETTERS_PER_WORD = 6  # about, the space included
TOP = 8
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


@dataclass(frozen=True)
class Repeat:
    """A phrase that many replies share."""

    text: str
    count: int  # replies that have it
    share: float  # of all replies
    reward: float | None  # mean reward of the turns that have it
    cost: float | None  # the same minus the mean of the turns that do not


@dataclass(frozen=True)
class Diversity:
    """Of the replies of one batch."""

    step: int
    replies: int
    distinct: tuple[float | None, ...]  # distinct-1, -2, -3 over equally many words in every batch
    openings: tuple[Repeat, ...]
    phrases: tuple[Repeat, ...]
    own_repeats: float  # share of replies that open as an earlier reply of the same dialogue did
    own_cost: float | None  # mean reward of those minus that of the others


@dataclass(frozen=True)
class Shift:
    """A phrase that became more, or less, frequent."""

    text: str
    before: float  # share of replies
    after: float
    reward: float | None  # mean reward of the turns that have it, in both


def words(text: str) -> list[str]:
    """Words in lower case."""
    return _WORD.findall(text.lower())


def opening(said: Sequence[str]) -> tuple[str, ...]:
    """The first four words, or all if there are fewer."""
    return tuple(said[:OPENING_WORDS])


def grams(said: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Its runs of `size` words."""
    return list(zip(*(said[i:] for i in range(size)), strict=False))


def distinct(replies: Iterable[Sequence[str]], size: int, budget: int) -> float | None:
    """Distinct-n: different n-grams over all n-grams of the first `budget` words (Li et al. 2016).

    The figure falls with the amount of text, so that only equal budgets compare. None with fewer words.
    """
    seen: set[tuple[str, ...]] = set()
    total, left = 0, budget
    for said in replies:
        part = list(said[:left])
        left -= len(part)
        found = grams(part, size)
        seen.update(found)
        total += len(found)
        if left <= 0:
            break
    return len(seen) / total if total and left <= 0 else None


def analyse(batches: Sequence[SavedBatch], credits: Sequence[Sequence[Credit]]) -> list[Diversity]:
    """The diversity of each batch, with one budget of words for all of them."""
    said = [_replies(batch, credit) for batch, credit in zip(batches, credits, strict=True)]
    totals = [sum(len(text) for _, text, _ in replies) for replies in said]
    large = [total for total in totals if total >= 0.5 * np.median(totals)] if totals else []
    budget = min(large, default=0)
    return [
        _analyse(batch.step, replies, budget) for batch, replies in zip(batches, said, strict=True) if replies
    ]


def shifts(
    before: tuple[SavedBatch, Sequence[Credit]], after: tuple[SavedBatch, Sequence[Credit]], top: int = 6
) -> tuple[list[Shift], list[Shift]]:
    """Phrases whose share of replies rose most, and fell most.

    Of phrases that stand in much the same replies only one is told: the one that moved most, or the longest.
    """
    sides = [_replies(*side) for side in (before, after)]
    if not all(sides):
        return [], []
    replies = [*sides[0], *sides[1]]
    holders: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for index, (_, said, _) in enumerate(replies):
        for phrase in _phrases(said):
            holders[phrase].add(index)
    first = len(sides[0])
    shares = {}
    for phrase, where in holders.items():
        if len(where) >= 3:
            early = sum(index < first for index in where)
            shares[phrase] = (early / first, (len(where) - early) / len(sides[1]))

    def best(sign: int) -> list[Shift]:
        ranked = sorted(shares, key=lambda p: (-sign * (shares[p][1] - shares[p][0]), -len(p), p))
        kept: list[tuple[str, ...]] = []
        for phrase in ranked:
            if sign * (shares[phrase][1] - shares[phrase][0]) <= 0 or len(kept) == top:
                break
            if not any(_alike(holders[phrase], holders[other]) for other in kept):
                kept.append(phrase)
        return [Shift(" ".join(p), *shares[p], _mean_reward(replies, holders[p])) for p in kept]

    return best(+1), best(-1)


# --- Parts. ---

Reply = tuple[int, list[str], float | None]  # dialogue, words, reward


def _replies(batch: SavedBatch, credits: Sequence[Credit]) -> list[Reply]:
    """Replies of all dialogues, or of every k-th one where they have too many words."""
    letters = sum(len(turn.reply) for dialogue in batch.dialogues for turn in dialogue.turns)
    stride = max(1, round(letters / LETTERS_PER_WORD / MOST_WORDS))
    found: list[Reply] = []
    for index in range(0, len(batch.dialogues), stride):
        for turn, reward in zip(batch.dialogues[index].turns, credits[index].rewards, strict=True):
            found.append((index, words(turn.reply), reward))
    return found


def _analyse(step: int, replies: list[Reply], budget: int) -> Diversity:
    own = _own_repeats(replies)
    return Diversity(
        step=step,
        replies=len(replies),
        distinct=tuple(distinct((said for _, said, _ in replies), n, budget) for n in DISTINCT),
        openings=_repeats(replies, lambda said: {opening(said)} if said else set()),
        phrases=_repeats(replies, lambda said: set(grams(said, OPENING_WORDS))),
        own_repeats=sum(own) / len(own),
        own_cost=_cost(replies, own),
    )


def _repeats(replies: list[Reply], having: Callable[[list[str]], set[tuple[str, ...]]]) -> tuple[Repeat, ...]:
    holders: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for index, (_, said, _) in enumerate(replies):
        for phrase in having(said):
            holders[phrase].add(index)
    top = sorted((p for p in holders if len(holders[p]) > 1), key=lambda p: (-len(holders[p]), p))
    found: list[Repeat] = []
    kept: list[tuple[str, ...]] = []
    for phrase in top:
        if any(_alike(holders[phrase], holders[other]) for other in kept):
            continue
        kept.append(phrase)
        marked = [index in holders[phrase] for index in range(len(replies))]
        found.append(
            Repeat(
                " ".join(phrase),
                len(holders[phrase]),
                len(holders[phrase]) / len(replies),
                _mean_reward(replies, holders[phrase]),
                _cost(replies, marked),
            )
        )
        if len(found) == TOP:
            break
    return tuple(found)


def _own_repeats(replies: list[Reply]) -> list[bool]:
    seen: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    marks = []
    for dialogue, said, _ in replies:
        start = opening(said)
        marks.append(bool(start) and start in seen[dialogue])
        seen[dialogue].add(start)
    return marks


def _cost(replies: list[Reply], marked: Sequence[bool]) -> float | None:
    having = [r for (_, _, r), mark in zip(replies, marked, strict=True) if mark and r is not None]
    lacking = [r for (_, _, r), mark in zip(replies, marked, strict=True) if not mark and r is not None]
    return float(np.mean(having) - np.mean(lacking)) if having and lacking else None


def _phrases(said: list[str]) -> set[tuple[str, ...]]:
    return {gram for size in PHRASE_WORDS for gram in grams(said, size)}


def _mean_reward(replies: list[Reply], indices: Iterable[int]) -> float | None:
    rewards = [reward for index in indices if (reward := replies[index][2]) is not None]
    return float(np.mean(rewards)) if rewards else None


def _alike(one: set[int], other: set[int]) -> bool:
    """Whether two phrases stand in much the same replies: half of the smaller set is in the other."""
    return 2 * len(one & other) >= min(len(one), len(other))
