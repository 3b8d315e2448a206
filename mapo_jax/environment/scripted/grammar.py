"""The language of replies: one table of constructions generates sentences and recognises them.

A sentence counts as an act only if the *whole* sentence fits a construction. Any other sentence is only
checked for coherence, so a list of cue words is never an act.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from mapo_jax.environment.card_schema import FEELINGS, UNSTATED
from mapo_jax.environment.scenario import Scenario, load_scenarios
from mapo_jax.environment.scripted.lexicon import CONSTRUCTIONS, HINTS, MESSAGES, REACTIONS, WEARY

# Acts that help when they fit the user's need.
HELPFUL = ("reflect_situation", "name_feeling", "name_unstated", "affirm_strength", "reframe", "offer_step")
# Acts that neither help nor harm in themselves.
NEUTRAL = ("ask", "repair", "presence")
# Acts that always harm.
HARMFUL = ("template", "advise", "lecture", "dismiss", "blame", "praise", "farewell")
KINDS = HELPFUL + NEUTRAL + HARMFUL

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
Pair = tuple[str, str]


class Sentence(NamedTuple):
    """One parsed sentence of a reply."""

    text: str  # as written
    words: str  # lower case, single spaces, no punctuation
    kind: str | None  # one of KINDS; None if no construction fits
    frame: str | None  # the construction
    slots: tuple[tuple[str, str], ...]  # (slot letter, filler) in order


class Reading(NamedTuple):
    """A parsed reply; independent of the dialogue."""

    sentences: tuple[Sentence, ...]
    word_count: int
    clean: bool  # plain letters and punctuation, ordinary case
    shouted: bool  # words in capitals


def realise(frame: str, slots: Mapping[str, str]) -> str:
    """Fills the slots of a construction; `slots` holds the fillers by slot letter."""
    return _SLOT.sub(lambda match: slots[match.group(1)], frame)


def slots_of(frame: str) -> tuple[str, ...]:
    """Slot letters of a construction, in order."""
    return tuple(_SLOT.findall(frame))


@lru_cache(maxsize=65536)
def bare(text: str) -> str:
    """Lower case, single spaces, no punctuation: the form in which sentences are compared."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def _tokens(frame: str) -> list[str]:
    """Words of a construction in bare form; a slot is one token, such as {p}."""
    return re.findall(r"\{[pfsvt]\}|[a-z0-9']+", frame.lower())


def _pattern(frame: str) -> re.Pattern[str]:
    """A named group for each slot. A slot that occurs twice raises re.error."""
    parts = (f"(?P<{t[1]}>{_SLOT_PATTERNS[t[1]]})" if t[0] == "{" else re.escape(t) for t in _tokens(frame))
    return re.compile(" ".join(parts))


@lru_cache(maxsize=1)
def _by_first_word() -> dict[str, list[tuple[str, str, re.Pattern[str]]]]:
    table = defaultdict(list)
    for kind, frames in CONSTRUCTIONS.items():
        for frame in frames:
            table[_tokens(frame)[0]].append((kind, frame, _pattern(frame)))
    return dict(table)


@lru_cache(maxsize=65536)
def recognise(words: str) -> tuple[str | None, str | None, tuple[tuple[str, str], ...]]:
    """(kind, construction, fillers) of one sentence in bare form; (None, None, ()) if no construction fits.

    A feeling out of FEELINGS makes it name_feeling, one out of UNSTATED name_unstated.
    """
    for kind, frame, pattern in _by_first_word().get(words.partition(" ")[0], ()):
        if match := pattern.fullmatch(words):
            if kind in ("name_feeling", "name_unstated"):
                kind = "name_feeling" if match["f"] in FEELINGS else "name_unstated"
            return kind, frame, tuple((letter, match[letter]) for letter in slots_of(frame))
    return None, None, ()


_SENTENCE = re.compile(r"[^.!?]+(?:[.!?]|$)")
_CLEAN = re.compile(r"[A-Za-z',.!? ]*")
_ORDINARY_WORD = re.compile(r"[A-Z]?[a-z']*|I('[a-z]+)?")
_LOOSE_PUNCTUATION = re.compile(r"[.!?,] ?[.!?,]|^ ?[.!?,]|[ ][.!?,]")


@lru_cache(maxsize=65536)
def read(reply: str) -> Reading:
    """Splits a reply into sentences and recognises each of them."""
    reply = " ".join(reply.replace("\u2019", "'").split())
    texts = [match.strip() for match in _SENTENCE.findall(reply)]
    sentences = tuple(Sentence(text, bare(text), *recognise(bare(text))) for text in texts)
    tokens = re.findall(r"[A-Za-z']+", reply)
    shouted = any(len(token) > 1 and token.isupper() for token in tokens)
    clean = bool(_CLEAN.fullmatch(reply)) and not _LOOSE_PUNCTUATION.search(reply)
    clean = clean and (shouted or all(_ORDINARY_WORD.fullmatch(token) for token in tokens))
    return Reading(sentences, sum(len(s.words.split()) for s in sentences), clean, shouted)


def _phrases(scenario: Scenario) -> dict[str, list[str]]:
    """The card's phrases in bare form, by slot letter."""
    story = scenario.story
    return {
        "p": [bare(p) for stage in story.stages for p in stage.particulars],
        "s": [bare(s) for s in story.strengths],
        "t": [bare(t) for t in story.steps],
        "v": [bare(scenario.value)],
    }


@lru_cache(maxsize=1)
def _frame_pairs() -> tuple[set[Pair], dict[str, set[str]], dict[str, set[str]]]:
    """Pairs of neighbouring words in all constructions; the words before and after each slot."""
    pairs: set[Pair] = set()
    before: dict[str, set[str]] = {letter: set() for letter in _SLOT_PATTERNS}
    after: dict[str, set[str]] = {letter: set() for letter in _SLOT_PATTERNS}
    for pools in (CONSTRUCTIONS, MESSAGES, HINTS, WEARY, REACTIONS):
        for frame in itertools.chain(*pools.values()):
            for left, right in itertools.pairwise([START, *_tokens(frame), END]):
                if left[0] == "{":
                    after[left[1]].add(right)
                elif right[0] == "{":
                    before[right[1]].add(left)
                else:
                    pairs.add((left, right))
    return pairs, before, after


def _slot_pairs(phrases: Mapping[str, Iterable[str]]) -> set[Pair]:
    """Pairs of neighbouring words in phrases, and in constructions with them; `phrases` by slot letter."""
    _, before, after = _frame_pairs()
    pairs: set[Pair] = set()
    for letter, candidates in phrases.items():
        for phrase in candidates:
            words = phrase.split()
            pairs.update(itertools.pairwise(words))
            pairs |= {(left, words[0]) for left in before[letter]}
            pairs |= {(words[-1], right) for right in after[letter]}
    return pairs


def _card_pairs(scenario: Scenario) -> set[Pair]:
    """Pairs of neighbouring words in the card's phrases and lines, and in constructions with its phrases."""
    pairs = _slot_pairs(_phrases(scenario))
    for stage in scenario.story.stages:
        for line in stage.line:
            pairs.update(itertools.pairwise([START, *bare(line).split(), END]))
    return pairs


@lru_cache(maxsize=1)
def world_pairs() -> frozenset[Pair]:
    """Pairs of neighbouring words in all constructions, with all feelings and the embedded cards."""
    feelings = _slot_pairs({"f": [*FEELINGS, *UNSTATED]})
    return frozenset(_frame_pairs()[0].union(feelings, *map(_card_pairs, load_scenarios())))


@lru_cache(maxsize=4096)
def _added_pairs(scenario: Scenario) -> frozenset[Pair]:
    """Pairs of the card that are not in `world_pairs` (none for an embedded card)."""
    return frozenset(_card_pairs(scenario) - world_pairs())


def coherent(scenario: Scenario, words: str) -> bool:
    """Whether every pair of neighbouring words occurs in the world's sentences or on this card.

    The start and the end of the sentence count as words, so an unfinished sentence is not coherent.

    Args:
      scenario: the card of the dialogue.
      words: a sentence in bare form.
    """
    world, added = world_pairs(), _added_pairs(scenario)
    return all(pair in world or pair in added for pair in itertools.pairwise((START, *words.split(), END)))
