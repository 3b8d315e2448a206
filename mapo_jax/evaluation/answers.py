"""Getting a benchmark's prompts answered, each answer saved as soon as it is there."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mapo_jax.config import GONE, differing_keys
from mapo_jax.errors import UserError
from mapo_jax.files import disk_errors, encodable, write_whole
from mapo_jax.json_files import read_json, read_rows
from mapo_jax.running.run_folder import HARMLESS_KEYS
from mapo_jax.scores.speech import text_of

SETTINGS, ANSWERS = "settings.json", "answers.jsonl"

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Prompt:
    """One thing to be asked."""

    id: str  # unique; random numbers follow from it
    text: str
    name: Mapping[str, Any]  # what names the answer in its saved row, such as {"id": "17"}

    @property
    def messages(self) -> Messages:
        """As a chat."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Answer:
    """What was said."""

    text: str | None  # its content, reasoning in it included; None where a server sent none
    truncated: bool  # cut by its token limit


class Answerer(Protocol):
    """A model that can be asked many things at once."""

    def answer(self, prompts: Sequence[Prompt], save: Callable[[Prompt, Answer], None]) -> None:
        """Answers all prompts, and calls `save` for each as soon as it is answered, in any order.

        What `save` raises ends it.

        Raises:
          UserError: it cannot go on; what was saved stays saved.
        """
        ...


class Folder:
    """The folder of one evaluation: what is asked of whom (`settings.json`), and a file of finished rows.

    A row is one line, written at once, so that a kill leaves whole lines and at most one torn last one, which
    is cut off before the file is read again.
    """

    def __init__(self, path: Path | str, file: str) -> None:
        self.path = Path(path)
        self.file = self.path / file

    @contextmanager
    def opened(self, settings: Mapping[str, Any]) -> Iterator[IO[bytes]]:
        """Takes the folder for this process; yields the file, open for appending.

        Args:
          settings: what determines the rows, as JSON values. A folder of other settings is refused.

        Raises:
          UserError: other settings, or files of someone else, lie there; another process is at work in it;
            the place cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.file, "ab")  # noqa: SIM115  (held open below)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror}; choose another --output"
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is at work in {self.path}; wait for it or choose another --output"
                ) from error
            self._check(encodable(json.loads(json.dumps(settings))))
            _cut_torn_line(self.file)
            yield file

    def _check(self, settings: Mapping[str, Any]) -> None:
        known = self.path / SETTINGS
        if not self.file.stat().st_size:  # nothing is kept yet, whatever was meant to be
            write_whole(known, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
            return
        if not known.exists():
            raise UserError(f"{self.file} is not ours (no {SETTINGS} beside it); choose another --output")
        saved = read_json(known, "settings")
        if not isinstance(saved, dict):
            raise UserError(f"{known} holds no settings; choose another --output")
        harmless = (*HARMLESS_KEYS, *GONE)
        keys = [key for key in differing_keys(saved, settings) if not key.startswith(harmless)]
        if keys:
            raise UserError(
                f"{self.path} holds an evaluation with {keys[0]} {saved.get(keys[0])!r}, not "
                f"{settings.get(keys[0])!r}; choose another --output"
            )

    def rows(self, **needed: type | UnionType) -> list[dict[str, Any]]:
        """The rows that are there.

        Args:
          needed: what each row must hold, by name.

        Raises:
          UserError: the file cannot be read, or a row lacks what it must hold; names the line.
        """
        if not self.file.exists() or not self.file.stat().st_size:
            return []
        rows = []
        for place, row in read_rows(self.file, "saved rows"):
            for name, kind in needed.items():
                if not isinstance(row.get(name, ...), kind):
                    raise UserError(
                        f"{place}, is no saved row ({name!r} is missing or of another type); remove the "
                        "line, and the same command makes it again"
                    )
            rows.append(row)
        return rows


def append(file: IO[bytes], row: Mapping[str, Any]) -> None:
    """Adds a row to an opened folder's file.

    Raises:
      UserError: the disk is full; the rows before are whole.
    """
    with disk_errors(Path(file.name)):
        file.write(json.dumps(encodable(row), ensure_ascii=False).encode() + b"\n")
        file.flush()


def _cut_torn_line(file: Path) -> None:
    data = file.read_bytes()
    if data and not data.endswith(b"\n"):
        with file.open("r+b") as torn:
            torn.truncate(data.rfind(b"\n") + 1)


def ask(
    make_answerer: Callable[[], Answerer],
    prompts: Sequence[Prompt],
    folder: Folder,
    settings: Mapping[str, Any],
    console: Console,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Asks what was not asked before; afterwards every prompt has its row in the folder's file.

    A row has the prompt's name, `answer` (null where the model gave none), and `truncated`.

    Args:
      make_answerer: called only if something is left to be asked.
      settings: what determines the answers; a folder of other settings is refused.
      check: called after every answer; may raise to stop.

    Raises:
      UserError: the folder cannot be used (see `Folder.opened`), the answerer cannot go on, or an answer is
        neither text nor a list of text parts; such a one is not saved.
    """
    with folder.opened(settings) as file:
        done = {_key(row, prompts[0].name) for row in folder.rows()} if prompts else set()
        missing = [prompt for prompt in prompts if _key(prompt.name, prompt.name) not in done]
        if missing and done:
            console.print(f"{len(prompts) - len(missing)} of {len(prompts)} answers are there already")
        if not missing:
            return
        with progress(console, "answers", len(missing)) as advance:
            unusable: list[str] = []

            def save(prompt: Prompt, answer: Answer) -> None:
                try:
                    text = text_of(answer.text)
                except ValueError as problem:
                    unusable.append(str(problem))
                else:
                    append(file, {**prompt.name, "answer": text, "truncated": answer.truncated})
                    advance(1)
                check()

            try:
                make_answerer().answer(missing, save)
                if unusable:
                    raise UserError(f"{len(unusable)} answers cannot be used (the last: {unusable[-1]})")
            except UserError as error:
                saved = len(folder.rows())
                raise UserError(
                    f"{error}; {saved} of {len(prompts)} answers are saved in {folder.file}, and the same "
                    "command goes on from there"
                ) from error


def _key(row: Mapping[str, Any], name: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(part)) for part in name)


@contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line at every tenth elsewhere; yields what to call with the number done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            bar.update(task, completed=done)
            if not console.is_terminal and 10 * done // total > 10 * before // total:
                console.print(f"{done} of {total} {what}")

        yield advance
