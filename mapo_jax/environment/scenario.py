"""Scenario cards: who talks to the policy, what happened to them, and where they start.

A card is a mapping; a YAML file holds a list of them, a JSONL file one per line. The fields are those of the
EMPA benchmark: person, empathy threshold, topic, needs, life history, present, and a story in four stages.
The prose is for users played by a language model. `value`, `strengths`, `steps` and each stage's
`particulars`, `line`, `feeling` and `unstated` are phrases that the scripted user says word for word: a card
has all of them, or none and is for the live world only. `language` defaults to en. A card without `start` can
be read, but no dialogue can begin before a judge has estimated it (`python -m mapo_jax.rate`).

`python -m mapo_jax.environment.scenario check PATH` reads a file or a folder and reports every problem.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from mapo_jax.commands import printable
from mapo_jax.environment.card_schema import INDICATORS, PERIODS, SPLITS, check_card
from mapo_jax.environment.state import AXES, norm
from mapo_jax.errors import UserError

# Points per level (0..3) of an indicator: -2 standard, -3 priority, -4 core.
POINTS_PER_LEVEL = dict(zip(INDICATORS, (-2, -2, -3, -2, -4, -3, -2, -4, -3), strict=True))

# libyaml's safe loader, if PyYAML was built with it, is ten times as fast.
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
    """One of the four parts of the story."""

    telling: str  # what this stage reveals, in prose
    particulars: tuple[str, ...] = ()  # two noun phrases that name the situation
    line: tuple[str, ...] = ()  # two sentences of the scripted user; the i-th holds the i-th particular
    feeling: str = ""  # stated feeling, one of FEELINGS
    unstated: str = ""  # feeling behind it, one of UNSTATED; never said by the scripted user


@dataclass(frozen=True)
class Story:
    """What happened, in the order in which the user tells it."""

    trigger: str
    stages: tuple[Stage, Stage, Stage, Stage]
    strengths: tuple[str, ...]  # two gerund phrases: what the person did; empty if the card has no phrases
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
        """By id: cards are cache keys, and equal cards have equal ids."""
        return hash(self.id)

    @property
    def scripted(self) -> bool:
        """Whether the card has the scripted user's phrases."""
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
    """Points of the start state from its nine levels (EMPA's scoring).

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


def find_scenario(name: str, folder: str | Path | None = None, *, scripted: bool = True) -> Scenario:
    """The card with this id; other arguments and errors as of `load_scenarios`."""
    cards = {card.id: card for card in load_scenarios(folder, scripted=scripted)}
    if name not in cards:
        some = ", ".join(list(cards)[:5])
        raise UserError(f"there is no scenario {name!r}; there are {some}, ... ({len(cards)})")
    return cards[name]


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
    """The valid cards of a file or folder, and one sentence for each problem."""
    files = sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        return [], [f"no scenario cards (*.yaml, *.jsonl) in {path}"]
    scenarios: list[Scenario] = []
    problems: list[str] = []
    files_by_id: dict[str, str] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            cards = _lines(text, file, problems) if file.suffix == ".jsonl" else yaml.load(text, _Loader)
        except OSError as error:
            problems.append(f"cannot read the cards {file}: {error.strerror}")
            continue
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # also an invalid date or number
            form = "UTF-8" if isinstance(error, UnicodeDecodeError) else "YAML"
            problems.append(f"{file} is not valid {form}: {' '.join(str(error).split())}")
            continue
        if not isinstance(cards, list) or not cards:
            problems.append(f"{file} must hold a list of cards")
            continue
        for number, card in enumerate(cards):
            name = card.get("id") if isinstance(card, dict) else None
            where = f"{file.name}, card {name or f'number {number + 1}'}"
            scenario, card_problems = _parse(card)
            problems += [f"{where}, {problem}" for problem in card_problems]
            if scenario is None:
                continue
            if scenario.id in files_by_id:
                problems.append(f"{where}, id: already used in {files_by_id[scenario.id]}")
            files_by_id[scenario.id] = file.name
            scenarios.append(scenario)
    return scenarios, problems


def _lines(text: str, file: Path, problems: list[str]) -> list[Any]:
    """The values of a JSONL file; adds each invalid line to `problems`."""
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                problems.append(f"{file}, line {number} is not valid JSON: {error}")
    return values


def _parse(card: Any) -> tuple[Scenario | None, list[str]]:
    """The card as a scenario, or None if it has problems."""
    fields, problems = check_card(card)
    if problems:
        return None, problems
    story = fields["story"]
    stages = tuple(Stage(**stage) for stage in story["stages"])
    fields |= fields.pop("present") | {
        "person": Person(**fields["person"]),
        "history": tuple(fields["history"].values()),
        "story": Story(**{"strengths": (), "steps": ()} | story | {"stages": stages}),
        "start": tuple(fields.get("start", {}).values()),
    }
    return Scenario(**{"value": ""} | fields), []


def to_mapping(scenario: Scenario) -> dict[str, Any]:
    """The card as plain data, which `read_cards` reads back to an equal scenario."""
    values = json.loads(json.dumps(dataclasses.asdict(scenario)))  # tuples as lists
    values |= {
        "history": dict(zip(PERIODS, scenario.history, strict=True)),
        "present": {key: values[key] for key in ("situation", "goal", "motive")},
        "start": dict(zip(INDICATORS, scenario.start, strict=True)) if scenario.start else None,
    }
    story = values["story"]
    values["story"] = {key: story[key] for key in ("trigger", "stages", "outcome", "epilogue")}
    if scenario.scripted:
        values["story"] |= {key: story[key] for key in ("strengths", "steps")}
    else:
        values["story"]["stages"] = [{"telling": stage["telling"]} for stage in story["stages"]]
    keys = ("id", "language", "domain", "split", "person", "empathy_threshold", "topic", "hope", "dislike")
    keys += ("history", "present", "story", "start", "value")
    return {key: values[key] for key in keys if values[key]}


def print_problems(problems: Sequence[str]) -> None:
    """Prints the problems of `read_cards` on standard error, one per line, without control characters."""
    for problem in problems:
        print(printable(problem).replace("\n", "\\n"), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """`check PATH`: prints every problem and a summary of the cards; returns 0 if all are sound, else 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2 or arguments[0] != "check":
        usage = "usage: python -m mapo_jax.environment.scenario check PATH"
        print(f"{usage} (cards from conversations: python -m mapo_jax.draft)", file=sys.stderr)
        return 2
    scenarios, problems = read_cards(Path(arguments[1]))
    print_problems(problems)
    print(f"{len(scenarios)} sound cards, {len(problems)} problems")
    for count, what in (
        (sum(not s.start for s in scenarios), "no start: estimate it with python -m mapo_jax.rate"),
        (sum(not s.scripted for s in scenarios), "no scripted phrases: for environment.family=live"),
    ):
        if count:
            print(f"  {count} with {what}")
    scenarios = [scenario for scenario in scenarios if scenario.start]
    if scenarios:
        groupings = {"domains": "domain", "splits": "split", "strongest axes": "strongest_axis"}
        for title, field in groupings.items():
            counts = Counter(getattr(scenario, field) for scenario in scenarios)
            print(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
        norms = [norm(scenario.start_position) for scenario in scenarios]
        print(f"  |P_0|: {min(norms):.1f} to {max(norms):.1f}, mean {sum(norms) / len(norms):.1f}")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
