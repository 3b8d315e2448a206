"""Writes the report of one or more run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.reporting.folder import Progress, SavedRun, no_progress, read_run
from mapo_jax.reporting.page import MOST_RUNS, render

REPORT_FILE = "report.html"
DIALOGUES = 3000  # most training dialogues on a page


def read_runs(
    folders: Sequence[Path | str], dialogues: int, progress: Progress = no_progress
) -> list[SavedRun]:
    """Reads runs, together at most `dialogues` dialogues of training.

    Raises:
      UserError: a folder is no run folder, or there are more than MOST_RUNS.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs are too many for one report; give at most {MOST_RUNS}")
    return [read_run(f, dialogues=max(1, dialogues // len(folders)), progress=progress) for f in folders]


def write_report(
    folders: Sequence[Path | str],
    output: Path | str | None = None,
    *,
    dialogues: int = DIALOGUES,
    progress: Progress = no_progress,
) -> Path:
    """Writes the page of one or more runs, whole.

    Args:
      folders: of the runs; the others are compared with the first.
      output: the file; by default report.html in the first run's folder.
      dialogues: most dialogues of training, over all runs.
      progress: called before each piece of work.

    Returns:
      The file.

    Raises:
      UserError: a folder is no run folder, there are too many, or the file cannot be written.
    """
    output = Path(output) if output is not None else Path(folders[0]) / REPORT_FILE
    if output.is_dir():
        raise UserError(f"the output {output} is a folder; give the name of a file")
    html = render(read_runs(folders, dialogues, progress), progress=progress)
    try:
        write_whole(output, html)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; give another --output") from error
    return output
