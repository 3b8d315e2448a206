"""What the commands share: one clear sentence and an exit status instead of a traceback."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import signal
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

from mapo_jax.errors import UserError

# Options of glibc's `mallopt`, numbered as in malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


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

    0: done. 2: bad input; the sentence goes to standard error. 3: another process of the run is gone
    (`peers`). 124: stopped by its deadline. 128 + n: stopped by signal n. Anything else is a defect of ours
    and keeps its traceback.
    """
    keep_freed_memory()
    try:
        command()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)  # it may quote what a server sent
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.status
    except BrokenPipeError:
        return 0
    return 0


def keep_freed_memory() -> None:
    """Lets the C library reuse the memory that a program on the CPU works in, for the life of the process.

    XLA takes that memory anew for every run of a program. By default glibc asks the system for each large
    piece and gives it back at once, and the system clears every page again: a quarter of an update of the
    small model. Does nothing where programs run on an accelerator, or the C library is not glibc.
    """
    accelerated = any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
    if (accelerated and os.environ.get("JAX_PLATFORMS") != "cpu") or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
        mallopt(option, value)


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


def use_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs on the disk, so that the next run of the same shapes starts faster.

    Args:
      folder: where; None for the user's cache folder.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder or cache_folder("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
