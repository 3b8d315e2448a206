"""A journal of finished turns, from which a killed step continues.

One file for each collection (`journal/train_000012.jsonl`), one line for each opening message and each
finished turn: the sampled ids and log-probabilities, the judgement, the action, the user's reply. Turns at
the end of a dialogue that have no score, or in which the dialogue failed, are not continued from: they are
repeated, so that a past outage leaves no gap.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import NonNegativeInt, TypeAdapter

from mapo_jax.environment.dialogue import DialogueState, Turn
from mapo_jax.files import append_line, as_path, in_bucket, part_of, write_whole

LOG = logging.getLogger("mapo_jax.journal")  # without a handler: standard error
JOURNAL_FOLDER = "journal"
COPIED_EVERY = 30.0  # seconds between copies to a bucket: the most that a lost machine loses


@dataclass(frozen=True)
class Entry:
    """A finished turn of one dialogue, and the dialogue's state after it."""

    scenario: str  # id of its card
    seed: int  # of its dialogue
    index: NonNegativeInt  # of the turn
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    turn: Turn
    user: str  # the next message
    outcome: str | None
    failure: str | None
    rule: str | None

    def follows(self, state: DialogueState) -> bool:
        """Whether it is the next turn of this dialogue."""
        return state.outcome is None and self.index == state.turn_count and self.turn.user == state.user

    def after(self, state: DialogueState) -> DialogueState:
        """The dialogue with this turn."""
        turns = (*state.turns, self.turn)
        end = {"outcome": self.outcome, "failure": self.failure, "rule": self.rule}
        return replace(state, turns=turns, user=self.user, **end)

    @property
    def complete(self) -> bool:
        """Whether no role failed in it."""
        return self.turn.scored and self.outcome != "error"


@dataclass(frozen=True)
class Opening:
    """A dialogue's first message."""

    scenario: str
    seed: int
    opening: str


_ENTRY, _OPENING = TypeAdapter(Entry), TypeAdapter(Opening)


class Journal(AbstractContextManager):
    """The journal of one collection; an existing file is read first."""

    def __init__(self, file: Path | str, *others: Path | str) -> None:
        """Opens the journal.

        Args:
          file: where to write; it need not exist.
          others: files of the same collection by other processes, from a run with another number of them.
        """
        self._target = self._path = as_path(file)
        if in_bucket(file):  # objects cannot be appended to: write a local file, and copy it now and then
            self._path = Path(tempfile.mkdtemp(prefix="mapo_jax.")) / self._target.name
            if self._target.exists():
                self._path.write_bytes(self._target.read_bytes())
        self._copied = time.monotonic()
        self._openings: dict[tuple[str, int], str] = {}
        self._turns: dict[tuple[str, int], list[Entry]] = {}
        for other in map(as_path, others):
            self._read(other, other.read_bytes())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        data = self._path.read_bytes() if self._path.exists() else b""
        self._read(self._path, data)
        # The next line must not continue one that a kill cut off.
        append_line(self._path, b"\n" if data and not data.endswith(b"\n") else b"")

    def opening(self, scenario: str, seed: int) -> str | None:
        """The first message of a dialogue, if it was written."""
        return self._openings.get((scenario, seed))

    def note_opening(self, scenario: str, seed: int, message: str) -> None:
        """Writes a first message."""
        self._write(asdict(Opening(scenario, seed, message)))

    def turns(self, state: DialogueState) -> Iterator[tuple[Entry, DialogueState]]:
        """The finished turns that follow a dialogue's opening, each with the dialogue after it."""
        entries = list(self._turns.get((state.scenario.id, state.seed), ()))
        while entries and not entries[-1].complete:
            entries.pop()
        for entry in entries:
            if not entry.follows(state):
                return
            state = entry.after(state)
            yield entry, state

    def note(self, state: DialogueState, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Writes the last turn of a dialogue, with the tokens of its reply."""
        entry = Entry(
            state.scenario.id,
            state.seed,
            state.turn_count - 1,
            tuple(ids),
            tuple(logprobs),
            state.turns[-1],
            state.user,
            state.outcome,
            state.failure,
            state.rule,
        )
        self._write(asdict(entry))

    def close(self) -> None:
        """Copies the file to its bucket, if the journal is in one."""
        if self._path != self._target:
            write_whole(self._target, self._path.read_bytes())
            self._copied = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, file: Path, data: bytes) -> None:
        """Reads a journal's lines. The last one may be cut off by a kill: that turn was not finished."""
        lines = data.splitlines(keepends=True)
        broken = [line for line in lines if line.strip() and not self._read_line(line)]
        if damaged := [line for line in broken if line is not lines[-1] or line.endswith(b"\n")]:
            LOG.warning("%s: lines left out because they are no finished turns: %d", file, len(damaged))

    def _read_line(self, line: bytes) -> bool:
        """Reads one line; False if it is neither a message nor a turn."""
        try:
            row = json.loads(line)
            if isinstance(row, dict) and "opening" in row:
                opening = _OPENING.validate_python(row)
                self._openings[opening.scenario, opening.seed] = opening.opening
                return True
            entry = _ENTRY.validate_python(row)
        except (ValueError, RecursionError):  # ValidationError is a ValueError
            return False
        turns = self._turns.setdefault((entry.scenario, entry.seed), [])
        turns[entry.index :] = [entry]  # a repeated turn replaces the old one and all after it
        return True

    def _write(self, row: dict) -> None:
        # One write, and so whole after a kill of the process; it is not synced to the disk.
        append_line(self._path, json.dumps(row).encode() + b"\n")
        if time.monotonic() - self._copied > COPIED_EVERY:
            self.close()


def journal_files(folder: Path | str, stream: str, step: int, part: str = "") -> list[Path]:
    """The journal file of a process for one collection, and the files of other processes.

    Args:
      stream: train or evaluation.
      step: finished steps.
      part: of several processes: `files.part_name`.
    """
    whole = as_path(folder) / JOURNAL_FOLDER / f"{stream}_{step:06d}.jsonl"
    file = part_of(whole, part)
    return [file, *(other for other in sorted(whole.parent.glob(f"{whole.stem}*.jsonl")) if other != file)]


def prune(folder: Path | str, step: int) -> None:
    """Removes the journals of steps before `step`, after which there is a whole checkpoint."""
    for file in (as_path(folder) / JOURNAL_FOLDER).glob("*_*.jsonl"):
        number = re.fullmatch(r"[a-z]+_(\d+)(-\d+-of-\d+)?\.jsonl", file.name)
        if number and int(number.group(1)) < step:
            file.unlink(missing_ok=True)
