"""Getting a benchmark's prompts answered; each answer is saved as soon as it arrives."""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from mapo_jax.commands import show
from mapo_jax.config import GONE, differing_keys
from mapo_jax.environment.roles import Messages
from mapo_jax.errors import UserError
from mapo_jax.files import disk_errors, encodable, write_whole
from mapo_jax.json_files import read_json, read_rows
from mapo_jax.running.run_folder import HARMLESS_KEYS
from mapo_jax.running.stop import Check
from mapo_jax.speech import text_of

SETTINGS, ANSWERS = "settings.json", "answers.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One prompt of a benchmark."""

    id: str  # unique; determines the random numbers of the answer
    text: str
    name: Mapping[str, Any]  # identifies the answer in its saved row, such as {"id": "17"}

    @property
    def messages(self) -> Messages:
        """The prompt as a chat."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str | None  # its content, including reasoning; None where a server sent none
    truncated: bool  # cut by its token limit


class Answerer(Protocol):
    """A model that answers many prompts at once."""

    def answer(self, prompts: Sequence[Prompt], save: Callable[[Prompt, Answer], None]) -> None:
        """Answers all prompts, in any order, and calls `save` for each as soon as it is answered.

        An exception from `save` ends it.

        Raises:
          UserError: it cannot continue; saved answers stay saved.
        """
        ...


class Folder:
    """The folder of one evaluation: the settings that determine it (`settings.json`), and a file of rows.

    A row is one line in one write. So after a kill all lines are whole but perhaps the last, which is removed
    before the file is read again.
    """

    def __init__(self, path: Path | str, file: str) -> None:
        self.path = Path(path)
        self.file = self.path / file

    @contextmanager
    def opened(self, settings: Mapping[str, Any]) -> Iterator[IO[bytes]]:
        """Locks the folder for this process; yields the file, open for appending.

        Args:
          settings: what determines the rows, as JSON values. A folder with other settings is refused.

        Raises:
          UserError: the folder has other settings or files of another origin, another process uses it, or it
            cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.file, "ab")  # noqa: SIM115  (closed below)
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
        file = self.path / SETTINGS
        if not self.file.stat().st_size:  # without rows, older settings do not matter
            write_whole(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
            return
        if not file.exists():
            raise UserError(f"{self.file} is not ours (no {SETTINGS} beside it); choose another --output")
        saved = read_json(file, "settings")
        if not isinstance(saved, dict):
            raise UserError(f"{file} holds no settings; choose another --output")
        harmless = (*HARMLESS_KEYS, *GONE)
        keys = [key for key in differing_keys(saved, settings) if not key.startswith(harmless)]
        if keys:
            raise UserError(
                f"{self.path} holds an evaluation with {keys[0]} {saved.get(keys[0])!r}, not "
                f"{settings.get(keys[0])!r}; choose another --output"
            )

    def rows(self, **fields: type | UnionType) -> list[dict[str, Any]]:
        """The saved rows.

        Args:
          fields: names and types of the fields that each row must have.

        Raises:
          UserError: the file cannot be read, or a row lacks a field; names the line.
        """
        if not self.file.exists() or not self.file.stat().st_size:
            return []
        rows = []
        for place, row in read_rows(self.file, "saved rows"):
            for name, kind in fields.items():
                if not isinstance(row.get(name, ...), kind):
                    raise UserError(
                        f"{place}, is no saved row ({name!r} is missing or of another type); remove the "
                        "line, and the same command makes it again"
                    )
            rows.append(row)
        return rows


def append(file: IO[bytes], row: Mapping[str, Any]) -> None:
    """Appends a row to an opened folder's file.

    Raises:
      UserError: the disk is full; earlier rows are whole.
    """
    with disk_errors(Path(file.name)):
        file.write(json.dumps(encodable(row), ensure_ascii=False).encode() + b"\n")
        file.flush()


def _cut_torn_line(file: Path) -> None:
    content = file.read_bytes()
    with file.open("r+b") as torn:
        torn.truncate(content.rfind(b"\n") + 1)


def ask(
    make_answerer: Callable[[], Answerer],
    prompts: Sequence[Prompt],
    folder: Folder,
    settings: Mapping[str, Any],
    console: Console,
    check: Check = lambda: None,
) -> None:
    """Gets the missing answers; afterwards every prompt has its row in the folder's file.

    A row has the fields of the prompt's name, `answer` (null if the model gave none), and `truncated`.

    Args:
      make_answerer: called only if an answer is missing.
      settings: what determines the answers; a folder with other settings is refused.
      check: called after every answer; may raise to stop.

    Raises:
      UserError: the folder cannot be used (see `Folder.opened`), the answerer cannot continue, or an answer
        is neither text nor a list of text parts; such an answer is not saved.
    """

    def key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(field)) for field in prompts[0].name)

    with folder.opened(settings) as file:
        done = {key(row) for row in folder.rows()} if prompts else set()
        missing = [prompt for prompt in prompts if key(prompt.name) not in done]
        if missing and done:
            show(console, f"{len(prompts) - len(missing)} of {len(prompts)} answers are there already")
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
                raise UserError(
                    f"{error}; {len(folder.rows())} of {len(prompts)} answers are saved in {folder.file}, "
                    "and the same command goes on from there"
                ) from error


def fingerprint(items: Iterable[Any]) -> str:
    """A short hash of JSON values."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        digest.update(json.dumps(item).encode())
    return digest.hexdigest()


@contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line at every tenth; yields a function to call with the number finished."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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
