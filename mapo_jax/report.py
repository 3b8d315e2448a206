"""Writes one HTML page about one or more run folders, or prints a summary.

    python -m mapo_jax.report --run RUN [--run OTHER ...] [--output FILE]
    python -m mapo_jax.report --run RUN --text

The page is one file without external resources: it opens from the disk, in light and dark, on a phone, and on
paper. Missing and damaged parts of a run are left out and listed.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from mapo_jax.commands import command_parser, prepare_jax, printable, run_command, show
from mapo_jax.errors import UserError
from mapo_jax.reporting.text import render_text
from mapo_jax.reporting.write import DIALOGUES, read_runs, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (see `commands.run_command`)."""
    parser = command_parser(
        "report",
        "Writes one self-contained HTML page about a training run, or about several beside each "
        "other: did it get better, what did it learn to do, can the numbers be trusted, and every dialogue.",
    )
    parser.add_argument(
        "--run", action="append", required=True, metavar="RUN", help="run folder; repeat it to compare runs"
    )
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the first run's folder")
    parser.add_argument(
        "--text", action="store_true", help="print a summary and a few dialogues instead of writing the page"
    )
    parser.add_argument(
        "--dialogues",
        type=int,
        default=DIALOGUES,
        metavar="N",
        help=f"most dialogues of training to read: whole steps, evenly spaced (default {DIALOGUES})",
    )
    options = parser.parse_args(arguments)

    def command() -> None:
        if options.dialogues < 1:
            raise UserError(f"`--dialogues` is {options.dialogues}; it must be at least 1")
        if options.text and options.output:
            raise UserError("`--text` prints and writes no file; leave out --output")
        console = Console(highlight=False, markup=False)
        prepare_jax(None)
        with console.status("reading") as status:
            progress = lambda name: status.update(Text(printable(name)))  # noqa: E731
            if options.text:
                result = render_text(read_runs(options.run, options.dialogues, progress))
            else:
                settings = {"dialogues": options.dialogues, "progress": progress}
                file = write_report(options.run, options.output, **settings)
                result = f"{file}: {file.stat().st_size / 1e6:.1f} MB; open it in a browser"
        if options.text:
            console.print(result)
        else:
            show(console, result)

    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
