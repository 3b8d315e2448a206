"""What the policy learnt: the judge's levels, kinds of replies and phrases, before and after training."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from mapo_jax.reporting.charts import asset, counted_share, format_value
from mapo_jax.reporting.comparison import mean
from mapo_jax.reporting.credit import CreditedBatch
from mapo_jax.reporting.dialogues import SavedBatch, SavedDialogue
from mapo_jax.reporting.diversity import Shift, shifts
from mapo_jax.reporting.folder import SavedRun, is_number

_TEXTS = yaml.safe_load(asset("behaviour.yaml"))
AXES: list[list[str]] = _TEXTS["axes"]
MEANINGS: dict[str, str] = _TEXTS["kinds"]
RARE = 0.02  # kinds with a smaller share before and after are listed as one
NOTABLE = 0.02  # a smaller change of a share is not mentioned
NOTABLE_NAMING = 0.05  # the same for the share of right names


@dataclass(frozen=True)
class LevelShares:
    """Shares of scored turns at each of the judge's levels on one axis."""

    axis: str
    title: str
    meaning: str
    harm: tuple[float, float]  # levels -2 and -1
    progress: tuple[float, float]  # levels +1 and +2


@dataclass(frozen=True)
class Kind:
    """The frequency of one kind of reply."""

    name: str
    meaning: str  # empty for a kind that the scripted world does not have
    example: str  # the most frequent reply of the kind, after training if there is one; may be empty
    before: float
    after: float
    reward: float | None  # mean reward of such a reply, before and after together
    counts: tuple[int, int] = (0, 0)  # replies, before and after
    helper: float | None = None  # share of the good helper's replies


@dataclass(frozen=True)
class Naming:
    """Share of right names among those of one sort that replies used."""

    what: str
    before: float | None
    after: float | None
    chance: float | None
    counts: tuple[int, int] = (0, 0)  # names, before and after
    helper: float | None = None  # of the good helper
    helper_count: int = 0  # the good helper's names; 0 if unknown


@dataclass(frozen=True)
class Behaviour:
    """Before and after training, on the same cards."""

    steps: tuple[int, int]
    replies: tuple[int, int]  # scored ones, before and after
    before: tuple[LevelShares, ...]
    after: tuple[LevelShares, ...]
    kinds: tuple[Kind, ...]  # largest increase first
    naming: tuple[Naming, ...]
    rising: tuple[Shift, ...]
    falling: tuple[Shift, ...]
    sentences: tuple[str, ...]
    headline: str  # the largest changes in one sentence; empty if hardly anything changed
    helper_replies: int  # scored ones of the good helper, in as many dialogues as after; 0 if unknown


def levels_of(batch: SavedBatch) -> tuple[LevelShares, ...]:
    """Shares of the judge's levels, per axis."""
    scored = _scored_levels(batch)

    def shares(column: int, *levels: int) -> tuple[float, ...]:
        values = [turn[column] for turn in scored]
        return tuple(values.count(level) / len(values) if values else 0.0 for level in levels)

    return tuple(
        LevelShares(*axis, harm=shares(2 * i + 1, -2, -1), progress=shares(2 * i, 1, 2))
        for i, axis in enumerate(AXES)
    )


def behaviour(run: SavedRun, before: CreditedBatch, after: CreditedBatch) -> Behaviour:
    """Compares two evaluations of one run."""
    steps = before[0].step, after[0].step
    levels = levels_of(before[0]), levels_of(after[0])
    replies = len(_scored_levels(before[0])), len(_scored_levels(after[0]))
    helped = _helper_replies(run.helper, len(after[0].dialogues))
    kinds, naming = _kinds(before, after, run.helper), _naming(run, *steps, (*replies, helped))
    sentences = tuple(_sentences(*levels, kinds, naming, replies))
    headline = _headline(before[0], after[0], kinds)
    rising, falling = map(tuple, shifts(before, after))
    return Behaviour(steps, replies, *levels, kinds, naming, rising, falling, sentences, headline, helped)


def _helper_replies(helper: Mapping[str, float], dialogues: int) -> int:
    """The good helper's scored replies in `dialogues` dialogues; 0 if they are unknown."""
    known = [helper.get(name) for name in ("dialogues/left_out", "turns/mean", "judge/failure_rate")]
    if not all(map(is_number, known)):
        return 0
    left_out, turns, failed = known
    return round(dialogues * (1 - left_out) * turns * (1 - failed))


def typical_pair(before: CreditedBatch, after: CreditedBatch) -> tuple[int, int, str] | None:
    """The dialogue with the median change of return: its index in both batches, and a description.

    The median and not the best pair, which would say nothing about the others.
    """
    pairs = changes(before, after)
    if not pairs:
        return None
    _, i, j = pairs[(len(pairs) - 1) // 2]
    return i, j, f"the median of {len(pairs)} pairs"


def changes(before: CreditedBatch, after: CreditedBatch) -> list[tuple[float, int, int]]:
    """(change of return, index before, index after) of the dialogues in both batches, ascending."""
    places = {_key(dialogue): i for i, dialogue in enumerate(before[0].dialogues)}
    pairs = [(places.get(_key(d)), j) for j, d in enumerate(after[0].dialogues) if d.state.counts]
    returns = [
        (before[1][i].first_return, after[1][j].first_return, i, j)
        for i, j in pairs
        if i is not None and before[0].dialogues[i].state.counts
    ]
    return sorted((b - a, i, j) for a, b, i, j in returns if a is not None and b is not None)


def _key(dialogue: SavedDialogue) -> tuple[str, int]:
    return dialogue.card, dialogue.place[1]


def _scored_levels(batch: SavedBatch) -> list[tuple[int, ...]]:
    return [turn.levels for d in batch.dialogues for turn in d.turns if turn.levels is not None]


def _kinds(before: CreditedBatch, after: CreditedBatch, helper: Mapping[str, float]) -> tuple[Kind, ...]:
    counts: list[Counter[str]] = []
    rewards: dict[str, list[float | None]] = defaultdict(list)
    examples: dict[str, str] = {}
    for batch, credits in (before, after):
        replies: dict[str, Counter[str]] = defaultdict(Counter)
        for dialogue, credit in zip(batch.dialogues, credits, strict=True):
            for turn, reward in zip(dialogue.turns, credit.rewards, strict=True):
                if (kind := (turn.reading or {}).get("kind")) is not None:
                    replies[kind][turn.reply] += 1
                    rewards[kind].append(reward)
        counts.append(Counter({name: counter.total() for name, counter in replies.items()}))
        examples |= {name: counter.most_common(1)[0][0] for name, counter in replies.items()}
    totals = [max(1, counter.total()) for counter in counts]

    def kind_of(name: str) -> Kind:
        shares = (counter[name] / total for counter, total in zip(counts, totals, strict=True))
        meaning = MEANINGS.get(name, "")
        reward, numbers = mean(rewards[name]), tuple(counter[name] for counter in counts)
        theirs = helper.get(f"kind/{name}", 0.0) if "kind/most" in helper else None
        return Kind(name.replace("_", " "), meaning, examples[name], *shares, reward, numbers, theirs)

    kinds = [kind_of(name) for name in counts[0] | counts[1]]
    rare = [kind for kind in kinds if max(kind.before, kind.after) < RARE]
    if len(rare) <= 2:
        rare = []
    kinds = [kind for kind in kinds if kind not in rare]
    kinds.sort(key=lambda kind: (kind.before - kind.after, kind.name))
    if rare:
        names, listed = f"{len(rare)} rare kinds", ", ".join(sorted(k.name for k in rare))
        shares = sum(k.before for k in rare), sum(k.after for k in rare)
        numbers = sum(k.counts[0] for k in rare), sum(k.counts[1] for k in rare)
        theirs = sum(k.helper for k in rare) if rare[0].helper is not None else None
        kinds.append(Kind(names, listed, "", *shares, None, numbers, theirs))
    return tuple(kinds)


def _naming(run: SavedRun, first: int, last: int, replies: tuple[int, int, int]) -> tuple[Naming, ...]:
    """`replies`: scored ones before, after, and of the good helper."""
    before, after = run.evaluations.get(first, {}), run.evaluations.get(last, {})
    keys = {key for key in (*before, *after) if key.startswith("naming/")}

    def figure(*values: Any) -> float | None:
        return next((float(value) for value in values if is_number(value)), None)

    def naming(key: str) -> Naming:
        chance = figure(after.get(f"{key}_chance"), before.get(f"{key}_chance"))
        what = key.removeprefix("naming/").replace("_", " ")
        rates = (figure(side.get(f"{key}_rate"), 0.0) for side in (before, after, run.helper))
        *counts, helped = (round(rate * number) for rate, number in zip(rates, replies, strict=True))
        shares = figure(before.get(key)), figure(after.get(key))
        return Naming(what, *shares, chance, tuple(counts), figure(run.helper.get(key)), helped)

    return tuple(naming(key) for key in sorted(keys) if not key.endswith(("_chance", "_rate")))


def _headline(before: SavedBatch, after: SavedBatch, kinds: Sequence[Kind]) -> str:
    """The most important changes: harm, help, and the kinds of reply that changed most."""
    replies = len(_scored_levels(before)), len(_scored_levels(after))
    parts = []
    for sign, what in ((-1, "harm"), (+1, "help")):
        one, other = (
            np.mean([any(sign * level > 0 for level in levels) for levels in _scored_levels(batch)] or [0.0])
            for batch in (before, after)
        )
        if abs(other - one) >= NOTABLE:
            parts.append(
                f"{'more' if other > one else 'fewer'} replies {what} ({_aside(one, other, replies)})"
            )
    text = " and ".join(parts)
    sentences = [f"{text[:1].upper()}{text[1:]}."] if parts else []
    for label, chosen in _movers([k for k in kinds if k.meaning and k.reward is not None], 2):
        shares = " or ".join(f"{k.meaning} ({_aside(k.before, k.after, replies)})" for k in chosen)
        sentences.append(f"{label} often it {shares}.")
    return " ".join(sentences)


def _sentences(
    before: Sequence[LevelShares],
    after: Sequence[LevelShares],
    kinds: Sequence[Kind],
    naming: Sequence[Naming],
    replies: tuple[int, int],
) -> list[str]:
    """The largest changes in words."""
    moves = []
    for one, other in zip(before, after, strict=True):
        moves.append((sum(one.progress), sum(other.progress), f"help on {one.title}"))
        moves.append((sum(one.harm), sum(other.harm), f"do harm on {one.title}"))
    moves.sort(key=lambda move: -abs(move[1] - move[0]))
    sentences = [
        f"{'More' if b > a else 'Fewer'} replies {what}: {_change(a, b, replies)} of turns."
        for a, b, what in moves[:3]
        if abs(b - a) >= NOTABLE
    ]
    for label, chosen in _movers([k for k in kinds if k.reward is not None], 3):  # without the rare ones
        shares = ", ".join(f"{k.meaning or k.name} {_change(k.before, k.after, replies)}" for k in chosen)
        sentences.append(f"{label} often it {shares}." if chosen[0].meaning else f"{label}: {shares}.")
    known = [n for n in naming if n.before is not None and n.after is not None]
    better = [n for n in known if n.after - n.before >= NOTABLE_NAMING]
    if better:
        shares = ", ".join(f"{n.what} {_change(n.before, n.after, n.counts)}" for n in better)
        sentences.append(f"What it names is right more often: {shares}.")
    return sentences


def _movers(kinds: Sequence[Kind], most: int) -> list[tuple[str, list[Kind]]]:
    """The kinds that rose most and those that fell most, each with its label."""
    up = [kind for kind in kinds if kind.after - kind.before >= NOTABLE][:most]
    down = [kind for kind in reversed(kinds) if kind.before - kind.after >= NOTABLE][:most]
    return [(label, chosen) for label, chosen in (("More", up), ("Less", down)) if chosen]


def _change(before: float, after: float, totals: tuple[int, int]) -> str:
    """Two shares with their counts."""
    return " → ".join(map(counted_share, (before, after), totals))


def _aside(before: float, after: float, totals: tuple[int, int]) -> str:
    """Two shares and of how many, to stand in brackets."""
    one, other = (format_value(value, "share") for value in (before, after))
    first = "" if totals[0] == totals[1] else f" of {totals[0]:,}"
    return f"{one}{first} → {other} of {totals[1]:,}"
