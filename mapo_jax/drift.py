"""Compares the conversations of two periods: judge, feedback and texts, with permutation tests.

    python -m mapo_jax.drift --before FOLDER [FOLDER ...] --after FOLDER [FOLDER ...]

A folder is that of `mapo_jax.serve --conversations`, or the results of `mapo_jax.evaluate dialogues`; where
both are given, the judge's levels and the feedback are joined by conversation. The exit status is 1 if a
figure has changed by at least --effect standard deviations with a corrected p below --p.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from markupsafe import escape
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from mapo_jax.chat_log import Message, check_line, is_chat_log, read_chats
from mapo_jax.commands import command_parser, run_command, show
from mapo_jax.environment.dialogue import LEVEL_NAMES
from mapo_jax.errors import UserError
from mapo_jax.evaluation.transcripts import JUDGED
from mapo_jax.files import write_whole
from mapo_jax.json_files import read_rows
from mapo_jax.scores.drift import FEWEST, compare, figures

_Levels = Annotated[list[int], Field(min_length=len(LEVEL_NAMES), max_length=len(LEVEL_NAMES))]


class _Judged(BaseModel):
    model_config = ConfigDict(strict=True)
    case: str
    levels: list[_Levels | None]
    messages: list[Message]


def read_period(folders: Sequence[str]) -> list[dict[str, float]]:
    """The figures of every conversation in some folders.

    Raises:
      UserError: a folder holds no conversations, or a line is damaged.
    """
    chats: dict[str, dict[str, Any]] = {}
    for folder in map(Path, folders):
        judged = folder / JUDGED
        if is_chat_log(folder):
            for chat in read_chats(folder):
                ratings = [feedback["rating"] for feedback in chat["feedback"].values()]
                chats.setdefault(chat["id"], {}).update(messages=chat["messages"], ratings=ratings)
        elif not judged.is_file():
            raise UserError(
                f"{folder} holds neither conversations (YYYY-MM-DD.jsonl) nor judged ones ({JUDGED}); name "
                "the folder of `serve --conversations` or of `evaluate dialogues --output`"
            )
        if judged.is_file():
            for place, row in read_rows(judged, "judged conversations"):
                judgement = check_line(_Judged, row, place, "judged conversations")
                chat = chats.setdefault(judgement.case, {})
                chat["levels"] = judgement.levels
                chat.setdefault("messages", [message.model_dump() for message in judgement.messages])
    return [figures(**chat, level_names=LEVEL_NAMES) for chat in chats.values()]


def run(options: argparse.Namespace, console: Console) -> bool:
    """Shows the comparison; whether something has drifted."""
    for name, most in (("p", 1), ("effect", math.inf), ("seed", math.inf)):
        if not 0 <= getattr(options, name) <= most:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be from 0 to {most}")
    before, after = read_period(options.before), read_period(options.after)
    rows = compare(before, after, seed=options.seed)
    for row in rows:
        tested = row["p_holm"] is not None
        row["drifted"] = tested and row["p_holm"] < options.p and abs(row["effect"]) >= options.effect
    drifted = [row["name"] for row in rows if row["drifted"]]
    console.print(_table(rows))
    verdict = f"drifted: {', '.join(drifted)}" if drifted else "no figure has drifted"
    rule = f"corrected p below {options.p:g} and at least {options.effect:g} standard deviations"
    show(console, f"{len(before)} conversations before, {len(after)} after; {verdict} ({rule})")
    if all(row["p"] is None for row in rows):
        show(console, f"nothing was tested: a test needs {FEWEST} conversations of each period")
    if options.json:
        content = {"before": len(before), "after": len(after), "drifted": drifted, "figures": rows}
        write_whole(options.json, json.dumps(content, indent=1) + "\n")
    if options.page:
        write_whole(options.page, _page(rows, verdict, options))
    return bool(drifted)


_HEADINGS = ("figure", "before", "after", "change", "effect", "p", "p (Holm)")


def _cells(row: Mapping[str, Any]) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    periods = (f"{shown(mean, '.3f')} ({n})" for mean, n in zip(row["means"], row["counts"], strict=True))
    return [
        row["name"] + (" (drifted)" if row["drifted"] else ""),
        *periods,
        shown(row["difference"], "+.3f"),
        shown(row["effect"], "+.2f"),
        shown(row["p"], ".4f"),
        shown(row["p_holm"], ".4f"),
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="means by conversation (number of conversations)", title_justify="left")
    for index, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _page(rows: Sequence[Mapping[str, Any]], verdict: str, options: argparse.Namespace) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", _cells(row)) for row in rows)
    periods = f"{', '.join(options.before)} against {', '.join(options.after)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Drift</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="content-security-policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }}
div {{ overflow-x: auto; }} td, th {{ padding: 0.2rem 0.8rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}</style></head>
<body><h1>Drift</h1><p>{escape(periods)}</p><p><strong>{escape(verdict)}</strong></p>
<div><table>
{line("th", _HEADINGS)}
{body}
</table></div></body></html>
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 no drift, 1 drift, 2 bad input."""
    parser = command_parser("drift", __doc__.split("\n\n")[0].replace("\n", " "))
    option = parser.add_argument
    option("--before", nargs="+", required=True, metavar="FOLDER", help="the earlier period")
    option("--after", nargs="+", required=True, metavar="FOLDER", help="the later period")
    option(
        "--p", type=float, default=0.05, metavar="P", help="largest corrected p of a drift (default: 0.05)"
    )
    option(
        "--effect",
        type=float,
        default=0.2,
        metavar="D",
        help="smallest drift in standard deviations (default: 0.2)",
    )
    option("--seed", type=int, default=0, help="of the permutations (default: 0)")
    option("--json", metavar="FILE", help="write the figures there too")
    option("--page", metavar="FILE", help="write a page with the table there")
    options = parser.parse_args(arguments)
    found: list[bool] = []
    console = Console(highlight=False, markup=False)
    status = run_command(lambda: found.append(run(options, console)))
    return 1 if status == 0 and any(found) else status


if __name__ == "__main__":
    raise SystemExit(main())
