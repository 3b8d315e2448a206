"""What the commands share: one clear sentence and an exit status instead of a traceback."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import os
import platform
import signal
import sqlite3
import subprocess
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from mapo_jax.errors import UserError
from mapo_jax.files import storage_problem

# As numbered in malloc.h and mman.h.
_TRIM_THRESHOLD, _MMAP_MAX, _MADV_HUGEPAGE = -1, -4, 14
_HUGE_PAGES_FOR, _PAGE = 2**30, 2**21  # bytes


class Stopped(Exception):
    """The command was asked to stop, by a signal or what `reason` says, and has left everything whole."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    @property
    def status(self) -> int:
        """128 + n for signal n; 124, as of the command `timeout`, for any other reason."""
        known = signal.Signals.__members__
        return 128 + known[self.reason] if self.reason in known else 124


def run_command(command: Callable[[], None]) -> int:
    """Runs a command's body and returns its exit status.

    0: done. 2: bad input, or a machine that cannot do it (`machine_errors`); the sentence goes to standard
    error. 3: another process of the run is gone (`running/processes.py`). 124: stopped by its deadline.
    128 + n: stopped by signal n. Anything else is a defect of ours and keeps its traceback.

    Standard output gets a `?` for every character that its encoding does not have.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        with machine_errors():
            command()
            sys.stdout.flush()
    except UserError as error:
        _drop_output()
        print(f"error: {printable(str(error))}", file=sys.stderr)  # it may quote what a server sent
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.status
    except BrokenPipeError:
        _drop_output()
        return 0
    return 0


def _drop_output() -> None:
    """What cannot be printed any more is not tried again at the interpreter's end, which would say so."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def machine_errors() -> Iterator[None]:
    """Turns what this machine lacks into UserErrors: room and rights on its disks, and devices.

    Raises:
      UserError: a disk is full, read-only or failing, a path cannot be used, or jax finds no device of the
        platform that it was told to use.
    """
    try:
        yield
    except OSError as error:
        if (words := storage_problem(error)) is None:
            raise
        raise UserError(words) from error
    except sqlite3.OperationalError as error:
        if not any(words in str(error) for words in ("disk", "readonly", "unable to open")):
            raise
        raise UserError(f"a database could not be written ({error}); free or repair the disk") from error
    except (RuntimeError, AssertionError) as error:
        frames = traceback.walk_tb(error.__traceback__)
        if not any(frame.f_globals.get("__name__") == "jax._src.xla_bridge" for frame, _ in frames):
            raise
        raise UserError(_without_device(str(error))) from error


def _without_device(reason: str) -> str:
    reason = " ".join(reason.split(" (set JAX_PLATFORMS")[0].split())[:200].rstrip(".")
    reason = reason or "no such device was found"
    if name := os.environ.get("JAX_PLATFORMS"):
        return (
            f"JAX_PLATFORMS={name} names a platform that jax cannot use here ({reason}); name one that is "
            "there, such as cpu, or unset it"
        )
    return f"jax cannot use this machine's devices ({reason}); free them, or set JAX_PLATFORMS=cpu"


class Sentinel:
    """A shell that prints a sentence if this process ends without one of its own.

    JAX's coordination service aborts a process with a stack trace when process 0 is gone, and the system
    kills one that takes too much memory: neither leaves room for a sentence.
    """

    _shell: subprocess.Popen | None = None

    @classmethod
    def post(cls, sentence: str) -> None:
        """`sentence` is printed to standard error if this process ends before `dismiss`."""
        cls.dismiss()
        script = 'read word; [ "$word" = dismissed ] || echo "error: $0" >&2'
        cls._shell = subprocess.Popen(
            ["sh", "-c", script, sentence], stdin=subprocess.PIPE, start_new_session=True
        )

    @classmethod
    def dismiss(cls) -> None:
        """Sends it away."""
        if cls._shell is not None:
            with contextlib.suppress(OSError):
                cls._shell.communicate(b"dismissed\n", timeout=5)
            cls._shell = None


def exit_now(status: int) -> NoReturn:
    """Ends this process from any thread, whatever it waits for."""
    Sentinel.dismiss()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def printable(text: str) -> str:
    """`text` for a terminal: what would steer it, or turn the reading direction, is shown as an escape."""
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else ascii(character)[1:-1]
        for character in text
    )


def cache_folder(name: str) -> Path:
    """The user's cache folder for one kind of thing: $XDG_CACHE_HOME/mapo_jax/NAME, or below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mapo_jax" / name


def prepare_jax(compilation_cache: str | None = None) -> None:
    """Settings of the process for running programs; call it before the first one.

    Compiled programs are kept on the disk, so that the next run of the same shapes starts faster. Where there
    is no accelerator, the memory that programs work in is kept as well: XLA takes it anew for every program,
    by default glibc asks the system for each large piece and gives it back at once, and the system clears
    every page again, a third of an update of the small model.

    Args:
      compilation_cache: the folder of compiled programs; None for the user's cache folder.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", str(compilation_cache or cache_folder("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    accelerated = any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
    if platform.libc_ver()[0] == "glibc" and (not accelerated or os.environ.get("JAX_PLATFORMS") == "cpu"):
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # another thread has no such memory
        _keep_memory()


def _keep_memory() -> None:
    """Has glibc take memory from its heap alone, which never shrinks, and asks for huge pages below it."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = (
        [ctypes.c_void_p],
        [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    )
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    # The advice holds for addresses: take a piece of the heap, untouched, and give it back to the heap.
    if piece := libc.malloc(_HUGE_PAGES_FOR):
        start = -(-piece // _PAGE) * _PAGE
        libc.madvise(start, (piece + _HUGE_PAGES_FOR - start) // _PAGE * _PAGE, _MADV_HUGEPAGE)
        libc.free(piece)
