"""Files that are either whole or absent, on a disk or in a bucket; errors of disks as one sentence."""

import errno
import json
import os
import secrets
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mapo_jax.errors import UserError

CHECKSUMS_FILE = "checksums.json"
_CHUNK_BYTES = 2**24  # read at once
_READERS = 8  # files read in parallel; CRC-32 is computed without the interpreter's lock


def as_path(path: Path | str) -> Path:
    """`path` as a Path; a URL such as `gs://...` as an `etils.epath` path, which has the same methods."""
    if "://" not in str(path):
        return Path(path)
    from etils import epath

    return epath.Path(path)


def in_bucket(path: Path | str) -> bool:
    """Whether `path` is a URL of a bucket and not a path on this machine."""
    return "://" in str(path)


def write_whole(path: Path | str, content: str | bytes) -> None:
    """Writes a file atomically: to a temporary name beside `path`, synced, and renamed.

    A reader sees the old file or the new one, also after a kill. A bucket writes every object atomically.
    Raises OSError as the file system does; the old file is then unchanged.
    """
    path = as_path(path)
    data = content.encode() if isinstance(content, str) else content
    with _errors_name(path):
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
            with suppress(OSError):  # report the first error
                temporary.unlink(missing_ok=True)
            raise


def encodable(value: Any) -> Any:
    """A JSON value whose strings can be encoded as UTF-8: U+FFFD replaces each lone surrogate.

    JSON can spell a lone surrogate ("\\ud83d"); no file, terminal or request can hold one.
    """
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def required_object(path: Path | str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(as_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def read_object(path: Path | str) -> dict[str, Any] | None:
    """`required_object`, or None if the file is missing, truncated, or holds something else."""
    try:
        return required_object(path)
    except UserError:
        return None


def append_line(path: Path | str, line: bytes) -> None:
    """Appends a line in one write; after an error the file is unchanged but for lines of other processes.

    An object in a bucket cannot grow: it is read and written again with the line.
    """
    path = as_path(path)
    if in_bucket(path):
        path.write_bytes((path.read_bytes() if path.exists() else b"") + line)
        return
    with _errors_name(path), path.open("ab", buffering=0) as file:
        written = os.write(file.fileno(), line)
        if written < len(line):  # the disk filled up in the middle of the line
            os.ftruncate(file.fileno(), file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Sets the file name of OSErrors: a write to an open file names none, or the temporary one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def storage_problem(error: OSError, path: Path | str | None = None) -> str | None:
    """One sentence about a disk that is full, read-only or failing, or a path that cannot be used.

    Args:
      path: the file or folder to name; by default the file that the error names.

    Returns:
      The sentence, with the remedy; None for any other error.
    """
    sentence = _STORAGE.get(error.errno)
    if path is None:
        path = "a file or standard output" if error.filename is None else os.fsdecode(error.filename)
    return sentence and sentence.format(path)


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
_LIBRARY_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)  # known by their text


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Raises UserError that names `path` where a disk is full, read-only or failing.

    A library may wrap the system's error or give only its text. Other errors pass through. Files that were
    saved before are whole: the same command continues from them.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            sentence = storage_problem(cause, path) if isinstance(cause, OSError) else None
            codes = (code for code in _LIBRARY_CODES if os.strerror(code) in str(cause))
            if sentence is None and (code := next(codes, None)) is not None:
                sentence = _STORAGE[code].format(path)
            if sentence is not None:
                raise UserError(sentence) from error
            cause = cause.__cause__ or cause.__context__
        raise


# --- Checksums. ---

Checksums = dict[str, list[int]]
"""Size in bytes and CRC-32 of files, by name."""


def checksums(folder: Path, known: Checksums | None = None, without: str | None = None) -> Checksums:
    """Size and CRC-32 of every file below `folder` except CHECKSUMS_FILE, by its relative path.

    Args:
      known: checksums that are already computed.
      without: a file to leave out.
    """
    known = known or {}
    names = sorted({*_files(folder)} - {CHECKSUMS_FILE, without, *known})
    with ThreadPoolExecutor(_READERS) as pool:
        values = pool.map(lambda name: _checksum(folder / name), names)
        return {**known, **dict(zip(names, values, strict=True))}


def write_checksums(folder: Path, known: Checksums | None = None, without: str | None = None) -> None:
    """Writes CHECKSUMS_FILE into `folder`; arguments as of `checksums`."""
    files = checksums(folder, known, without)
    write_whole(folder / CHECKSUMS_FILE, json.dumps({"files": files, "crc32": crc_of(files)}, indent=1))


def read_checksums(folder: Path) -> Checksums | None:
    """What `write_checksums` wrote; None without the file.

    Raises:
      ValueError: the file is damaged.
    """
    file = folder / CHECKSUMS_FILE
    if not file.exists():
        return None
    content = read_object(file)
    if content is None or content.get("crc32") != crc_of(content.get("files")):
        raise ValueError(f"{file} is damaged")
    return content["files"]


def damaged_file(folder: Path) -> str | None:
    """The first file below `folder` that differs from its checksum; None if there is none.

    Files without a checksum are not compared, nor is a folder without CHECKSUMS_FILE.
    """
    try:
        known = read_checksums(folder) or {}
    except ValueError:
        return CHECKSUMS_FILE
    return next(differing(folder, known), None)


def differing(folder: Path, known: Checksums) -> Iterator[str]:
    """The files that are missing or have another size or checksum."""
    with ThreadPoolExecutor(_READERS) as pool:
        values = pool.map(lambda name: _checksum(folder / name), known)
        yield from (name for name, value in zip(known, values, strict=True) if value != known[name])


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
            while chunk := content.read(_CHUNK_BYTES):
                size, value = size + len(chunk), zlib.crc32(chunk, value)
    except FileNotFoundError:
        return None
    return [size, value]


def crc_of(value: Any) -> int:
    """CRC-32 of a JSON value, whatever the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


# --- Parts, folders. ---


def part_name(index: int, count: int) -> str:
    """What a process appends to the names of its files; nothing for a single process."""
    return "" if count == 1 else f"-{index:05d}-of-{count:05d}"


def part_of(file: Path, part: str) -> Path:
    """The file of one process: step_000010.jsonl -> step_000010-00001-of-00004.jsonl."""
    return file.with_name(f"{file.stem}{part}{file.suffix}")


@contextmanager
def local_folder(folder: Path | str, *, write: bool = False) -> Iterator[Path]:
    """A flat folder on this machine's disk, a copy of one in a bucket: for libraries without buckets.

    Args:
      write: creates the folder, and copies it back to the bucket at the end of the context.
    """
    folder = as_path(folder)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mapo_jax.") as temporary:
        copy_files(folder, Path(temporary))
        yield Path(temporary)
        if write:
            copy_files(Path(temporary), folder)


def copy_files(source: Path, target: Path) -> None:
    """Copies the files of a flat folder, if it exists, each atomically; either may be in a bucket."""
    if source.is_dir():
        for file in source.iterdir():
            write_whole(target / file.name, file.read_bytes())
