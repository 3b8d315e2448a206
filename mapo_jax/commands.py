"""Shared by all commands: exit statuses, one-sentence errors, and settings of the process."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import io
import os
import platform
import signal
import sqlite3
import subprocess
import sys
import textwrap
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mapo_jax import __version__
from mapo_jax.errors import UserError
from mapo_jax.files import storage_problem
from mapo_jax.startup import STOPPED, imported

if TYPE_CHECKING:
    from rich.console import Console

# As numbered in malloc.h and mman.h.
_TRIM_THRESHOLD, _MMAP_MAX, _MADV_HUGEPAGE = -1, -4, 14
_HUGE_PAGES_FOR, _PAGE = 2**30, 2**21  # bytes


class Stopped(Exception):
    """The command or run was stopped, by a signal or for another `reason`; all its files are whole."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    @property
    def status(self) -> int:
        """128 + n for signal n; 124, as the command `timeout` exits, for any other reason."""
        signals = signal.Signals.__members__
        return 128 + signals[self.reason] if self.reason in signals else 124


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m mapo_jax.NAME`, which knows `--version`."""
    parser = argparse.ArgumentParser(prog=f"python -m mapo_jax.{name}", description=description)
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def run_command(command: Callable[[], None]) -> int:
    """Runs a command and returns its exit status.

    0: success. 2: bad input or a failing machine (`machine_errors`), with one sentence on standard error.
    3: another process of the run is gone (`running/processes.py`). 124: stopped by its deadline. 128 + n:
    stopped by signal n. Any other exception is a bug of this package and keeps its traceback.

    Standard output gets a `?` for every character that its encoding lacks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    imported()
    try:
        with machine_errors():
            command()
            sys.stdout.flush()
    except UserError as error:
        _drop_output()
        _complain(f"error: {printable(str(error))}")  # it may quote what a server sent
        return 2
    except Stopped as stop:
        _complain(str(stop))
        return stop.status
    except KeyboardInterrupt:  # a command without safe points
        _drop_output()
        print(STOPPED, file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _drop_output()
        return 0
    return 0


def _drop_output() -> None:
    """Discards unprintable output, which the interpreter would otherwise report again at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def machine_errors() -> Iterator[None]:
    """Turns errors of this machine into UserErrors.

    Raises:
      UserError: a disk is full, read-only or failing, a path cannot be used, or jax finds no device of the
        requested platform.
    """
    try:
        yield
    except OSError as error:
        if (sentence := storage_problem(error)) is None:
            raise
        raise UserError(sentence) from error
    except sqlite3.OperationalError as error:
        if not any(word in str(error) for word in ("disk", "readonly", "unable to open")):
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
    """A shell that prints a sentence if this process is killed or aborted.

    JAX's coordination service aborts a process with a stack trace when process 0 is gone, and the system
    kills one that takes too much memory; the process itself can print nothing then.
    """

    _shell: subprocess.Popen | None = None

    @classmethod
    def post(cls, sentence: str) -> None:
        """Starts the shell, which prints `sentence` to standard error unless `dismiss` is called."""
        cls.dismiss()
        script = 'read line; [ "$line" = dismissed ] || echo "error: $0" >&2'
        cls._shell = subprocess.Popen(
            ["sh", "-c", script, sentence], stdin=subprocess.PIPE, start_new_session=True
        )

    @classmethod
    def dismiss(cls) -> None:
        """Ends the shell without a sentence."""
        if cls._shell is not None:
            with suppress(OSError):
                cls._shell.communicate(b"dismissed\n", timeout=5)
            cls._shell = None


def exit_now(status: int) -> NoReturn:
    """Exits this process at once, from any thread."""
    Sentinel.dismiss()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def printable(text: str) -> str:
    """`text` for a terminal: control characters and changes of reading direction become escapes."""
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else ascii(character)[1:-1]
        for character in text
    )


def show(console: Console, text: str, style: str = "") -> None:
    """Prints text as it is; on a terminal its lines are wrapped between words, and never inside one."""
    from rich.text import Text

    if console.is_terminal:
        options = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
        text = "\n".join(textwrap.fill(line, console.width, **options) for line in text.split("\n"))
    console.print(Text(text, style), soft_wrap=True)


def _complain(text: str) -> None:
    """Shows a line on standard error."""
    from rich.console import Console

    show(Console(stderr=True), text)


def cache_folder(name: str) -> Path:
    """The user's cache folder NAME: $XDG_CACHE_HOME/mapo_jax/NAME, by default ~/.cache/mapo_jax/NAME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mapo_jax" / name


def prepare_jax(compilation_cache: str | None = None) -> None:
    """Settings of jax and of this process; call it before the first compiled program.

    Compiled programs are cached on disk, so that the next run of the same shapes starts faster. Without an
    accelerator, freed memory stays with the process. XLA allocates work memory for every program; by default
    glibc returns large blocks to the system, which clears every page again: a third of the time of an update
    of the small model.

    Args:
      compilation_cache: the folder of compiled programs; None for the user's cache folder.
    """
    import jax

    jax.config.update("jax_compilation_cache_dir", str(compilation_cache or cache_folder("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    accelerated = any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
    if platform.libc_ver()[0] == "glibc" and (not accelerated or os.environ.get("JAX_PLATFORMS") == "cpu"):
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # other threads have other heaps
        _keep_memory()


def _keep_memory() -> None:
    """Lets glibc allocate from its heap only, which never shrinks, with huge pages."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    # madvise works on addresses: allocate a block of the heap, do not touch it, and free it again.
    if block := libc.malloc(_HUGE_PAGES_FOR):
        start = -(-block // _PAGE) * _PAGE
        libc.madvise(start, (block + _HUGE_PAGES_FOR - start) // _PAGE * _PAGE, _MADV_HUGEPAGE)
        libc.free(block)
