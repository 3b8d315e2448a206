"""What the policy learnt to do: the judge's levels, kinds of replies, phrases; before and after training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mapo_jax.reporting.charts import tell
from mapo_jax.reporting.credit import Credit
from mapo_jax.reporting.diversity import Shift, shifts
from mapo_jax.reporting.folder import SavedBatch, SavedDialogue, SavedRun, is_number

# What the judge looks for on each axis, in plain words.
AXES = (
    ("C", "understanding", "grasps the point; at best, gives it a new frame"),
    ("A", "feeling", "meets the stated feeling; at best, names the one behind it"),
    ("P", "agency", "affirms or offers something workable; at best, the person feels able again"),
)
# The scripted world's kinds of reply, for readers who have never seen them.
MEANINGS = {
    "reflect_situation": "takes up what happened",
    "name_feeling": "names the stated feeling",
    "name_unstated": "names an unspoken feeling",
    "affirm_strength": "sees what the user keeps doing",
    "reframe": "gives it another meaning",
    "offer_step": "offers one small step",
    "ask": "asks an open question",
    "repair": "takes back a misstep",
    "presence": "says that it is there",
    "template": "gives stock sympathy",
    "advise": "pushes advice",
    "lecture": "tells the user what they must do",
    "dismiss": "plays it down",
    "blame": "puts the fault on the user",
    "praise": "praises without substance",
    "farewell": "says goodbye",
    "incoherent": "says what makes no sense here",
    "echo": "repeats the user's words",
    "other": "says none of these",
}
RARE = 0.02  # a kind with a smaller share before and after is told together with others


@dataclass(frozen=True)
class Levels:
    """Shares of scored turns at each of the judge's levels on one axis."""

    axis: str
    title: str
    meaning: str
    harm: tuple[float, float]  # levels -2 and -1
    progress: tuple[float, float]  # levels +1 and +2


@dataclass(frozen=True)
class Kind:
    """How often replies are of one kind."""

    name: str
    meaning: str  # in plain words; empty for a kind that is not the scripted world's
    example: str  # the commonest reply of the kind, after training if there is one; may be empty
    before: float
    after: float
    reward: float | None  # mean reward of such a reply, over both


@dataclass(frozen=True)
class Naming:
    """Of the things of one sort that replies named, how many were right."""

    what: str
    before: float | None
    after: float | None
    chance: float | None


@dataclass(frozen=True)
class Behaviour:
    """Before and after training, on the same cards."""

    steps: tuple[int, int]
    before: tuple[Levels, ...]
    after: tuple[Levels, ...]
    kinds: tuple[Kind, ...]  # those that rose most first
    naming: tuple[Naming, ...]
    rising: tuple[Shift, ...]
    falling: tuple[Shift, ...]
    sentences: tuple[str, ...]
    headline: str  # the largest changes in one sentence; empty where hardly anything changed


def levels_of(batch: SavedBatch) -> tuple[Levels, ...]:
    """What the judge gave, per axis."""
    scored = [turn.levels for d in batch.dialogues for turn in d.turns if turn.levels is not None]
    found = []
    for place, (axis, title, meaning) in enumerate(AXES):
        progress = [levels[2 * place] for levels in scored]
        harm = [levels[2 * place + 1] for levels in scored]
        share = lambda values, level: values.count(level) / len(values) if values else 0.0  # noqa: E731
        found.append(
            Levels(
                axis,
                title,
                meaning,
                (share(harm, -2), share(harm, -1)),
                (share(progress, 1), share(progress, 2)),
            )
        )
    return tuple(found)


def behaviour(
    run: SavedRun, before: tuple[SavedBatch, Sequence[Credit]], after: tuple[SavedBatch, Sequence[Credit]]
) -> Behaviour:
    """Compares two evaluations of one run."""
    levels = levels_of(before[0]), levels_of(after[0])
    kinds = _kinds(before, after)
    rising, falling = shifts(before, after)
    steps = before[0].step, after[0].step
    naming = _naming(run, *steps)
    return Behaviour(
        steps,
        *levels,
        kinds,
        naming,
        tuple(rising),
        tuple(falling),
        tuple(_sentences(*levels, kinds, naming)),
        _headline(before[0], after[0], kinds),
    )


def typical_pair(
    before: tuple[SavedBatch, Sequence[Credit]], after: tuple[SavedBatch, Sequence[Credit]]
) -> tuple[int, int, str] | None:
    """The dialogue whose return changed by the median: its place in both batches, and its standing.

    A typical one, not the best: a page that shows its best case says nothing.
    """
    pairs = changes(before, after)
    if not pairs:
        return None
    middle = pairs[(len(pairs) - 1) // 2]
    return middle[1], middle[2], f"the median of {len(pairs)} pairs"


def changes(
    before: tuple[SavedBatch, Sequence[Credit]], after: tuple[SavedBatch, Sequence[Credit]]
) -> list[tuple[float, int, int]]:
    """(change of return, place before, place after) of the dialogues that both have, ascending."""
    there = {_key(d): i for i, d in enumerate(before[0].dialogues)}
    found = []
    for j, dialogue in enumerate(after[0].dialogues):
        i = there.get(_key(dialogue))
        if i is None or not (before[0].dialogues[i].counts and dialogue.counts):
            continue
        one, other = before[1][i].first_return, after[1][j].first_return
        if one is not None and other is not None:
            found.append((other - one, i, j))
    return sorted(found)


def _key(dialogue: SavedDialogue) -> tuple[str, int]:
    return dialogue.scenario, dialogue.place[1]


def _kinds(
    before: tuple[SavedBatch, Sequence[Credit]], after: tuple[SavedBatch, Sequence[Credit]]
) -> tuple[Kind, ...]:
    counts, rewards = [], {}
    said: dict[str, Counter[str]] = {}
    for batch, credits in (before, after):
        counter: Counter[str] = Counter()
        told: dict[str, Counter[str]] = {}
        for dialogue, credit in zip(batch.dialogues, credits, strict=True):
            for turn, reward in zip(dialogue.turns, credit.rewards, strict=True):
                if turn.kind is not None:
                    counter[turn.kind] += 1
                    told.setdefault(turn.kind, Counter())[turn.reply] += 1
                    if reward is not None:
                        rewards.setdefault(turn.kind, []).append(reward)
        counts.append(counter)
        said |= told  # the later batch's words, where it has any
    totals = [max(1, counter.total()) for counter in counts]
    found = [
        Kind(
            name.replace("_", " "),
            MEANINGS.get(name, ""),
            said[name].most_common(1)[0][0],
            counts[0][name] / totals[0],
            counts[1][name] / totals[1],
            float(np.mean(rewards[name])) if name in rewards else None,
        )
        for name in counts[0] | counts[1]
    ]
    rare = [kind for kind in found if max(kind.before, kind.after) < RARE]
    if len(rare) > 2:
        found = [kind for kind in found if kind not in rare]
    found.sort(key=lambda kind: (-(kind.after - kind.before), kind.name))
    if len(rare) > 2:
        names, listed = f"{len(rare)} rare kinds", ", ".join(sorted(k.name for k in rare))
        found.append(Kind(names, listed, "", sum(k.before for k in rare), sum(k.after for k in rare), None))
    return tuple(found)


def _naming(run: SavedRun, first: int, last: int) -> tuple[Naming, ...]:
    one, other = run.evaluations.get(first, {}), run.evaluations.get(last, {})
    names = sorted(
        {
            name.removeprefix("naming/")
            for name in (*one, *other)
            if name.startswith("naming/") and not name.endswith(("_chance", "_rate"))
        }
    )

    def figure(*keys: tuple[dict, str]) -> float | None:
        return next((float(m[k]) for m, k in keys if is_number(m.get(k))), None)

    return tuple(
        Naming(
            name.replace("_", " "),
            figure((one, f"naming/{name}")),
            figure((other, f"naming/{name}")),
            figure((other, f"naming/{name}_chance"), (one, f"naming/{name}_chance")),
        )
        for name in names
    )


def _headline(before: SavedBatch, after: SavedBatch, kinds: Sequence[Kind]) -> str:
    """What a stranger should know first: harm, help, and the kinds of reply that changed most."""
    share = partial(tell, form="share")

    def any_level(batch: SavedBatch, sign: int) -> float:
        scored = [turn.levels for d in batch.dialogues for turn in d.turns if turn.levels is not None]
        return float(np.mean([any(sign * level > 0 for level in levels) for levels in scored] or [0.0]))

    said = []
    for sign, what in ((-1, "harm"), (+1, "help")):
        one, other = any_level(before, sign), any_level(after, sign)
        if abs(other - one) >= 0.02:
            said.append(
                f"{'more' if other > one else 'fewer'} replies {what} ({share(one)} → {share(other)})"
            )
    changed = " and ".join(said)
    sentences = [f"{changed[:1].upper()}{changed[1:]}."] if said else []
    told = [kind for kind in kinds if kind.meaning and kind.reward is not None]
    up = [k for k in told if k.after - k.before >= 0.02][:2]
    down = [k for k in reversed(told) if k.before - k.after >= 0.02][:2]
    for label, chosen in (("More", up), ("Less", down)):
        if chosen:
            shares = [f"{k.meaning} ({share(k.before)} → {share(k.after)})" for k in chosen]
            sentences.append(f"{label} often it {' or '.join(shares)}.")
    return " ".join(sentences)


def _sentences(
    before: Sequence[Levels], after: Sequence[Levels], kinds: Sequence[Kind], naming: Sequence[Naming]
) -> list[str]:
    """The largest changes, said in words."""
    share = partial(tell, form="share")
    said = []
    moves = []
    for one, other in zip(before, after, strict=True):
        moves.append((sum(other.progress) - sum(one.progress), one, other, True))
        moves.append((sum(other.harm) - sum(one.harm), one, other, False))
    for change, one, other, good in sorted(moves, key=lambda move: -abs(move[0]))[:3]:
        if abs(change) < 0.02:
            continue
        what = "help" if good else "do harm"
        shares = (one.progress, other.progress) if good else (one.harm, other.harm)
        direction = "More" if change > 0 else "Fewer"
        said.append(
            f"{direction} replies {what} on {one.title}: "
            f"{share(sum(shares[0]))} → {share(sum(shares[1]))} of turns."
        )
    kinds = [kind for kind in kinds if kind.reward is not None]  # not the rare ones together
    if kinds:
        up = [k for k in kinds if k.after - k.before >= 0.02][:3]
        down = [k for k in reversed(kinds) if k.before - k.after >= 0.02][:3]
        for label, chosen in (("More", up), ("Less", down)):
            if chosen:
                parts = [f"{k.meaning or k.name} {share(k.before)} → {share(k.after)}" for k in chosen]
                said.append(
                    f"{label} often it {', '.join(parts)}."
                    if chosen[0].meaning
                    else f"{label}: {', '.join(parts)}."
                )
    better = [
        n for n in naming if n.before is not None and n.after is not None and n.after - n.before >= 0.05
    ]
    if better:
        parts = [f"{n.what} {share(n.before)} → {share(n.after)}" for n in better]
        said.append(f"What it names is right more often: {', '.join(parts)}.")
    return said
