"""Files that are either whole or absent, on a disk or in a bucket."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def as_path(path: Path | str) -> Path:
    """`path` as a Path; for `gs://...` and the like an `etils.epath` one, which is used the same way."""
    if "://" not in str(path):
        return Path(path)
    from etils import epath

    return epath.Path(path)


def in_bucket(path: Path | str) -> bool:
    """Whether it is an object's name and not a file of this machine's."""
    return "://" in str(path)


def write_whole(path: Path | str, content: str | bytes) -> None:
    """Writes `content` under a temporary name beside `path`, syncs it, and renames it into place.

    A reader, or a run that was killed, sees the old file or the new one, never a part. In a bucket every
    object is written so, and nothing is renamed.
    Raises OSError as the file system does; the old file is then untouched.
    """
    path = as_path(path)
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if in_bucket(path):
        path.write_bytes(data)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def encodable(value: Any) -> Any:
    """A JSON value whose texts can be written as UTF-8: U+FFFD replaces each half of a surrogate pair.

    JSON can spell such a half alone ("\\ud83d"); neither a file, a terminal nor a request can hold it.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, dict):
        return {encodable(name): encodable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [encodable(inner) for inner in value]
    return value


def read_object(path: Path | str) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file, or none that holds an object (it may be cut)."""
    try:
        value = json.loads(as_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def append_line(path: Path | str, line: bytes) -> None:
    """Appends a line in one write; after an error the file is as it was.

    An object in a bucket cannot grow: it is read, and written again with the line.
    """
    path = as_path(path)
    if in_bucket(path):
        path.write_bytes((path.read_bytes() if path.exists() else b"") + line)
        return
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        try:
            written = os.write(handle, line)
            if written < len(line):  # the disk filled up in the middle of the line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def part_name(index: int, count: int) -> str:
    """What a process adds to the name of its part of a file; nothing if it is the only one."""
    return "" if count == 1 else f"-{index:05d}-of-{count:05d}"


def part_of(file: Path, part: str) -> Path:
    """The file of one process's part: step_000010.jsonl -> step_000010-00001-of-00004.jsonl."""
    return file.with_name(f"{file.stem}{part}{file.suffix}")


@contextmanager
def local_folder(folder: Path | str) -> Iterator[Path]:
    """A flat folder as one of this machine's, a copy if need be: for libraries that know no buckets."""
    folder = as_path(folder)
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mapo_jax.") as temporary:
        copy_files(folder, Path(temporary))
        yield Path(temporary)


def copy_files(source: Path, target: Path) -> None:
    """Copies the files of a flat folder, if there is one, each whole; either may be in a bucket."""
    if not source.is_dir():
        return
    for file in source.iterdir():
        if not in_bucket(file) and not in_bucket(target):
            shutil.copyfile(file, target / file.name)
        else:
            write_whole(target / file.name, file.read_bytes())
