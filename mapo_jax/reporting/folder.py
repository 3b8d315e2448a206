"""Reads a run folder in any state: what cannot be read is left out and listed in notes, never guessed.

Only the folder is read. Damaged rows are skipped and counted. A run without evaluations, dialogues or
configuration is still read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml
from pydantic import ValidationError

from mapo_jax.config import GONE, AlgorithmConfig, Config
from mapo_jax.errors import UserError
from mapo_jax.files import encodable
from mapo_jax.reporting.dialogues import SavedBatch, SavedDialogue, parse_dialogue
from mapo_jax.settings import value_at

CONFIG_FILE, METRICS_FILE, DIALOGUES, EVALUATIONS = "config.yaml", "metrics.jsonl", "dialogues", "evaluations"
HELPER_FILE = "helper.json"  # in EVALUATIONS: figures of the good scripted helper on the same cards
STARTS_FILE = "starts.jsonl"  # one row per start of the run: command, versions, machine
TOKENIZER_FILE = "model/tokenizer.json"
_STEP_FILE = re.compile(r"step_(\d+)(-\d+-of-\d+)?\.jsonl")  # with several processes: one file each

Progress = Callable[[str], None]
"""Called with the name of each piece of work before it begins."""


def no_progress(name: str) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class SavedRun:
    """The readable content of a run folder."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    algorithm: AlgorithmConfig
    steps: tuple[Mapping[str, float], ...]  # rows of metrics.jsonl, by step
    evaluations: Mapping[int, Mapping[str, float]]  # step -> metrics
    helper: Mapping[str, float]  # the same metrics of the good helper; empty if they were not saved
    training: tuple[SavedBatch, ...]
    validation: tuple[SavedBatch, ...]
    shape: Mapping[str, Any]  # of the model
    starts: tuple[Mapping[str, Any], ...] = ()  # rows of STARTS_FILE
    notes: tuple[str, ...] = ()  # what is missing or damaged, in sentences
    left_out: int = 0  # training steps with dialogues on the disk that were not read
    written: float | None = None  # time of the last write to the metrics

    @property
    def planned(self) -> int | None:
        """Configured number of steps; None if unknown."""
        steps = value_at(self.config, "training.steps")
        return steps if isinstance(steps, int) else None

    @property
    def done(self) -> int:
        """Finished steps."""
        return max((int(row["step"]) for row in self.steps), default=0)

    @property
    def finished(self) -> bool:
        """Whether all planned steps are done and evaluated."""
        return self.planned is not None and self.done >= self.planned and self.planned in self.evaluations

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of one metric."""
        return _series(((row["step"], row) for row in self.steps), name)

    def evaluated(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of one metric of the evaluations."""
        return _series(self.evaluations.items(), name)


def _series(rows: Iterable[tuple[int, Mapping[str, Any]]], name: str) -> tuple[list[int], list[float]]:
    points = [(int(step), float(row[name])) for step, row in rows if is_number(row.get(name))]
    return [step for step, _ in points], [value for _, value in points]


def is_number(value: Any) -> bool:
    """Whether it is a finite number and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 card", "2 cards"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def read_run(folder: Path | str, *, dialogues: int, progress: Progress = no_progress) -> SavedRun:
    """Reads a run.

    Args:
      folder: the run folder.
      dialogues: most dialogues of training to read. Whole steps are taken: the first, the last, and evenly
        spaced ones between. Evaluations are read whole.
      progress: called with the name of each file before it is read.

    Raises:
      UserError: the folder does not exist, or is no run folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the run folder {folder} does not exist; give the folder of a training run")
    names = (CONFIG_FILE, METRICS_FILE, DIALOGUES, EVALUATIONS)
    if not any((folder / name).exists() for name in names):
        missing = f"it has none of {', '.join(names)}"
        raise UserError(f"{folder} is no run folder ({missing}); give the folder of a training run")
    notes: list[str] = []
    config = _read_config(folder / CONFIG_FILE, notes)
    steps, evaluations, written = _read_metrics(folder / METRICS_FILE, notes)
    _read_evaluations(folder / EVALUATIONS, evaluations, notes)
    files, evaluated = _step_files(folder / DIALOGUES), _step_files(folder / EVALUATIONS)
    chosen = choose_steps(files, dialogues)
    training = [_read_batch(files[step], step, False, progress, notes) for step in chosen]
    validation = [_read_batch(parts, step, True, progress, notes) for step, parts in evaluated.items()]
    if not files:
        notes.append("no dialogues of training were found, so they cannot be shown")
    if not evaluated:
        notes.append("no validation dialogues were found, so before and after cannot be compared")
    run = SavedRun(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        algorithm=_algorithm(config, notes),
        steps=tuple(steps),
        evaluations=dict(sorted(evaluations.items())),
        helper=_read_json(folder / EVALUATIONS / HELPER_FILE, [], ""),
        training=tuple(batch for batch in training if batch.dialogues),
        validation=tuple(batch for batch in validation if batch.dialogues),
        shape=_read_json(folder / "model" / "config.json", [], ""),
        starts=tuple(row for row in _json_lines(folder / STARTS_FILE) if isinstance(row, dict))
        if (folder / STARTS_FILE).is_file()
        else (),
        left_out=len(files) - len(chosen),
        written=written,
    )
    return replace(run, notes=(*_state(run), *notes))


def choose_steps(files: Mapping[int, Sequence[Path]], most: int) -> list[int]:
    """The steps to read for about `most` dialogues, ascending.

    All steps of a run have the same number of dialogues, so only the first step's are counted.
    """
    steps = sorted(files)
    if not steps:
        return []
    room = max(2, most // max(1, sum(map(_line_count, files[steps[0]]))))
    if len(steps) <= room:
        return steps
    places = np.linspace(0, len(steps) - 1, room).round().astype(int)
    return [steps[place] for place in sorted(set(places.tolist()))]


def _line_count(file: Path) -> int:
    try:
        with file.open("rb") as lines:
            return sum(1 for _ in lines)
    except OSError:  # noted when the file is read
        return 1


def _state(run: SavedRun) -> list[str]:
    if run.finished:
        return []
    if run.planned is None:
        return [f"the planned number of steps is unknown; {run.done} are done"]
    if run.done < run.planned:
        begun = f"the run is not finished: {run.done} of {run.planned} steps are done"
        return [f"{begun}; the same training command continues it"]
    return ["the evaluation after the last step is missing"]


def _read_config(file: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problem = "holds no settings"
    except FileNotFoundError:
        problem = "is missing, so the settings are unknown"
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = f"cannot be read ({_short(error)}), so the settings are unknown"
    notes.append(f"{file.name} {problem}")
    return {}


def _algorithm(config: Mapping[str, Any], notes: list[str]) -> AlgorithmConfig:
    section = config.get("algorithm")
    if not isinstance(section, Mapping):
        notes.append("the algorithm's settings are unknown; credit is computed with the defaults")
        return AlgorithmConfig()
    defaults = Config()  # a key that is gone does no harm with the value that is in effect now
    gone = {key: GONE[f"algorithm.{key}"].value(defaults) for key in section if f"algorithm.{key}" in GONE}
    section = {key: value for key, value in section.items() if key not in gone or gone[key] != value}
    try:
        return AlgorithmConfig.model_validate(section)
    except ValidationError as error:
        odd = {str(each["loc"][0]) for each in error.errors()}
        notes.append(
            f"unknown settings of the algorithm: {', '.join(sorted(odd))}; the defaults are used instead"
        )
        return AlgorithmConfig.model_validate({key: section[key] for key in section if str(key) not in odd})


def _read_metrics(
    file: Path, notes: list[str]
) -> tuple[list[Mapping[str, float]], dict[int, dict[str, float]], float | None]:
    """Rows of steps, rows of evaluations without their prefix, and the time of the last write."""
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
        names = [name for name in row if name.startswith("evaluation/")]
        metrics = {name.removeprefix("evaluation/"): row[name] for name in names}
        if metrics:
            evaluations[row["step"]] = metrics
        if len(row) > len(metrics) + 1:
            steps[row["step"]] = row
    _note_broken(broken, file.name, notes)
    if not steps:
        notes.append(f"{file.name} holds no finished step yet")
    return [steps[step] for step in sorted(steps)], evaluations, file.stat().st_mtime


def _read_evaluations(folder: Path, evaluations: dict[int, dict[str, float]], notes: list[str]) -> None:
    """Adds the metrics of evaluations/step_N.json to the rows of metrics.jsonl."""
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
    """The files of each step: one, or one per process."""
    files: dict[int, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _STEP_FILE.fullmatch(file.name):
            files.setdefault(int(match.group(1)), []).append(file)
    return dict(sorted(files.items()))


def _read_batch(
    files: Sequence[Path], step: int, validation: bool, progress: Progress, notes: list[str]
) -> SavedBatch:
    dialogues: dict[tuple[int, int], SavedDialogue] = {}
    total = 0
    for file in files:
        name, broken = f"{file.parent.name}/{file.name}", 0
        progress(name)
        try:
            for row in _json_lines(file):
                try:
                    dialogue = parse_dialogue(row, step)
                    dialogues[dialogue.place] = dialogue
                except (UserError, ValueError, OverflowError):
                    broken += 1
        except OSError as error:
            notes.append(f"{name} cannot be read ({_short(error)})")
        _note_broken(broken, name, notes)
        total += broken
    return SavedBatch(step, validation, tuple(dialogues[place] for place in sorted(dialogues)), total)


def _note_broken(broken: int, name: str, notes: list[str]) -> None:
    if broken:
        verb = "is" if broken == 1 else "are"
        notes.append(f"{counted(broken, 'row')} of {name} could not be read and {verb} left out")


def _json_lines(file: Path) -> Iterator[Any]:
    """Every non-empty line as JSON; None for a line that is not JSON."""
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield _json(line)


def _json(line: bytes) -> Any:
    try:
        return orjson.loads(line)  # three times as fast, but refuses NaN and lone surrogates
    except ValueError:
        try:
            return encodable(json.loads(line))
        except (ValueError, RecursionError):
            return None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
