"""The language of replies: one table of constructions that both generates and recognises.

A sentence counts as an act only if the *whole* sentence fits a construction; anything else is measured for
coherence alone. So a bag of cue words is never an act.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from mapo_jax.environment.scenario import FEELINGS, UNSTATED, Scenario, load_scenarios
from mapo_jax.environment.scripted import lexicon

# Acts that can help, each in its place.
HELPFUL = ("reflect_situation", "name_feeling", "name_unstated", "affirm_strength", "reframe", "offer_step")
# Acts that neither help nor harm by themselves.
NEUTRAL = ("ask", "repair", "presence")
# Acts that harm wherever they stand.
HARMFUL = ("template", "advise", "lecture", "dismiss", "blame", "praise", "farewell")
KINDS = HELPFUL + NEUTRAL + HARMFUL

# {p} particular, {f} feeling (stated or not), {s} strength, {v} value, {t} step.
CONSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "reflect_situation": (
        "You have been carrying {p} all alone.",
        "You keep coming back to {p}.",
        "So much of this turns on {p}.",
        "It is hard to get past {p}.",
        "You live with {p} every day.",
        "I hear how much {p} took from you.",
        "Nobody asked what {p} did to you.",
    ),
    "name_feeling": (
        "You feel {f}.",
        "You sound {f}.",
        "No wonder you feel {f}.",
        "It makes sense that you feel {f}.",
        "Anyone would be {f} after that.",
        "You are {f}, and that is real.",
        "I can hear that you are {f}.",
    ),
    "name_unstated": (
        "Underneath it you may feel {f}.",
        "Maybe you also feel {f}.",
        "Part of you may be {f}.",
        "I wonder if you feel {f} deep down.",
        "It could be that you felt {f}.",
        "Perhaps you have been {f} all along.",
        "Could it be that you feel {f}?",
    ),
    "affirm_strength": (
        "You have been {s}, and that counts.",
        "You kept {s} through all of it.",
        "Even so, {s} takes real courage.",
        "Not everyone would go on {s}.",
        "It says a lot that you are {s}.",
        "You went on {s} when it was hard.",
        "I notice that you never stopped {s}.",
    ),
    "reframe": (
        "It weighs so much because {v} matters to you.",
        "You care about {v}, so {p} could not leave you cold.",
        "Maybe this is about {v} more than about {p}.",
        "What hurts here is how much {v} means to you.",
        "Perhaps {p} touched {v}, and that is why it stays.",
        "You did not fail, you held on to {v}.",
        "It was {v} that {p} put at stake.",
    ),
    "offer_step": (
        "Would {t} be something for you?",
        "You could try {t}, if it feels right.",
        "Maybe {t} is enough for now, you decide.",
        "If you like, {t} could be a start.",
        "What would {t} be like for you?",
        "Only if you want, there is {t}.",
        "You can choose {t} or leave it.",
    ),
    "ask": (
        "What is it about {p} that stays with you?",
        "How did {p} change things for you?",
        "Can you tell me more about {p}?",
        "What goes through you with {p}?",
        "What did {p} mean to you?",
        "What comes up when you think of {p}?",
    ),
    "repair": (
        "I moved too fast there.",
        "I am sorry, I got that wrong.",
        "I did not listen well just now.",
        "That was my mistake, not yours.",
        "Let me take that back.",
        "I missed what you were saying.",
    ),
    "presence": (
        "I am here.",
        "Take your time.",
        "I am listening.",
        "We have time.",
        "Thank you for telling me.",
    ),
    "template": (
        "I understand how you feel.",
        "That must be hard.",
        "I am sorry to hear that.",
        "Your feelings are valid.",
        "You are not alone in this.",
    ),
    "advise": (
        "You should try {t}.",
        "My advice is {t}.",
        "Just go for {t} now.",
        "You should stop thinking about {p}.",
        "You need to forget {p}.",
    ),
    "lecture": (
        "Let me explain how this works.",
        "There are three things you have to know.",
        "Most people in your place make the same mistake.",
        "Studies show that people like you need rest.",
    ),
    "dismiss": (
        "It is not that bad.",
        "Others have it much worse.",
        "You are making too much of {p}.",
        "There is no need to feel {f}.",
    ),
    "blame": (
        "You brought this on yourself.",
        "You let {p} happen.",
        "You should have known better.",
        "It is wrong to feel {f}.",
    ),
    "praise": (
        "You are doing great.",
        "What a wonderful person you are.",
        "You are so strong.",
        "You are right about everything.",
        "I agree with all of it.",
    ),
    "farewell": (
        "Goodbye and take care.",
        "I have to go now.",
        "Good luck with everything.",
        "Talk to you some other time.",
    ),
}

_WORDS = "[a-z']+"
_SLOT_PATTERNS = {
    "p": rf"the(?: {_WORDS}){{1,2}}",
    "f": "|".join((*FEELINGS, *UNSTATED)),
    "s": rf"[a-z]+ing(?: {_WORDS}){{0,4}}",
    "v": rf"{_WORDS}(?: {_WORDS}){{0,3}}",
    "t": rf"(?:an?|one)(?: {_WORDS}){{1,5}}",
}
_SLOT = re.compile(r"\{([pfsvt])\}")
START, END = "<s>", "</s>"


class Sentence(NamedTuple):
    """One sentence of a reply as the judge reads it."""

    text: str  # as written
    words: str  # lower case, single spaces, no punctuation
    kind: str | None  # one of KINDS, or None: no construction fits
    frame: str | None  # the construction
    slots: tuple[tuple[str, str], ...]  # (slot letter, filler) in order


class Reading(NamedTuple):
    """A reply, split and recognised; independent of the dialogue."""

    sentences: tuple[Sentence, ...]
    word_count: int
    clean: bool  # plain letters and punctuation, ordinary case
    shouted: bool  # words in capitals


def realise(frame: str, slots: Mapping[str, str]) -> str:
    """The sentence that a construction makes with these fillers (by slot letter)."""
    return _SLOT.sub(lambda match: slots[match.group(1)], frame)


def slots_of(frame: str) -> tuple[str, ...]:
    """Slot letters of a construction, in order."""
    return tuple(_SLOT.findall(frame))


@lru_cache(maxsize=65536)
def bare(text: str) -> str:
    """Lower case, single spaces, no punctuation: the form in which sentences are compared."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def _pattern(frame: str) -> re.Pattern[str]:
    seen: set[str] = set()
    parts = []
    for i, part in enumerate(_SLOT.split(frame)):
        if i % 2 == 0:
            words = bare(part)
            parts += [re.escape(words)] if words else []
        else:
            assert part not in seen, f"a construction uses a slot once: {frame}"
            seen.add(part)
            parts.append(f"(?P<{part}>{_SLOT_PATTERNS[part]})")
    return re.compile(" ".join(parts))


@lru_cache(maxsize=1)
def _by_first_word() -> dict[str, list[tuple[str, str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, str, re.Pattern[str]]]] = {}
    for kind, frames in CONSTRUCTIONS.items():
        for frame in frames:
            table.setdefault(bare(frame).split()[0], []).append((kind, frame, _pattern(frame)))
    return table


@lru_cache(maxsize=65536)
def recognise(words: str) -> tuple[str | None, str | None, tuple[tuple[str, str], ...]]:
    """(kind, construction, fillers) of one sentence in bare form; (None, None, ()) if none fits.

    Whether a feeling is a stated or an unstated one decides between name_feeling and name_unstated.
    """
    for kind, frame, pattern in _by_first_word().get(words.partition(" ")[0], ()):
        match = pattern.fullmatch(words)
        if match is None:
            continue
        slots = tuple((letter, match[letter]) for letter in slots_of(frame))
        if kind in ("name_feeling", "name_unstated"):
            kind = "name_feeling" if match["f"] in FEELINGS else "name_unstated"
        return kind, frame, slots
    return None, None, ()


_SENTENCE = re.compile(r"[^.!?]+(?:[.!?]|$)")
_CLEAN = re.compile(r"[A-Za-z',.!? ]*")
_ORDINARY_WORD = re.compile(r"[A-Z]?[a-z']*|I('[a-z]+)?")
_LOOSE_PUNCTUATION = re.compile(r"[.!?,] ?[.!?,]|^ ?[.!?,]|[ ][.!?,]")


@lru_cache(maxsize=65536)
def read(reply: str) -> Reading:
    """Splits a reply into sentences and recognises each."""
    reply = " ".join(reply.replace("\u2019", "'").split())
    sentences = []
    for match in _SENTENCE.finditer(reply):
        text = match.group().strip()
        words = bare(text)
        sentences.append(Sentence(text, words, *recognise(words)))
    tokens = re.findall(r"[A-Za-z']+", reply)
    shouted = sum(len(token) > 1 and token.isupper() for token in tokens) > 0
    clean = bool(_CLEAN.fullmatch(reply)) and not _LOOSE_PUNCTUATION.search(reply)
    clean = clean and (shouted or all(_ORDINARY_WORD.fullmatch(token) for token in tokens))
    return Reading(tuple(sentences), sum(len(s.words.split()) for s in sentences), clean, shouted)


def _chain(words: Iterable[str]) -> set[tuple[str, str]]:
    return set(itertools.pairwise(words))


def _phrases(scenario: Scenario) -> dict[str, list[str]]:
    """The card's phrases in bare form, by slot letter."""
    story = scenario.story
    return {
        "p": [bare(p) for stage in story.stages for p in stage.particulars],
        "s": [bare(s) for s in story.strengths],
        "t": [bare(t) for t in story.steps],
        "v": [bare(scenario.value)],
        "f": [*FEELINGS, *UNSTATED],
    }


def _frames() -> list[str]:
    frames = [frame for frames in CONSTRUCTIONS.values() for frame in frames]
    for pool in (
        lexicon.PARTICULAR,
        lexicon.MEMORY,
        lexicon.ASIDE,
        lexicon.FEELING,
        lexicon.VALUE,
        lexicon.STRENGTH,
        lexicon.STEP,
        lexicon.CURT,
        lexicon.CURT_PARTICULAR,
        lexicon.TURNING,
        lexicon.IDLE,
        *lexicon.HINTS.values(),
        *lexicon.REACTIONS.values(),
    ):
        frames += pool
    return frames


@lru_cache(maxsize=1)
def _frame_chains() -> tuple[frozenset[tuple[str, str]], dict[str, set[str]], dict[str, set[str]]]:
    """Word pairs inside the frames; the words that stand before and after each slot."""
    pairs: set[tuple[str, str]] = set()
    before: dict[str, set[str]] = {letter: set() for letter in _SLOT_PATTERNS}
    after: dict[str, set[str]] = {letter: set() for letter in _SLOT_PATTERNS}
    for frame in _frames():
        tokens = [START]
        for i, part in enumerate(_SLOT.split(frame)):
            tokens += [f"{{{part}}}"] if i % 2 else bare(part).split()
        tokens.append(END)
        for left, right in _chain(tokens):
            if left[0] == "{":
                after[left[1]].add(right)
            elif right[0] == "{":
                before[right[1]].add(left)
            else:
                pairs.add((left, right))
    return frozenset(pairs), before, after


def _card_pairs(scenario: Scenario) -> set[tuple[str, str]]:
    _, before, after = _frame_chains()
    pairs: set[tuple[str, str]] = set()
    for letter, phrases in _phrases(scenario).items():
        for phrase in phrases:
            words = phrase.split()
            pairs |= _chain(words)
            pairs |= {(left, words[0]) for left in before[letter]}
            pairs |= {(words[-1], right) for right in after[letter]}
    for stage in scenario.story.stages:
        for line in stage.line:
            pairs |= _chain([START, *bare(line).split(), END])
    return pairs


@lru_cache(maxsize=1)
def world_pairs() -> frozenset[tuple[str, str]]:
    pairs = set(_frame_chains()[0])
    for scenario in load_scenarios():
        pairs |= _card_pairs(scenario)
    return frozenset(pairs)


@lru_cache(maxsize=4096)
def _own_pairs(scenario: Scenario) -> frozenset[tuple[str, str]]:
    """What the card adds to the world's word pairs (nothing for an embedded card)."""
    return frozenset(_card_pairs(scenario) - world_pairs())


def coherent(scenario: Scenario, words: str) -> bool:
    """Whether every pair of neighbouring words occurs somewhere in the world's texts or on this card.

    The start and the end of the sentence count as words, so a sentence that breaks off is not coherent.

    Args:
      scenario: the card of the dialogue.
      words: a sentence in bare form.
    """
    world, own = world_pairs(), _own_pairs(scenario)
    return all(pair in world or pair in own for pair in itertools.pairwise((START, *words.split(), END)))
