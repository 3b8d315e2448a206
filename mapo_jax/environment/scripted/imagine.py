"""Imagined cards: made of a lexicon of ordinary words, so that synthetic dialogues show thousands of phrases.

A model that has only read the phrases of 64 cards learns these by heart; one that has read thousands learns
to take them from the user's message.
"""

from __future__ import annotations

import random

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
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NOUNS = _words(
    """
    letter kitchen rota garden meeting bus phone office window uncle choir piano bench station teacher debt
    winter doctor ward house door team manager contract coat car exam school playground river bridge dog
    street neighbour sister brother father mother wedding funeral concert match club coach ticket train map
    camera album photo room bed desk chair report deadline budget invoice shop market bakery oven recipe
    table guest party cake song stage rehearsal script book library course grade form clinic scan needle
    knee ankle heart pill diet scale mirror run race bike helmet tent trail lake boat harbour storm roof
    cellar stairs lease landlord boiler key lock fence gate field farm barn horse harvest tractor orchard
    church council vote speech promise secret rumour insult apology silence visit call message photograph
    rent wage shift uniform badge tool workshop machine engine noise smoke fire alarm ladder paint wall
    """
)
_ADJECTIVES = _words(
    """
    old new last first empty broken late early quiet loud small big long short cold warm dark bright heavy
    light closed open lost missing second third final unpaid unsent hidden shared rented borrowed yellow
    blue green red grey white black wooden narrow wide dusty silent sudden weekly monthly annual
    morning evening night summer winter local public private family
    """
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
_GERUNDS = _words(
    """
    keeping mending counting carrying cleaning writing watching sharing checking holding painting fixing
    feeding reading learning teaching calling visiting cooking building saving planning opening washing
    guarding serving sorting drawing growing driving
    """
)
_TAILS = (
    "each morning",
    "every night",
    "for years",
    "without help",
    "after work",
    "on Sundays",
    "all winter",
    "with care",
    "every week",
    "in secret",
)
_STEP_NOUNS = _words(
    """
    walk talk letter call visit lunch evening morning hour list note question photo song swim plan pause
    trip coffee lesson weekend message rest drive
    """
)
_STEP_ADJECTIVES = _words("short small quiet long free slow simple friendly careful brief")
_NAMES = _words(
    """
    Mara Jonas Elif Tom Ana Viktor Lena Omar Ruth Pavel Nina Karl Ines Hugo Sara Milan Dora Felix Aisha Ben
    Clara Anton Yara Leo Greta Samir
    """
)
_VALUES = (
    "honesty",
    "being fair",
    "loyalty",
    "kindness",
    "freedom",
    "good craft",
    "keeping faith",
    "patience",
    "respect",
    "standing by people",
    "being useful",
    "your word",
    "courage",
    "family",
    "order",
    "independence",
    "doing it properly",
    "trust",
    "hard work",
    "being there",
    "a good name",
    "modesty",
    "truth",
    "care",
    "equal chances",
    "learning",
    "friendship",
    "finishing things",
    "a clean conscience",
    "generosity",
    "self respect",
    "being open",
    "keeping peace",
    "curiosity",
    "tradition",
    "giving back",
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
        value=rng.choice(_VALUES),
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
    draw = rng.random()
    if draw < 0.1:
        return f"the {rng.choice(_NOUNS)}"
    if draw < 0.75:
        return f"the {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
    return f"the {rng.choice(_NOUNS)} {rng.choice(_NOUNS)}"


def _strength(rng: random.Random) -> str:
    words = f"{rng.choice(_GERUNDS)} the {rng.choice(_NOUNS)}"
    return f"{words} {rng.choice(_TAILS)}" if rng.random() < 0.5 else words


def _step(rng: random.Random) -> str:
    head = f"one {rng.choice(_STEP_NOUNS)}"
    if rng.random() < 0.6:
        head = f"a {rng.choice(_STEP_ADJECTIVES)} {rng.choice(_STEP_NOUNS)}"
    tail = rng.choice(
        (
            f"with {rng.choice(_NAMES)}",
            f"without the {rng.choice(_NOUNS)}",
            f"about the {rng.choice(_NOUNS)}",
            f"near the {rng.choice(_NOUNS)}",
            f"for {rng.choice(_NAMES)}",
        )
    )
    return f"{head} {tail}"
