"""Imagined cards: the words of the real ones in new phrases, so that synthetic dialogues show thousands.

A model that has only read the phrases of 64 cards learns these by heart; one that has read thousands learns
to take them from the user's message. The words are those of all cards, so that a small model knows every word
of its world; the phrases of the validation and test cards occur only by chance.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from mapo_jax.environment.scenario import (
    DOMAINS,
    FEELINGS,
    INDICATORS,
    THRESHOLDS,
    UNSTATED,
    Person,
    Scenario,
    Stage,
    Story,
    load_scenarios,
)

_LINES = (
    "I keep staring at {p}.",
    "I can hear {p} at night.",
    "They gave {p} to someone else.",
    "I walked away from {p}.",
    "Nobody warned me about {p}.",
    "I was late for {p}.",
    "I sat next to {p} for hours.",
    "They laughed about {p}.",
    "I paid for {p} myself.",
    "I said yes to {p}.",
    "I wanted to fix {p}.",
    "We argued about {p} again.",
    "My brother asked about {p}.",
    "I still see {p} before me.",
    "I have to face {p} on Monday.",
    "I left because of {p}.",
    "Since spring it has been {p}.",
    "I put all I had into {p}.",
    "Then came {p}.",
    "They moved me to {p}.",
    "I dream of {p}.",
    "I walk around {p} every day.",
    "I hid behind {p}.",
    "It began with {p}.",
    "They wrote to me about {p}.",
    "I could not go near {p}.",
    "I used to love {p}.",
    "I lost {p} in one week.",
    "My boss only talks about {p}.",
    "I clean up after {p}.",
    "We never speak of {p}.",
    "I was proud of {p} once.",
)
_TWO_WORDS = 0.8  # share of particulars of two words
_NAMES = ("Mara", "Jonas", "Elif", "Tom", "Ana", "Viktor", "Lena", "Omar", "Ruth", "Pavel", "Nina", "Karl")


@dataclass(frozen=True)
class _Lexicon:
    """Parts of the cards' phrases, to be put together anew."""

    before: tuple[str, ...]  # the words of particulars that stand before another
    nouns: tuple[str, ...]  # their last words
    doing: tuple[str, ...]  # gerunds that open strengths
    after_doing: tuple[str, ...]  # what follows them
    step_heads: tuple[str, ...]  # the first two words of steps
    step_tails: tuple[str, ...]  # what follows them
    values: tuple[str, ...]


@lru_cache(maxsize=1)
def _lexicon() -> _Lexicon:
    cards = load_scenarios()
    particulars = [p.split()[1:] for card in cards for stage in card.story.stages for p in stage.particulars]
    strengths = [strength.split(" ", 1) for card in cards for strength in card.story.strengths]
    steps = [step.split(" ", 2) for card in cards for step in card.story.steps]

    def distinct(words: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(set(words)))

    return _Lexicon(
        before=distinct(words[0] for words in particulars if len(words) > 1),
        nouns=distinct(words[-1] for words in particulars),
        doing=distinct(words[0] for words in strengths),
        after_doing=distinct(words[1] for words in strengths if len(words) > 1),
        step_heads=distinct(" ".join(words[:2]) for words in steps),
        step_tails=distinct(words[2] for words in steps if len(words) > 2),
        values=distinct(card.value for card in cards),
    )


def imagined_scenario(rng: random.Random) -> Scenario:
    """A made-up card; everything about it follows from `rng`."""
    taken: list[str] = []

    def fresh(make) -> str:
        """A phrase that neither holds nor lies in one that the card already has."""
        while True:
            phrase = make()
            if not any(f" {phrase} " in f" {other} " or f" {other} " in f" {phrase} " for other in taken):
                taken.append(phrase)
                return phrase

    lines = rng.sample(_LINES, 8)
    stages = []
    for i in range(4):
        particulars = (fresh(lambda: _particular(rng)), fresh(lambda: _particular(rng)))
        stages.append(
            Stage(
                telling="Imagined.",
                particulars=particulars,
                line=tuple(lines[2 * i + k].format(p=p) for k, p in enumerate(particulars)),  # type: ignore[arg-type]
                feeling=rng.choice(FEELINGS),
                unstated=rng.choice(UNSTATED),
            )
        )
    text = "Imagined."
    return Scenario(
        id=f"imagined-{rng.getrandbits(64):016x}",
        domain=rng.choice(DOMAINS),
        split="train",
        person=Person(rng.choice(_NAMES), rng.randrange(18, 80), text, text, text),
        empathy_threshold=rng.choice(THRESHOLDS),
        topic=text,
        hope=text,
        dislike=(text,),
        start=tuple(rng.choice((1, 2, 2, 3)) for _ in INDICATORS),
        history=(text,) * 4,
        situation=text,
        goal=text,
        motive=text,
        value=rng.choice(_lexicon().values),
        story=Story(
            trigger=text,
            stages=tuple(stages),  # type: ignore[arg-type]
            strengths=(fresh(lambda: _strength(rng)), fresh(lambda: _strength(rng))),
            steps=(fresh(lambda: _step(rng)), fresh(lambda: _step(rng))),
            outcome=text,
            epilogue=text,
        ),
    )


def _particular(rng: random.Random) -> str:
    words = _lexicon()
    before = f"{rng.choice(words.before)} " if rng.random() < _TWO_WORDS else ""
    return f"the {before}{rng.choice(words.nouns)}"


def _strength(rng: random.Random) -> str:
    return f"{rng.choice(_lexicon().doing)} {rng.choice(_lexicon().after_doing)}"


def _step(rng: random.Random) -> str:
    return f"{rng.choice(_lexicon().step_heads)} {rng.choice(_lexicon().step_tails)}"
