"""Imagined cards: the words of the real ones in new phrases, so that synthetic dialogues show thousands.

A model trained on the phrases of 64 cards alone learns them by heart; one trained on thousands learns to copy
them from the user's message. The words are those of all cards, so that a small model knows every word of its
world; the phrases of validation and test cards occur by chance only.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from mapo_jax.environment.card_schema import DOMAINS, FEELINGS, INDICATORS, THRESHOLDS, UNSTATED
from mapo_jax.environment.scenario import Person, Scenario, Stage, Story, load_scenarios
from mapo_jax.environment.scripted.lexicon import IMAGINED

_TWO_WORDS = 0.8  # share of particulars of two words
_TEXT = "Imagined."  # in the place of all prose


@dataclass(frozen=True)
class _Words:
    """Parts of the cards' phrases, for new combinations."""

    adjectives: tuple[str, ...]  # the words of particulars that stand before another
    nouns: tuple[str, ...]  # their last words
    gerunds: tuple[str, ...]  # first words of strengths
    gerund_objects: tuple[str, ...]  # the words after them
    step_heads: tuple[str, ...]  # first two words of steps
    step_tails: tuple[str, ...]  # the words after them
    values: tuple[str, ...]


@lru_cache(maxsize=1)
def _words() -> _Words:
    cards = load_scenarios()
    particulars = [p.split()[1:] for card in cards for stage in card.story.stages for p in stage.particulars]
    strengths = [strength.split(" ", 1) for card in cards for strength in card.story.strengths]
    steps = [step.split(" ", 2) for card in cards for step in card.story.steps]
    parts = (
        [words[0] for words in particulars if len(words) > 1],
        [words[-1] for words in particulars],
        [words[0] for words in strengths],
        [words[1] for words in strengths if len(words) > 1],
        [" ".join(words[:2]) for words in steps],
        [words[2] for words in steps if len(words) > 2],
        [card.value for card in cards],
    )
    return _Words(*(tuple(sorted(set(texts))) for texts in parts))


def imagined_scenario(rng: random.Random) -> Scenario:
    """A made-up card; everything about it follows from `rng`."""
    words = _words()
    taken: list[str] = []

    def particular() -> str:
        adjective = f"{rng.choice(words.adjectives)} " if rng.random() < _TWO_WORDS else ""
        return f"the {adjective}{rng.choice(words.nouns)}"

    def strength() -> str:
        return f"{rng.choice(words.gerunds)} {rng.choice(words.gerund_objects)}"

    def step() -> str:
        return f"{rng.choice(words.step_heads)} {rng.choice(words.step_tails)}"

    def two(make: Callable[[], str]) -> tuple[str, ...]:
        """Two phrases; no phrase of the card contains another one."""
        phrases: list[str] = []
        while len(phrases) < 2:
            phrase = make()
            if not any(f" {phrase} " in f" {other} " or f" {other} " in f" {phrase} " for other in taken):
                taken.append(phrase)
                phrases.append(phrase)
        return tuple(phrases)

    lines = rng.sample(IMAGINED["line"], 8)

    def stage(first: str, second: str) -> Stage:
        particulars = two(particular)
        spoken = zip((first, second), particulars, strict=True)
        lines = tuple(line.format(p=p) for line, p in spoken)
        return Stage(_TEXT, particulars, lines, rng.choice(FEELINGS), rng.choice(UNSTATED))

    stages = tuple(map(stage, lines[::2], lines[1::2]))
    return Scenario(
        id=f"imagined-{rng.getrandbits(64):016x}",
        domain=rng.choice(DOMAINS),
        split="train",
        person=Person(rng.choice(IMAGINED["name"]), rng.randrange(18, 80), *(_TEXT,) * 3),
        empathy_threshold=rng.choice(THRESHOLDS),
        topic=_TEXT,
        hope=_TEXT,
        dislike=(_TEXT,),
        start=tuple(rng.choice((1, 2, 2, 3)) for _ in INDICATORS),
        history=(_TEXT,) * 4,
        situation=_TEXT,
        goal=_TEXT,
        motive=_TEXT,
        value=rng.choice(words.values),
        story=Story(_TEXT, stages, strengths=two(strength), steps=two(step), outcome=_TEXT, epilogue=_TEXT),
    )
