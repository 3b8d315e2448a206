"""Reading what others saved: JSON, and JSON lines with the number of every line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mapo_jax.errors import UserError
from mapo_jax.files import encodable


def read_text(path: str | Path, what: str) -> str:
    """The text of a file.

    Args:
      what: what it holds, for the error's sentence.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the {what} {path}: it is not UTF-8 text") from error


def read_json(path: str | Path, what: str) -> Any:
    """The value that a JSON file holds, half characters replaced (see `encodable`).

    Raises:
      UserError: it cannot be read, or is not JSON (the line is named).
    """
    return _parse(read_text(path, what), lambda error: f"{path}, line {getattr(error, 'lineno', 1)}")


def _parse(text: str, place: Callable[[Exception], str]) -> Any:
    try:
        return encodable(json.loads(text))
    except RecursionError as error:
        raise UserError(f"{place(error)}, is nested too deeply to be read") from error
    except ValueError as error:  # also a whole number of more digits than Python converts
        raise UserError(f"{place(error)}, is not JSON: {getattr(error, 'msg', error)}") from error


def read_rows(path: str | Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place ("FILE, line N"); blank lines are passed over.

    Raises:
      UserError: the file cannot be read or has no rows, or a line holds no JSON object (its number is named).
    """
    empty = True
    # Not splitlines: a JSON string may hold the other characters that Unicode counts as line ends.
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        if not line.strip():
            continue
        empty = False
        place = f"{path}, line {number}"
        row = _parse(line, lambda error, place=place: place)
        if not isinstance(row, dict):
            raise UserError(f"{place}, holds {type(row).__name__}, not an object")
        yield place, row
    if empty:
        raise UserError(f"the {what} {path} are empty; one JSON object per line is needed")
