"""Reading what others saved: JSON, and JSON lines with the number of every line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mapo_jax.errors import UserError


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
    """The value that a JSON file holds.

    Raises:
      UserError: it cannot be read, or is not JSON (the line is named).
    """
    try:
        return json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, is not JSON: {error.msg}") from error


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
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}, is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}, holds {type(row).__name__}, not an object")
        yield place, row
    if empty:
        raise UserError(f"the {what} {path} are empty; one JSON object per line is needed")
