"""From run folders to the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.reporting.folder import SavedRun, read_run
from mapo_jax.reporting.page import MOST_RUNS, render

REPORT_FILE = "report.html"
DIALOGUES = 3000  # most of training on a page


def read_runs(
    folders: Sequence[Path | str], dialogues: int, progress: Callable[[str], None] | None = None
) -> list[SavedRun]:
    """Reads runs that share `dialogues` of training.

    Raises:
      UserError: no run folder, or too many of them to tell apart.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs are too many for one report; give at most {MOST_RUNS}")
    return [read_run(f, dialogues=max(1, dialogues // len(folders)), progress=progress) for f in folders]


def write_report(
    folders: Sequence[Path | str],
    output: Path | str | None = None,
    *,
    dialogues: int = DIALOGUES,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes the page of one or more runs, whole.

    Args:
      folders: of the runs; the first one is what the others are compared with.
      output: the file; by default report.html in the first run's folder.
      dialogues: most dialogues of training, shared by the runs.
      progress: called with what is being done.

    Returns:
      The file.

    Raises:
      UserError: no run folder, too many of them, or a file that cannot be written.
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
