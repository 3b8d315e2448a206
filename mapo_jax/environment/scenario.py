"""Scenario cards: who talks to the policy, what happened to them, and where they start.

A card is a mapping; a YAML file holds a list of them, a JSONL file one on each line (METHOD of the EMPA
benchmark: person, empathy threshold, topic, needs, life history, present, and a story in four stages). The
card's prose is for users played by a language model; `value`, `strengths`, `steps` and each stage's
`particulars`, `line`, `feeling` and `unstated` are phrases that the scripted user says word for word: a card
has all of them, or none and is for the live world alone. `language` is en if it is not given; a card without
`start` can be read but not talked to, until a judge has estimated it (`python -m mapo_jax.rate`).

`python -m mapo_jax.environment.scenario check PATH` reads a file or a folder and reports every problem.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from mapo_jax.commands import printable
from mapo_jax.errors import UserError

DOMAINS = ("life", "health", "leisure", "values", "relations", "career")
SPLITS = ("train", "validation", "test")
THRESHOLDS = ("low", "medium", "high")
LANGUAGES = ("en", "zh")
AXES = ("C", "A", "P")
INDICATORS = ("C1", "C2", "C3", "A1", "A2", "A3", "P1", "P2", "P3")
PERIODS = ("childhood", "youth", "adulthood", "recent")

# Feelings that the scripted user says aloud, and those it only hints at.
FEELINGS = (
    "tired",
    "angry",
    "sad",
    "anxious",
    "lonely",
    "confused",
    "hurt",
    "frustrated",
    "restless",
    "numb",
)
UNSTATED = ("ashamed", "guilty", "unseen", "powerless", "unworthy", "abandoned", "betrayed", "afraid")

# Points per level (0..3): standard, priority and core indicators.
_STANDARD, _PRIORITY, _CORE = -2, -3, -4
POINTS_PER_LEVEL = {
    "C1": _STANDARD,
    "C2": _STANDARD,
    "C3": _PRIORITY,
    "A1": _STANDARD,
    "A2": _CORE,
    "A3": _PRIORITY,
    "P1": _STANDARD,
    "P2": _CORE,
    "P3": _PRIORITY,
}

# The same safe loader, ten times as fast where PyYAML was built with libyaml.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_EMBEDDED = Path(__file__).parent / "scenarios"
_SUFFIXES = (".yaml", ".yml", ".jsonl")


@dataclass(frozen=True)
class Person:
    """Who the user is."""

    name: str
    age: int
    social: str  # how others know them
    inner: str  # what goes on inside
    speech: str  # how they talk


@dataclass(frozen=True)
class Stage:
    """One of the four steps in which the story comes out."""

    telling: str  # what this stage reveals, in prose
    particulars: tuple[str, ...] = ()  # two noun phrases that name the situation
    line: tuple[str, ...] = ()  # two sentences of the scripted user; the i-th holds the i-th particular
    feeling: str = ""  # stated feeling, one of FEELINGS
    unstated: str = ""  # feeling behind it, one of UNSTATED; never said by the scripted user


@dataclass(frozen=True)
class Story:
    """What happened, in the order in which it is told."""

    trigger: str
    stages: tuple[Stage, Stage, Stage, Stage]
    strengths: tuple[str, ...]  # two gerund phrases: what the person did; empty without phrases
    steps: tuple[str, ...]  # two noun phrases: what they might do next
    outcome: str
    epilogue: str


@dataclass(frozen=True)
class Scenario:
    """One card."""

    id: str
    domain: str
    split: str
    person: Person
    empathy_threshold: str
    topic: str
    hope: str
    dislike: tuple[str, ...]
    start: tuple[int, ...]  # level 0..3 of each of INDICATORS; empty: not estimated yet
    history: tuple[str, str, str, str]  # one sentence for each of PERIODS
    situation: str
    goal: str
    motive: str
    value: str  # what matters to this person, as in "being fair matters to you"
    story: Story
    language: str = "en"  # of the card, and so of the prompts: one of LANGUAGES

    def __hash__(self) -> int:
        """By id: cards are keys of caches, and equal cards have equal ids."""
        return hash(self.id)

    @property
    def scripted(self) -> bool:
        """Whether it has the phrases that the scripted user needs."""
        return bool(self.value)

    @cached_property
    def start_position(self) -> tuple[float, float, float]:
        """(C, A, P) at the start, in points (all <= 0)."""
        return start_position(self.start)

    @cached_property
    def strongest_axis(self) -> str:
        """The axis with the largest deficit; C before A before P when equal."""
        deficits = dict(zip(AXES, self.start_position, strict=True))
        return min(AXES, key=lambda axis: deficits[axis])


def start_position(levels: Mapping[str, int] | Sequence[int]) -> tuple[float, float, float]:
    """Points of the start state from its nine levels (EMPA's scoring of the start state).

    Args:
      levels: level 0..3 of each indicator, as a mapping by name or in the order of INDICATORS.

    Returns:
      (C, A, P); C in [-21, 0], A and P in [-27, 0].

    Raises:
      UserError: a missing indicator or a level outside 0..3.
    """
    if not isinstance(levels, Mapping):
        if len(levels) != len(INDICATORS):
            raise UserError(f"a start state has {len(INDICATORS)} levels, not {len(levels)}")
        levels = dict(zip(INDICATORS, levels, strict=True))
    points = dict.fromkeys(AXES, 0.0)
    for name in INDICATORS:
        level = levels.get(name)
        if isinstance(level, bool) or level not in (0, 1, 2, 3):
            raise UserError(f"start level {name} is {level!r}; it must be 0, 1, 2 or 3")
        points[name[0]] += POINTS_PER_LEVEL[name] * level
    return points["C"], points["A"], points["P"]


def load_scenarios(
    folder: str | Path | None = None, split: str | None = None, *, scripted: bool = True
) -> list[Scenario]:
    """Reads every card of a folder (or of one file), strictly.

    Args:
      folder: folder with `*.yaml` and `*.jsonl` files, or one file; None for the embedded cards.
      split: keep the cards of this split only.
      scripted: refuse cards without the scripted user's phrases.

    Returns:
      Scenarios in the order of file name and place in the file.

    Raises:
      UserError: no cards, an unreadable file, or a broken card; names the file, the card and the field.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"split `{split}` does not exist; choose one of {', '.join(SPLITS)}")
    scenarios, problems = _embedded_cards() if folder is None else read_cards(Path(folder))
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)
    kept = [scenario for scenario in scenarios if split is None or scenario.split == split]
    for scenario in kept:
        if scripted and not scenario.scripted:
            raise UserError(
                f"card {scenario.id} has no phrases for the scripted user (value, strengths, line, ...); add "
                "them, or use environment.family=live"
            )
        if not scenario.start:
            raise UserError(
                f"card {scenario.id} has no start; give it one, or let a judge estimate it: "
                f"python -m mapo_jax.rate {folder} --output FILE --config CONFIG"
            )
    if not kept:
        raise UserError(f"no scenario cards of split `{split}` in {folder or _EMBEDDED}")
    return kept


@lru_cache(maxsize=1)
def _embedded_cards() -> tuple[list[Scenario], list[str]]:
    return read_cards(_EMBEDDED)


def read_cards(path: Path) -> tuple[list[Scenario], list[str]]:
    """Reads what can be read; returns the sound cards and one sentence for each problem."""
    files = sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        return [], [f"no scenario cards (*.yaml, *.jsonl) in {path}"]
    scenarios: list[Scenario] = []
    problems: list[str] = []
    owner: dict[str, str] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            cards = _lines(text, file, problems) if file.suffix == ".jsonl" else yaml.load(text, _Loader)
        except OSError as error:
            problems.append(f"cannot read the cards {file}: {error.strerror}")
            continue
        except UnicodeDecodeError as error:
            problems.append(f"{file} is not valid UTF-8: {error}")
            continue
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # also a date or a number that is none
            problems.append(f"{file} is not valid YAML: {' '.join(str(error).split())}")
            continue
        if not isinstance(cards, list) or not cards:
            problems.append(f"{file} must hold a list of cards")
            continue
        for number, card in enumerate(cards):
            name = card.get("id") if isinstance(card, dict) else None
            where = f"{file.name}, card {name or f'number {number + 1}'}"
            scenario, found = _parse(card)
            problems += [f"{where}, {field}: {text}" for field, text in found]
            if scenario is None:
                continue
            if scenario.id in owner:
                problems.append(f"{where}, id: already used in {owner[scenario.id]}")
            owner[scenario.id] = file.name
            scenarios.append(scenario)
    return scenarios, problems


def _lines(text: str, file: Path, problems: list[str]) -> list[Any]:
    """The values of a JSONL file; each line that is none is named in `problems`."""
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                problems.append(f"{file}, line {number} is not valid JSON: {error}")
    return values


class _Reader:
    """Takes typed fields out of a card and notes what is wrong with them.

    A field with a problem comes back as None; the card is dropped when there is any problem.
    """

    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []

    def note(self, field: str, text: str) -> None:
        self.problems.append((field, text))

    def section(self, value: Any, field: str, keys: Sequence[str], optional: Sequence[str] = ()) -> dict:
        if not isinstance(value, dict):
            self.note(field or "card", f"must be a mapping with {', '.join(keys)}")
            return {}
        prefix = f"{field}." if field else ""
        for key in keys:
            if key not in value:
                self.note(f"{prefix}{key}", "is missing")
        for key in value:
            if key not in keys and key not in optional:
                self.note(f"{prefix}{key}", f"is unknown; known here: {', '.join((*keys, *optional))}")
        return value

    def text(
        self, holder: dict, key: str, field: str, check: Callable[[str], str | None] | None = None
    ) -> Any:
        return self.string(holder[key], field, check) if key in holder else None

    def string(self, value: Any, field: str, check: Callable[[str], str | None] | None = None) -> Any:
        if not isinstance(value, str) or not value.strip():
            self.note(field, f"must be text, not {value!r}")
            return None
        if re.search("[\ud800-\udfff]", value):
            self.note(field, "holds half of a surrogate pair, which is no character; write it whole")
            return None
        problem = check(value) if check else None
        if problem:
            self.note(field, f"`{value}` {problem}")
            return None
        return " ".join(value.split())

    def choice(self, holder: dict, key: str, field: str, choices: Sequence[str]) -> Any:
        return self.text(
            holder, key, field, lambda v: None if v in choices else f"must be one of {', '.join(choices)}"
        )

    def strings(
        self,
        holder: dict,
        key: str,
        field: str,
        count: int | None,
        check: Callable[[str], str | None] | None = None,
    ) -> tuple[Any, ...]:
        if key not in holder:
            return ()
        value = holder[key]
        if not isinstance(value, list) or (count is not None and len(value) != count) or not value:
            self.note(field, f"must be a list of {count or 'one or more'} texts")
            return ()
        return tuple(self.string(item, f"{field}[{i}]", check) for i, item in enumerate(value))


def _phrase(pattern: str, most: int, right: str) -> Callable[[str], str | None]:
    compiled = re.compile(pattern)

    def check(text: str) -> str | None:
        fits = compiled.fullmatch(text) and len(text.split()) <= most
        return None if fits else f"must be {right}"

    return check


_PARTICULAR = _phrase(
    r"the( [a-z]+){1,2}", 3, "`the` and one or two more words, lower case, without punctuation"
)
_STRENGTH = _phrase(
    r"[a-z]+ing( [A-Za-z']+)*", 5, "a gerund phrase of at most 5 words, such as `turning up every morning`"
)
_STEP = _phrase(
    r"(a|an|one)( [A-Za-z']+)+", 6, "a noun phrase of at most 6 words that starts with `a` or `one`"
)
_VALUE = _phrase(
    r"[a-z']+( [a-z']+)*", 4, "a noun phrase of at most 4 words, lower case, without punctuation"
)
_ID = _phrase(r"[a-z0-9_-]+", 1, "lower-case letters, digits, `-` and `_` only")


def _line(text: str) -> str | None:
    if not re.fullmatch(r"[A-Z][A-Za-z', ]*\.", text):
        return "must be one sentence: a capital, then letters, spaces, commas, apostrophes, and a full stop"
    words = text.rstrip(".").split()
    if len(words) > 9:
        return f"has {len(words)} words; at most 9"
    spoken = {word.strip(",").lower() for word in words}
    for feeling in (*FEELINGS, *UNSTATED):
        if feeling in spoken:
            return (
                f"must not name a feeling (`{feeling}`); the user states feelings in a sentence of their own"
            )
    return None


def _parse(card: Any) -> tuple[Scenario | None, list[tuple[str, str]]]:
    r = _Reader()
    spoken = _has_phrases(card)
    top = r.section(
        card,
        "",
        (
            "id",
            "domain",
            "split",
            "person",
            "empathy_threshold",
            "topic",
            "hope",
            "dislike",
            "history",
            "present",
            "story",
            *(("value",) if spoken else ()),
        ),
        optional=("start", "language"),
    )
    person = _parse_person(r, top)
    history = r.section(top.get("history", {}), "history", PERIODS) if "history" in top else {}
    present = (
        r.section(top["present"], "present", ("situation", "goal", "motive")) if "present" in top else {}
    )
    scenario = Scenario(
        id=r.text(top, "id", "id", _ID),
        domain=r.choice(top, "domain", "domain", DOMAINS),
        split=r.choice(top, "split", "split", SPLITS),
        person=person,
        empathy_threshold=r.choice(top, "empathy_threshold", "empathy_threshold", THRESHOLDS),
        topic=r.text(top, "topic", "topic"),
        hope=r.text(top, "hope", "hope"),
        dislike=r.strings(top, "dislike", "dislike", None),
        start=_parse_start(r, top),
        history=tuple(r.text(history, period, f"history.{period}") for period in PERIODS),  # type: ignore[arg-type]
        situation=r.text(present, "situation", "present.situation"),
        goal=r.text(present, "goal", "present.goal"),
        motive=r.text(present, "motive", "present.motive"),
        value=r.text(top, "value", "value", _VALUE) if spoken else "",
        story=_parse_story(r, top, spoken),
        language=r.choice(top, "language", "language", LANGUAGES) if "language" in top else "en",
    )
    if not r.problems and spoken:
        _check_phrases(r, scenario)
    return (None if r.problems else scenario), r.problems


def _parse_person(r: _Reader, top: dict) -> Person:
    keys = ("name", "age", "social", "inner", "speech")
    person = r.section(top["person"], "person", keys) if "person" in top else {}
    age = person.get("age")
    if person and (not isinstance(age, int) or isinstance(age, bool) or not 0 < age < 120):
        r.note("person.age", f"must be a whole number of years, not {age!r}")
    texts = {key: r.text(person, key, f"person.{key}") for key in keys if key != "age"}
    return Person(age=age, **texts)  # type: ignore[arg-type]


def _parse_start(r: _Reader, top: dict) -> tuple[int, ...]:
    start = r.section(top["start"], "start", INDICATORS) if "start" in top else {}
    for key, level in start.items():
        if isinstance(level, bool) or level not in (0, 1, 2, 3):
            r.note(f"start.{key}", f"must be 0, 1, 2 or 3, not {level!r}")
    if start and not any(start.values()):
        r.note("start", "must lack something; a dialogue cannot start at equilibrium")
    return tuple(start.get(key) for key in INDICATORS) if "start" in top else ()  # type: ignore[misc]


def _has_phrases(card: Any) -> bool:
    """Whether a card has any of the scripted user's phrases; then it needs all of them."""
    story = card.get("story") if isinstance(card, dict) else None
    stages = story.get("stages") if isinstance(story, dict) else None
    holders = [card, story, *(stages if isinstance(stages, list) else ())]
    keys = ("value", "strengths", "steps", *_STAGE_PHRASES)
    return any(isinstance(holder, dict) and any(key in holder for key in keys) for holder in holders)


def _parse_story(r: _Reader, top: dict, spoken: bool) -> Story:
    keys = ("trigger", "stages", *(("strengths", "steps") if spoken else ()), "outcome", "epilogue")
    story = r.section(top["story"], "story", keys) if "story" in top else {}
    stages = story.get("stages", [])
    if "stages" in story and (not isinstance(stages, list) or len(stages) != 4):
        r.note("story.stages", "must be a list of exactly four stages")
        stages = []
    return Story(
        trigger=r.text(story, "trigger", "story.trigger"),
        stages=tuple(_parse_stage(r, stage, f"story.stages[{i}]", spoken) for i, stage in enumerate(stages)),  # type: ignore[arg-type]
        strengths=r.strings(story, "strengths", "story.strengths", 2, _STRENGTH),  # type: ignore[arg-type]
        steps=r.strings(story, "steps", "story.steps", 2, _STEP),  # type: ignore[arg-type]
        outcome=r.text(story, "outcome", "story.outcome"),
        epilogue=r.text(story, "epilogue", "story.epilogue"),
    )


_STAGE_PHRASES = ("particulars", "line", "feeling", "unstated")


def _parse_stage(r: _Reader, value: Any, field: str, spoken: bool) -> Stage:
    stage = r.section(value, field, ("telling", *(_STAGE_PHRASES if spoken else ())))
    if not spoken:
        return Stage(telling=r.text(stage, "telling", f"{field}.telling"))
    particulars = r.strings(stage, "particulars", f"{field}.particulars", 2, _PARTICULAR)
    line = r.strings(stage, "line", f"{field}.line", 2, _line)
    for i, (particular, sentence) in enumerate(zip(particulars, line, strict=False)):
        if particular and sentence and f" {particular} " not in re.sub(r"[.,]", " ", f" {sentence} "):
            r.note(
                f"{field}.line[{i}]",
                f"`{sentence}` must hold `{particular}` word for word, and not as its first words",
            )
    return Stage(
        telling=r.text(stage, "telling", f"{field}.telling"),
        particulars=particulars,  # type: ignore[arg-type]
        line=line,  # type: ignore[arg-type]
        feeling=r.choice(stage, "feeling", f"{field}.feeling", FEELINGS),
        unstated=r.choice(stage, "unstated", f"{field}.unstated", UNSTATED),
    )


def _check_phrases(r: _Reader, scenario: Scenario) -> None:
    """A phrase must point at one thing: no phrase of a card may stand inside another one."""
    story = scenario.story
    phrases = [
        (f"story.stages[{i}].particulars[{k}]", phrase)
        for i, stage in enumerate(story.stages)
        for k, phrase in enumerate(stage.particulars)
    ]
    phrases += [(f"story.strengths[{k}]", phrase) for k, phrase in enumerate(story.strengths)]
    phrases += [(f"story.steps[{k}]", phrase) for k, phrase in enumerate(story.steps)]
    for i, (field, phrase) in enumerate(phrases):
        for other_field, other in phrases[:i]:
            if f" {other.lower()} " in f" {phrase.lower()} " or f" {phrase.lower()} " in f" {other.lower()} ":
                r.note(field, f"`{phrase}` overlaps with {other_field} `{other}`; phrases must be distinct")
    lines = [line for stage in story.stages for line in stage.line]
    if len(set(lines)) != len(lines):
        r.note("story.stages", "two stages share a line; lines must be distinct")


def to_mapping(scenario: Scenario) -> dict[str, Any]:
    """The card as plain data, which `read_cards` reads back to an equal scenario."""
    person, story = scenario.person, scenario.story
    card: dict[str, Any] = {
        "id": scenario.id,
        "language": scenario.language,
        "domain": scenario.domain,
        "split": scenario.split,
        "person": {key: getattr(person, key) for key in ("name", "age", "social", "inner", "speech")},
        "empathy_threshold": scenario.empathy_threshold,
        "topic": scenario.topic,
        "hope": scenario.hope,
        "dislike": list(scenario.dislike),
        "history": dict(zip(PERIODS, scenario.history, strict=True)),
        "present": {key: getattr(scenario, key) for key in ("situation", "goal", "motive")},
        "story": {
            "trigger": story.trigger,
            "stages": [{"telling": stage.telling} for stage in story.stages],
            "outcome": story.outcome,
            "epilogue": story.epilogue,
        },
    }
    if scenario.start:
        card["start"] = dict(zip(INDICATORS, scenario.start, strict=True))
    if scenario.scripted:
        card["value"] = scenario.value
        card["story"] |= {"strengths": list(story.strengths), "steps": list(story.steps)}
        for plain, stage in zip(card["story"]["stages"], story.stages, strict=True):
            plain |= {
                "particulars": list(stage.particulars),
                "line": list(stage.line),
                "feeling": stage.feeling,
                "unstated": stage.unstated,
            }
    return card


def print_problems(problems: Sequence[str]) -> None:
    """Prints what `read_cards` found on standard error, a line each, whatever the cards hold."""
    for problem in problems:
        print(printable(problem).replace("\n", "\\n"), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """`check PATH`: prints every problem, or a summary of the cards; 0 when all are sound, else 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2 or arguments[0] != "check":
        print("usage: python -m mapo_jax.environment.scenario check PATH", file=sys.stderr)
        return 2
    scenarios, problems = read_cards(Path(arguments[1]))
    print_problems(problems)
    print(f"{len(scenarios)} sound cards, {len(problems)} problems")
    for without, what in (
        ([s for s in scenarios if not s.start], "no start: estimate it with python -m mapo_jax.rate"),
        ([s for s in scenarios if not s.scripted], "no scripted phrases: for environment.family=live"),
    ):
        if without:
            print(f"  {len(without)} with {what}")
    scenarios = [scenario for scenario in scenarios if scenario.start]
    norms = sorted(sum(x * x for x in scenario.start_position) ** 0.5 for scenario in scenarios)
    if scenarios:
        for title, values in (
            ("domains", [s.domain for s in scenarios]),
            ("splits", [s.split for s in scenarios]),
            ("strongest axes", [s.strongest_axis for s in scenarios]),
        ):
            print(
                f"  {title}: "
                + ", ".join(f"{name} {count}" for name, count in sorted(Counter(values).items()))
            )
        print(f"  |P_0|: {norms[0]:.1f} to {norms[-1]:.1f}, mean {sum(norms) / len(norms):.1f}")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
