"""The memory that the compiler assigns to a program, from the files that it writes while it compiles.

By this total the compiler itself decides whether a program fits a chip. `jax.stages.Compiled.memory_analysis`
gives a larger figure, `temp_size`: a program whose arguments and `temp_size` are 16.24 GiB compiles for a
chip with 15.75 GiB, and its total is 15.31.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mapo_jax.errors import UserError

_TOTAL = re.compile(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+) ")
PATIENCE_S = 3600.0  # for one program; the slowest took minutes


def dump_options(folder: Path) -> dict[str, str | bool]:
    """Compiler options with which it writes its reports and the program's text into a folder."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def assigned(folder: Path) -> int | None:
    """Bytes of one chip that a program needs, its arguments included; None as long as it is not known."""
    for file in folder.glob("*memory-usage-report.txt"):
        if found := _TOTAL.search(file.read_text()):
            return int(found[1])
    return None


def optimised(folder: Path) -> str:
    """The text of the program whose memory was assigned."""
    (file,) = folder.glob("*after_optimizations_before_buffer_assignment.txt")
    return file.read_text()


def assign(folder: Path, arguments: Sequence[str]) -> int:
    """Compiles one program in another process, which is ended when its memory is assigned.

    Code generation, most of the time, is left out.

    Args:
      arguments: of `python -m tpu.compile` in the checkout's folder, for one program.

    Returns:
      As `assigned`.

    Raises:
      UserError: the process ended, or an hour passed, without a result.
    """
    command = [sys.executable, "-m", "tpu.compile", *arguments, "--dump", str(folder.absolute())]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=Path(__file__).parents[1])
        try:
            until = time.monotonic() + PATIENCE_S
            while (total := assigned(folder)) is None and process.poll() is None and time.monotonic() < until:
                time.sleep(0.5)
            total = assigned(folder) if total is None else total  # it may have ended in between
        finally:
            process.kill()
            process.wait()
    if total is None:
        raise UserError(f"{' '.join(command)} assigned no memory: {log.read_text()[-2000:]}")
    return total
