"""Reading JSON and JSON-lines files, with errors that name the file and the line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mapo_jax.errors import UserError
from mapo_jax.files import encodable


def read_json(path: str | Path, what: str) -> Any:
    """The value in a JSON file, unpaired surrogates replaced (see `encodable`).

    Args:
      what: what the file holds, for error messages.

    Raises:
      UserError: the file cannot be read, or is not JSON; names the line.
    """
    return _parse("".join(line for _, line in _lines(path, what)), path, None, encodable)


def read_rows(path: str | Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file; arguments and errors as of `read_values`.

    Raises:
      UserError: also if a line holds no JSON object.
    """
    for place, row in read_values(path, what):
        if not isinstance(row, dict):
            raise UserError(f"{place}, holds {type(row).__name__}, not an object")
        yield place, row


def read_values(path: str | Path, what: str, convert: Callable = encodable) -> Iterator[tuple[str, Any]]:
    """The values of a JSON-lines file, each with its place ("FILE, line N"); skips blank lines.

    Args:
      what: what the file holds, in the plural, for error messages.
      convert: applied to every value.

    Raises:
      UserError: the file cannot be read or has no values, or a line is not JSON; names the line.
    """
    empty = True
    for number, line in _lines(path, what):
        if line.strip():
            empty = False
            yield f"{path}, line {number}", _parse(line, path, number, convert)
    if empty:
        raise UserError(f"the {what} {path} are empty; one JSON object per line is needed")


def _lines(path: str | Path, what: str) -> Iterator[tuple[int, str]]:
    try:
        # Bytes that are not UTF-8 become surrogates, which no UTF-8 text has: so the line can be named.
        # Lines end at line breaks alone: a JSON string may hold the other characters that Unicode counts.
        with Path(path).open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if encodable(line) != line:
                    raise UserError(f"{path}, line {number}: not UTF-8 text; save the file as UTF-8")
                yield number, line
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error


def _parse(text: str, path: str | Path, line: int | None, convert: Callable[[Any], Any]) -> Any:
    try:
        return convert(json.loads(text))
    except (ValueError, RecursionError) as error:  # also an integer of more digits than Python converts
        place = f"{path}, line {line or getattr(error, 'lineno', 1)}"
        if isinstance(error, RecursionError):
            raise UserError(f"{place}, is nested too deeply to be read") from error
        raise UserError(f"{place}, is not JSON: {getattr(error, 'msg', error)}") from error
