"""Lists the commands: `python -m mapo_jax`."""

from __future__ import annotations

import argparse
import ast
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from mapo_jax import __version__

COMMANDS = (
    "train", "warmstart", "evaluate", "export", "report", "rate",
    "serve", "chat", "chat_log", "drift", "draft",
)  # fmt: skip


def summary(command: str) -> str:
    """The first line of a command's docstring; nothing is imported, so that listing takes no time."""
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the commands, or the version."""
    columns = shutil.get_terminal_size().columns - 1
    lines = "\n".join(
        textwrap.fill(
            f"python -m mapo_jax.{command:<10} {summary(command)}",
            columns,
            initial_indent="  ",
            subsequent_indent=" " * 32,
            break_long_words=False,
        )
        for command in COMMANDS
    )
    parser = argparse.ArgumentParser(
        prog="python -m mapo_jax",
        description=f"commands (each has --help):\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m mapo_jax.COMMAND",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.parse_args(arguments)
    parser.print_help()


if __name__ == "__main__":
    main()
