"""Reads a run folder, whatever state it is in: what cannot be read is left out and said, never guessed.

Only the folder is read. Rows that a kill or a bad disk has torn are skipped and counted; a run without
evaluations, without dialogues, or without a configuration is still a run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml

from mapo_jax.config import AlgorithmConfig
from mapo_jax.environment import state as calculator
from mapo_jax.environment.scenario import start_position
from mapo_jax.errors import UserError
from mapo_jax.scores.empa import score_case

CONFIG_FILE, METRICS_FILE, DIALOGUES, EVALUATIONS = "config.yaml", "metrics.jsonl", "dialogues", "evaluations"
HELPER_FILE = "helper.json"  # in EVALUATIONS: what the good scripted helper comes to on the same cards
TOKENIZER_FILE = "model/tokenizer.json"
OUTCOMES = ("success", "failure", "timeout", "ended", "error")
_STEP_FILE = re.compile(r"step_(\d+)(-\d+-of-\d+)?\.jsonl")  # of several processes: one part each

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class SavedTurn:
    """One turn as it was saved, with what the judge and the director made of it."""

    user: str
    reply: str
    position: Vector  # (C, A, P) after the turn
    levels: tuple[int, ...] | None  # six of them; None: unscored
    evidence: tuple[str, ...]
    reasons: tuple[str, ...]
    failure: str | None
    kind: str | None  # scripted world: what kind of reply this is
    named: tuple[tuple[str, bool], ...]  # scripted world: what was named, and whether it was right
    action: str | None  # what the director did
    guidance: str
    truncated: bool


@dataclass(frozen=True)
class TokenRow:
    """The tokens of a dialogue, or of one of its turns (history=per_turn)."""

    ids: np.ndarray
    sampled: np.ndarray  # the loss mask, but for unscored turns
    turn: np.ndarray  # whose reply it belongs to; -1: nobody's
    logprob: np.ndarray


@dataclass(frozen=True)
class SavedDialogue:
    """One dialogue. `place` is (scenario, rollout) in its batch."""

    step: int
    place: tuple[int, int]
    card: Mapping[str, Any]  # the scenario card's own fields
    start: Vector
    turns: tuple[SavedTurn, ...]
    outcome: str
    failure: str | None
    rule: str | None
    seed: int
    rows: tuple[TokenRow, ...]

    @property
    def scenario(self) -> str:
        """The card's id."""
        return str(self.card["id"])

    @property
    def domain(self) -> str:
        """The card's domain."""
        return str(self.card.get("domain") or "none")

    @cached_property
    def positions(self) -> tuple[Vector, ...]:
        """(C, A, P) at the start and after each turn."""
        return (self.start, *(turn.position for turn in self.turns))

    @cached_property
    def distances(self) -> list[float]:
        """What the user lacks, at the start and after each turn."""
        return [calculator.distance(position) for position in self.positions]

    @cached_property
    def scored(self) -> list[bool]:
        """Which turns have a reward."""
        return [turn.levels is not None for turn in self.turns]

    @property
    def unscored_turns(self) -> int:
        """How many turns the judge failed to score."""
        return len(self.turns) - sum(self.scored)

    @cached_property
    def counts(self) -> bool:
        """Whether statistics count it: it did not end in error, and a turn of it was scored."""
        return self.outcome != "error" and any(self.scored)

    @cached_property
    def epm_q(self) -> float | None:
        """EMPA's score; None where there is nothing to score."""
        if not self.counts or calculator.distance(self.start) == 0:
            return None
        return score_case(self.start, [turn.levels for turn in self.turns])["epm_q"]


@dataclass(frozen=True)
class SavedBatch:
    """The dialogues of one file: a training step's, or an evaluation's."""

    step: int
    validation: bool
    dialogues: tuple[SavedDialogue, ...]
    broken: int = 0  # rows that could not be read


@dataclass(frozen=True)
class SavedRun:
    """What could be read of a run folder."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    algorithm: AlgorithmConfig
    steps: tuple[Mapping[str, float], ...]  # rows of metrics.jsonl, by step
    evaluations: Mapping[int, Mapping[str, float]]  # step -> metrics
    helper: Mapping[str, float]  # the same metrics of the good helper; empty where nobody wrote them down
    training: tuple[SavedBatch, ...]
    validation: tuple[SavedBatch, ...]
    shape: Mapping[str, Any]  # of the model
    notes: tuple[str, ...] = ()  # what is missing or broken, in sentences
    left_out: int = 0  # training steps whose dialogues are on the disk but were not read
    written: float | None = None  # when the folder's metrics were last written

    @property
    def planned(self) -> int | None:
        """Steps that the run is configured for."""
        steps = setting(self.config, "training.steps")
        return steps if isinstance(steps, int) else None

    @property
    def done(self) -> int:
        """Finished steps."""
        return max((int(row["step"]) for row in self.steps), default=0)

    @property
    def finished(self) -> bool:
        """Whether every planned step was taken and the last evaluation held."""
        return self.planned is not None and self.done >= self.planned and self.planned in self.evaluations

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of one metric."""
        pairs = [(int(row["step"]), row[name]) for row in self.steps if is_number(row.get(name))]
        return [step for step, _ in pairs], [float(value) for _, value in pairs]

    def evaluated(self, name: str) -> tuple[list[int], list[float]]:
        """The same of the evaluations."""
        pairs = [(step, row[name]) for step, row in self.evaluations.items() if is_number(row.get(name))]
        return [step for step, _ in pairs], [float(value) for _, value in pairs]


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def setting(config: Mapping[str, Any], dotted: str) -> Any:
    """The value under a dotted key of a nested mapping; None where there is none."""
    value: Any = config
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def read_run(
    folder: Path | str, *, dialogues: int, progress: Callable[[str], None] | None = None
) -> SavedRun:
    """Reads a run.

    Args:
      folder: the run folder.
      dialogues: most dialogues of training to read. Whole steps are taken: the first, the last, and evenly
        spaced ones between. Evaluations are read whole.
      progress: called with the name of each file before it is read.

    Raises:
      UserError: there is no such folder, or nothing of a run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the run folder {folder} does not exist; give the folder of a training run")
    parts = (CONFIG_FILE, METRICS_FILE, DIALOGUES, EVALUATIONS)
    if not any((folder / part).exists() for part in parts):
        raise UserError(
            f"{folder} is no run folder (none of {', '.join(parts)}); give that of a training run"
        )
    notes: list[str] = []
    told = progress or (lambda name: None)
    config = _read_config(folder / CONFIG_FILE, notes)
    steps, evaluations, written = _read_metrics(folder / METRICS_FILE, notes)
    _read_evaluations(folder / EVALUATIONS, evaluations, notes)
    files = _step_files(folder / DIALOGUES)
    chosen = choose_steps(files, dialogues)
    training = tuple(_read_batch(files[step], step, False, told, notes) for step in chosen)
    held = _step_files(folder / EVALUATIONS)
    validation = tuple(_read_batch(file, step, True, told, notes) for step, file in held.items())
    if not files:
        notes.append("no dialogues of training were found, so what was said in training cannot be shown")
    if not held:
        notes.append("no validation dialogues were found, so before and after cannot be compared")
    run = SavedRun(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        algorithm=_algorithm(config, notes),
        steps=tuple(steps),
        evaluations=dict(sorted(evaluations.items())),
        helper=_read_json(folder / EVALUATIONS / HELPER_FILE, [], "the helper's figures"),
        training=tuple(batch for batch in training if batch.dialogues),
        validation=tuple(batch for batch in validation if batch.dialogues),
        shape=_read_json(folder / "model" / "config.json", [], "the model's shape"),
        left_out=len(files) - len(chosen),
        written=written,
    )
    return replace(run, notes=(*_state(run), *notes))


def choose_steps(files: Mapping[int, Sequence[Path]], most: int) -> list[int]:
    """Which steps to read so that about `most` dialogues come together; ascending.

    All files of a run have the same count of dialogues, so the first one's count stands for all.
    """
    steps = sorted(files)
    if not steps:
        return []
    each = 0
    for part in files[steps[0]]:
        try:
            with part.open("rb") as file:
                each += sum(1 for _ in file)
        except OSError:  # reading it will say so
            each += 1
    each = max(1, each)
    room = max(2, most // each)
    if len(steps) <= room:
        return steps
    places = np.linspace(0, len(steps) - 1, room).round().astype(int)
    return [steps[place] for place in sorted(set(places.tolist()))]


# --- The parts. ---


def _state(run: SavedRun) -> list[str]:
    if run.finished:
        return []
    if run.planned is None:
        return [f"how many steps were planned is unknown; {run.done} are done"]
    if run.done < run.planned:
        return [
            f"the run is not finished: {run.done} of {run.planned} steps are done; "
            "the same training command goes on from there"
        ]
    return ["the evaluation after the last step is missing"]


def _read_config(file: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{file.name} is missing, so the settings are unknown")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{file.name} cannot be read ({_short(error)}), so the settings are unknown")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{file.name} holds no settings")
        return {}
    return content


def _algorithm(config: Mapping[str, Any], notes: list[str]) -> AlgorithmConfig:
    section = config.get("algorithm")
    default = AlgorithmConfig()
    if not isinstance(section, Mapping):
        notes.append("the algorithm's settings are unknown; credit is computed with the defaults")
        return default
    kept = {
        f.name: section[f.name]
        for f in fields(AlgorithmConfig)
        if f.name in section and _same_type(section[f.name], getattr(default, f.name))
    }
    return AlgorithmConfig(**kept)


def _same_type(value: Any, like: Any) -> bool:
    return is_number(value) if is_number(like) else type(value) is type(like)


def _read_metrics(
    file: Path, notes: list[str]
) -> tuple[list[Mapping[str, float]], dict[int, dict[str, float]], float | None]:
    """Rows of steps, and rows of evaluations without their prefix."""
    steps: dict[int, Mapping[str, float]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    if not file.is_file():
        notes.append(f"{file.name} is missing, so there are no curves")
        return [], {}, None
    broken = 0
    for row in _json_lines(file):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or isinstance(row["step"], bool):
            broken += 1
            continue
        held = {
            name.removeprefix("evaluation/"): v for name, v in row.items() if name.startswith("evaluation/")
        }
        if held:
            evaluations[row["step"]] = held
        if any(not name.startswith("evaluation/") for name in row if name != "step"):
            steps[row["step"]] = row
    if broken:
        notes.append(f"{broken} {_rows(broken)} of {file.name} could not be read and {_are(broken)} left out")
    if not steps:
        notes.append(f"{file.name} holds no finished step yet")
    return [steps[step] for step in sorted(steps)], evaluations, file.stat().st_mtime


def _read_evaluations(folder: Path, evaluations: dict[int, dict[str, float]], notes: list[str]) -> None:
    """Adds what evaluations/step_N.json knows to the rows of metrics.jsonl."""
    for file in sorted(folder.glob("step_*.json")) if folder.is_dir() else ():
        number = file.stem.removeprefix("step_")
        if number.isdecimal() and (metrics := _read_json(file, notes, file.name)):
            evaluations[int(number)] = {**evaluations.get(int(number), {}), **metrics}


def _read_json(file: Path, notes: list[str], what: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{what} cannot be read ({_short(error)})")
        return {}
    return content if isinstance(content, dict) else {}


def _step_files(folder: Path) -> dict[int, list[Path]]:
    """The files of each step: one, or a part from each process."""
    found: dict[int, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _STEP_FILE.fullmatch(file.name):
            found.setdefault(int(match.group(1)), []).append(file)
    return dict(sorted(found.items()))


def _read_batch(
    files: Sequence[Path], step: int, validation: bool, told: Callable[[str], None], notes: list[str]
) -> SavedBatch:
    dialogues: dict[tuple[int, int], SavedDialogue] = {}
    broken = sum(_read_dialogues(file, step, told, notes, dialogues) for file in files)
    return SavedBatch(step, validation, tuple(dialogues[place] for place in sorted(dialogues)), broken)


def _read_dialogues(
    file: Path,
    step: int,
    told: Callable[[str], None],
    notes: list[str],
    dialogues: dict[tuple[int, int], SavedDialogue],
) -> int:
    """Adds a file's dialogues to those of a step; returns how many rows could not be read."""
    told(f"{file.parent.name}/{file.name}")
    broken = 0
    try:
        for row in _json_lines(file):
            try:
                dialogue = parse_dialogue(row, step)
                dialogues[dialogue.place] = dialogue
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UserError):
                broken += 1
    except OSError as error:
        notes.append(f"{file.parent.name}/{file.name} cannot be read ({_short(error)})")
    if broken:
        notes.append(
            f"{broken} {_rows(broken)} of {file.parent.name}/{file.name} could not be read and "
            f"{_are(broken)} left out"
        )
    return broken


def _json_lines(file: Path) -> Iterator[Any]:
    """Every non-empty line as JSON; None for one that is none."""
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield _json(line)


def _json(line: bytes) -> Any:
    try:
        return orjson.loads(line)  # three times as fast, and stricter: no NaN, no half of a surrogate pair
    except ValueError:
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return None


def parse_dialogue(row: Any, step: int) -> SavedDialogue:
    """A dialogue from its saved row.

    Raises:
      KeyError, TypeError, ValueError, AttributeError, OverflowError, UserError: it is no saved dialogue.
    """
    state = row["state"]
    card = state["scenario"]
    start = start_position(card["start"])
    if not isinstance(card["id"], str):
        raise TypeError("a card's id is text")
    rows = [*row.get("earlier_rows", ()), row["row"]]
    return SavedDialogue(
        step=step,
        place=(_count(row["scenario"]), _count(row["rollout"])),
        card=card,
        start=start,
        turns=tuple(_parse_turn(turn) for turn in state["turns"]),
        outcome=str(state.get("outcome") or "unfinished"),
        failure=_text_or_none(state.get("failure")),
        rule=_text_or_none(state.get("rule")),
        seed=int(state.get("seed", 0)),
        rows=tuple(_parse_row(row) for row in rows),
    )


def _parse_turn(turn: Mapping[str, Any]) -> SavedTurn:
    judgement, action = turn["judgement"], turn.get("action") or {}
    position = tuple(float(axis) for axis in turn["position"])
    if len(position) != 3 or not all(map(math.isfinite, position)):
        raise ValueError(f"{position} is no position")
    levels = None
    reading: Mapping[str, Any] = {}
    if judgement is not None:
        levels = tuple(int(level) for level in judgement["levels"])
        calculator.points(levels)  # raises for a level that the scale does not have
        reading = judgement.get("reading") or {}
    target = action.get("target")
    return SavedTurn(
        user=_text(turn["user"]),
        reply=_text(turn["reply"]),
        position=position,
        levels=levels,
        evidence=tuple(map(_text, judgement["evidence"])) if judgement else (),
        reasons=tuple(map(_text, judgement["reasons"])) if judgement else (),
        failure=_text_or_none(turn.get("failure")),
        kind=_text_or_none(reading.get("kind")),
        named=tuple((_text(name["what"]), bool(name["right"])) for name in reading.get("named") or ()),
        action=None if not action else _text(action["kind"]) + (f" {_text(target)}" if target else ""),
        guidance=_text(action.get("guidance") or ""),
        truncated=bool(turn.get("truncated")),
    )


def _parse_row(row: Mapping[str, Any]) -> TokenRow:
    tokens = TokenRow(
        np.asarray(row["ids"], np.int32),
        np.asarray(row["sampled"], bool),
        np.asarray(row["turn"], np.int16),
        np.asarray(row["logprob"], np.float32),
    )
    if len({array.shape for array in (tokens.ids, tokens.sampled, tokens.turn, tokens.logprob)}) != 1:
        raise ValueError("the four lists of a row are not equally long")
    return tokens


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 100_000:
        raise ValueError(f"{value!r} is no index")
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
