"""What a scenario card must hold: its fields, their values, and the phrases of the scripted user."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

DOMAINS = ("life", "health", "leisure", "values", "relations", "career")
SPLITS = ("train", "validation", "test")
THRESHOLDS = ("low", "medium", "high")
LANGUAGES = ("en", "zh")
INDICATORS = ("C1", "C2", "C3", "A1", "A2", "A3", "P1", "P2", "P3")
PERIODS = ("childhood", "youth", "adulthood", "recent")

# Feelings that the scripted user states, and those it only hints at.
FEELINGS = (
    "tired", "angry", "sad", "anxious", "lonely", "confused", "hurt", "frustrated", "restless", "numb",
)  # fmt: skip
UNSTATED = ("ashamed", "guilty", "unseen", "powerless", "unworthy", "abandoned", "betrayed", "afraid")


def _text(value: Any, check: Callable[[str], str | None] = lambda text: None) -> str | None:
    """What is wrong with a text; `check` returns what is wrong with its content."""
    if not isinstance(value, str) or not value.strip():
        return f"must be text, not {value!r}"
    if re.search("[\ud800-\udfff]", value):
        return "holds half of a surrogate pair, which is no character; write it whole"
    problem = check(value)
    return problem and f"`{value}` {problem}"


def _age(value: Any) -> str | None:
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 120
    return None if fits else f"must be a whole number of years, not {value!r}"


def _level(value: Any) -> str | None:
    fits = not isinstance(value, bool) and value in (0, 1, 2, 3)
    return None if fits else f"must be 0, 1, 2 or 3, not {value!r}"


def _choice(choices: Sequence[str]) -> Callable[[Any], str | None]:
    problem = f"must be one of {', '.join(choices)}"
    return partial(_text, check=lambda text: None if text in choices else problem)


def _phrase(pattern: str, most: int, right: str) -> Callable[[Any], str | None]:
    def check(text: str) -> str | None:
        fits = re.fullmatch(pattern, text) and len(text.split()) <= most
        return None if fits else f"must be {right}"

    return partial(_text, check=check)


def _line(text: str) -> str | None:
    if not re.fullmatch(r"[A-Z][A-Za-z', ]*\.", text):
        return "must be one sentence: a capital, then letters, spaces, commas, apostrophes, and a full stop"
    words = text.rstrip(".").split()
    if len(words) > 9:
        return f"has {len(words)} words; at most 9"
    spoken = {word.strip(",").lower() for word in words}
    for feeling in (*FEELINGS, *UNSTATED):
        if feeling in spoken:
            return f"must not name a feeling (`{feeling}`); feelings are stated in a sentence of their own"
    return None


class _ListOf(NamedTuple):
    """Schema of a list."""

    item: Any
    count: int | None = None  # None: one or more


def _schema(scripted: bool) -> dict[str, Any]:
    """The schema of a card: a mapping, a list, or a function that says what is wrong with a value."""
    stage: dict[str, Any] = {"telling": _text}
    story: dict[str, Any] = {"trigger": _text, "stages": _ListOf(stage, 4)}
    value: dict[str, Any] = {}
    if scripted:
        particular = "`the` and one or two more words, lower case, without punctuation"
        strength = "a gerund phrase of at most 5 words, such as `turning up every morning`"
        step = "a noun phrase of at most 6 words that starts with `a` or `one`"
        noun = "a noun phrase of at most 4 words, lower case, without punctuation"
        stage |= {
            "particulars": _ListOf(_phrase(r"the( [a-z]+){1,2}", 3, particular), 2),
            "line": _ListOf(partial(_text, check=_line), 2),
            "feeling": _choice(FEELINGS),
            "unstated": _choice(UNSTATED),
        }
        story["strengths"] = _ListOf(_phrase(r"[a-z]+ing( [A-Za-z']+)*", 5, strength), 2)
        story["steps"] = _ListOf(_phrase(r"(a|an|one)( [A-Za-z']+)+", 6, step), 2)
        value["value"] = _phrase(r"[a-z']+( [a-z']+)*", 4, noun)
    return {
        "id": _phrase(r"[a-z0-9_-]+", 1, "lower-case letters, digits, `-` and `_` only"),
        "domain": _choice(DOMAINS),
        "split": _choice(SPLITS),
        "person": {"name": _text, "age": _age, "social": _text, "inner": _text, "speech": _text},
        "empathy_threshold": _choice(THRESHOLDS),
        "topic": _text,
        "hope": _text,
        "dislike": _ListOf(_text),
        "history": dict.fromkeys(PERIODS, _text),
        "present": {"situation": _text, "goal": _text, "motive": _text},
        "story": story | {"outcome": _text, "epilogue": _text},
        **value,
        "start": dict.fromkeys(INDICATORS, _level),
        "language": _choice(LANGUAGES),
    }


_SCHEMAS = {scripted: _schema(scripted) for scripted in (False, True)}
_OPTIONAL = ("start", "language")
_PHRASES = ("value", "strengths", "steps", "particulars", "line", "feeling", "unstated")

Note = Callable[[str, str], None]  # takes a field and what is wrong with it


def check_card(card: Any) -> tuple[dict[str, Any], list[str]]:
    """A card's fields in their normal form, and what is wrong with them.

    Returns:
      Fields, of use only if there is no problem: texts with single spaces, lists as tuples, keys in the order
      of the schema. Problems, one sentence each that begins with the field.
    """
    problems: list[str] = []

    def note(field: str, problem: str) -> None:
        problems.append(f"{field}: {problem}")

    scripted = _has_phrases(card)
    fields = _read(card, _SCHEMAS[scripted], "", note) or {}
    start = fields.get("start")
    if start and not any(start.values()):
        note("start", "must lack something; a dialogue cannot start at equilibrium")
    for i, stage in enumerate((fields.get("story") or {}).get("stages") or ()):
        _check_line(stage or {}, f"story.stages[{i}]", note)
    if scripted and not problems:
        _check_phrases(fields["story"], note)
    return fields, problems


def _read(value: Any, schema: Any, field: str, note: Note) -> Any:
    """The value in its normal form; None for a value that does not fit the schema."""
    if isinstance(schema, dict):
        required = [key for key in schema if key not in _OPTIONAL]
        if not isinstance(value, dict):
            note(field or "card", f"must be a mapping with {', '.join(required)}")
            return None
        prefix = f"{field}." if field else ""
        for key in required:
            if key not in value:
                note(f"{prefix}{key}", "is missing")
        for key in value:
            if key not in schema:
                note(f"{prefix}{key}", f"is unknown; known here: {', '.join(schema)}")
        known = {key: inner for key, inner in schema.items() if key in value}
        return {key: _read(value[key], inner, f"{prefix}{key}", note) for key, inner in known.items()}
    if isinstance(schema, _ListOf):
        if not isinstance(value, list) or not value or schema.count not in (None, len(value)):
            texts = f"{schema.count or 'one or more'} texts"
            note(field, f"must be a list of {'exactly four stages' if schema.count == 4 else texts}")
            return None
        return tuple(_read(item, schema.item, f"{field}[{i}]", note) for i, item in enumerate(value))
    if problem := schema(value):
        note(field, problem)
        return None
    return " ".join(value.split()) if isinstance(value, str) else value


def _has_phrases(card: Any) -> bool:
    """Whether a card has any of the scripted user's phrases; then it needs all of them."""
    story = card.get("story") if isinstance(card, dict) else None
    stages = story.get("stages") if isinstance(story, dict) else None
    holders = [card, story, *(stages if isinstance(stages, list) else ())]
    return any(isinstance(holder, dict) and any(key in holder for key in _PHRASES) for holder in holders)


def _check_line(stage: Mapping[str, Any], field: str, note: Note) -> None:
    """The i-th line of a stage must contain its i-th particular."""
    pairs = zip(stage.get("particulars") or (), stage.get("line") or (), strict=False)
    for i, (particular, sentence) in enumerate(pairs):
        if particular and sentence and f" {particular} " not in re.sub(r"[.,]", " ", f" {sentence} "):
            problem = f"`{sentence}` must hold `{particular}` word for word, and not as its first words"
            note(f"{field}.line[{i}]", problem)


def _check_phrases(story: Mapping[str, Any], note: Note) -> None:
    """A phrase must name one thing: no phrase of a card may contain another one."""
    lists = {f"stages[{i}].particulars": stage["particulars"] for i, stage in enumerate(story["stages"])}
    lists |= {name: story[name] for name in ("strengths", "steps")}
    phrases = [(f"story.{name}[{k}]", text) for name, texts in lists.items() for k, text in enumerate(texts)]
    for i, (field, phrase) in enumerate(phrases):
        for other_field, other in phrases[:i]:
            one, two = f" {phrase.lower()} ", f" {other.lower()} "
            if one in two or two in one:
                note(field, f"`{phrase}` overlaps with {other_field} `{other}`; phrases must be distinct")
    lines = [line for stage in story["stages"] for line in stage["line"]]
    if len(set(lines)) != len(lines):
        note("story.stages", "two stages share a line; lines must be distinct")
