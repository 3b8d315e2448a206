"""From run folders to one HTML page that a person enjoys reading, or to a summary on the terminal.

    python -m mapo_jax.report --run RUN [--run OTHER ...] [--output FILE]
    python -m mapo_jax.report --run RUN --text

The page is one file without any outside resource: it opens from the disk, in light and dark, on a phone, and
on paper. What a run lacks, because it is unfinished or damaged, is left out and said.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mapo_jax.commands import run_command
from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.reporting.folder import read_run
from mapo_jax.reporting.page import MOST_RUNS, render

REPORT_FILE = "report.html"
DIALOGUES = 3000  # of training, per page


def write_report(
    runs: Sequence[Path | str],
    output: Path | str | None = None,
    *,
    dialogues: int = DIALOGUES,
    console: Console | None = None,
) -> Path:
    """Writes the page of one or more runs.

    Args:
      runs: run folders.
      output: the file; by default report.html in the first run's folder.
      dialogues: most dialogues of training, shared by the runs.
      console: shows what is going on; None for silence.

    Returns:
      The file.

    Raises:
      UserError: no run folder, too many of them, or a file that cannot be written.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs are too many for one page; give at most {MOST_RUNS}")
    output = Path(output) if output is not None else Path(runs[0]) / REPORT_FILE
    if output.is_dir():
        raise UserError(f"the output {output} is a folder; give the name of a file")
    if console is None:
        html = _page(runs, dialogues, lambda what: None)
    else:
        with console.status("reading") as status:
            html = _page(runs, dialogues, status.update)
    try:
        write_whole(output, html)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    return output


def _page(runs, dialogues, told) -> str:
    read = [read_run(run, dialogues=max(1, dialogues // len(runs)), progress=told) for run in runs]
    return render(read, progress=told)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (see commands.run_command)."""
    parser = argparse.ArgumentParser(
        prog="python -m mapo_jax.report",
        description="Writes one self-contained HTML page about a training run, or about several beside each "
        "other: did it get better, what did it learn to do, can the numbers be trusted, and every dialogue.",
    )
    parser.add_argument("--run", action="append", required=True, metavar="RUN", help="run folder; repeat to compare")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the first run's folder")
    parser.add_argument(
        "--dialogues", type=int, default=DIALOGUES, metavar="N", help=f"most training dialogues (default {DIALOGUES})"
    )
    options = parser.parse_args(arguments)

    def command() -> None:
        console = Console(highlight=False)
        file = write_report(options.run, options.output, dialogues=options.dialogues, console=console)
        console.print(f"{file}: {file.stat().st_size / 1e6:.1f} MB; open it in a browser", markup=False)

    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
