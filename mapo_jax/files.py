"""Files that are either whole or absent, on a disk or in a bucket."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHECKSUMS_FILE = "checksums.json"
_PIECE = 2**24  # bytes read at once
_READERS = 8  # files read at once; CRC-32 is computed without the interpreter's lock


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
    with _about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if in_bucket(path):
            path.write_bytes(data)
            return
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
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
    with _about(path), path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if os.write(file.fileno(), line) < len(line):  # the disk filled up in the middle of the line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Errors of the system name `path`: what is written to an open file names none, and a temporary name
    says nothing."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def storage_problem(error: OSError, path: Path | str | None = None) -> str | None:
    """One sentence about a disk that is full, read-only or failing, or a path that cannot be used.

    Args:
      path: what was being written, where it says more than the file that the error names.

    Returns:
      The sentence, with the file and the remedy; None for any other error.
    """
    words = _STORAGE.get(error.errno)
    if path is None:
        path = "a file or standard output" if error.filename is None else os.fsdecode(error.filename)
    return words and words.format(path)


_STORAGE = {
    errno.ENOSPC: "the disk that holds {} is full; free some space and start the same command again",
    errno.EDQUOT: "the quota of the disk that holds {} is used up; free some space and start the same "
    "command again",
    errno.EROFS: "{} lies on a disk that is read-only; make it writable and start the same command again",
    errno.EACCES: "{} may not be used by this user (permission denied); change its permissions",
    errno.EPERM: "{} may not be used by this user (operation not permitted); change its permissions",
    errno.EIO: "{} could not be read or written (input/output error); check the disk and start the same "
    "command again",
    errno.EFBIG: "{} would be larger than this user's files may be; raise the limit (ulimit -f)",
    errno.ENOTDIR: "{} cannot be used: a part of that path is a file; give another path",
    errno.EEXIST: "{} cannot be used: something of another kind has that name; give another path",
    errno.EISDIR: "{} is a folder, where a file is wanted; give another path",
    errno.ENAMETOOLONG: "{} is too long a name for that disk; give another path",
}


def library_storage_problem(error: BaseException | None, path: Path | str) -> str | None:
    """`storage_problem` of what a library raised, which wraps the system's error or carries only its text."""
    while error is not None:
        if isinstance(error, OSError) and (words := storage_problem(error, path)):
            return words
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES):
            if os.strerror(code) in str(error):
                return _STORAGE[code].format(path)
        error = error.__cause__ or error.__context__
    return None


# --- Checksums. ---


def checksums(
    folder: Path, known: Mapping[str, list[int]] | None = None, without: str | None = None
) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below `folder`, by its path from there, but of CHECKSUMS_FILE.

    Args:
      known: those that need not be computed again.
      without: a file to leave out.
    """
    known = known or {}
    names = sorted({*_files(folder)} - {CHECKSUMS_FILE, without, *known})
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _checksum(folder / name), names)
        return {**known, **dict(zip(names, found, strict=True))}


def write_checksums(
    folder: Path, known: Mapping[str, list[int]] | None = None, without: str | None = None
) -> None:
    """Writes CHECKSUMS_FILE into `folder`; arguments as of `checksums`."""
    found = checksums(folder, known, without)
    write_whole(folder / CHECKSUMS_FILE, json.dumps({"files": found, "crc32": _crc_of(found)}, indent=1))


def read_checksums(folder: Path) -> dict[str, list[int]] | None:
    """What `write_checksums` wrote; None if there is no such file.

    Raises:
      ValueError: it is damaged itself.
    """
    file = folder / CHECKSUMS_FILE
    if not file.exists():
        return None
    content = read_object(file)
    if content is None or content.get("crc32") != _crc_of(content.get("files")):
        raise ValueError(f"{file} is damaged")
    return content["files"]


def damaged_file(folder: Path) -> str | None:
    """The first file below `folder` that is not as it was when its checksums were written; None if all are.

    A folder without checksums counts as sound; files that came later do too.
    """
    try:
        known = read_checksums(folder) or {}
    except ValueError:
        return CHECKSUMS_FILE
    return next(differing(folder, known), None)


def differing(folder: Path, known: Mapping[str, list[int]]) -> Iterator[str]:
    """Those of the files that are missing or have another size or checksum."""
    with ThreadPoolExecutor(_READERS) as pool:
        now = pool.map(lambda name: _checksum(folder / name), known)
        yield from (name for name, found in zip(known, now, strict=True) if found != known[name])


def _files(folder: Path, above: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{above}{entry.name}/")
        else:
            yield above + entry.name


def _checksum(file: Path) -> list[int] | None:
    """Size in bytes and CRC-32; None without the file."""
    size = value = 0
    try:
        with file.open("rb") as content:
            while piece := content.read(_PIECE):
                size, value = size + len(piece), zlib.crc32(piece, value)
    except FileNotFoundError:
        return None
    return [size, value]


def _crc_of(found: Any) -> int:
    return zlib.crc32(json.dumps(found, sort_keys=True).encode())


# --- Parts, folders. ---


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
