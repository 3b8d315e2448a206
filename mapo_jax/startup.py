"""A command before its other imports, which take seconds: its first line, and its answer to Ctrl-C."""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

STOPPED = "stopped by SIGINT"
_ANSWER_ALONE = {"-h", "--help", "--version", "--keys"}  # options whose output is all that is wanted


def command_of(words: Sequence[str]) -> str | None:
    """The command that the words of `sys.orig_argv` start, such as "mapo_jax.train"; None: something else."""
    words = words[1:]
    while words and words[0].startswith("-") and words[0] != "-m":  # options of the interpreter
        words = words[2 if words[0] in ("-X", "-W") else 1 :]
    match words:
        case ["-m", module, *_] if module.startswith("mapo_jax."):
            return module
        case [script, *_] if (name := os.path.basename(script)).startswith("mapo-"):
            return f"mapo_jax.{name.removeprefix('mapo-')}"
    return None


def begin() -> None:
    """Prints the first line of this process's command, and ends it at once on Ctrl-C until `imported`."""
    if (command := command_of(sys.orig_argv)) is None:
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)
    if not _ANSWER_ALONE & set(sys.orig_argv):
        print(f"{command}: starting", file=sys.stderr, flush=True)


def imported() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> None:
    # No exception: an import may turn one into an ImportError.
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(128 + number)
