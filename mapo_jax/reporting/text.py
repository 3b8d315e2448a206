"""The report for a terminal: the summary and a few dialogues."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mapo_jax.reporting.behaviour import changes, typical_pair
from mapo_jax.reporting.charts import signed, tell
from mapo_jax.reporting.credit import Credit
from mapo_jax.reporting.folder import SavedDialogue, SavedRun
from mapo_jax.reporting.study import Study
from mapo_jax.reporting.summary import against_first, comparison_sentences, recipe, tiles
from mapo_jax.running.display import plot

_STATES = {"fine": ("✓", "green"), "look": ("!", "yellow"), "alarm": ("✕", "red"), "unknown": ("?", "dim")}
_WORDS = {"good": "green", "bad": "red", "unclear": "yellow"}


def render_text(runs: Sequence[SavedRun]) -> RenderableType:
    """How the runs compare, then their summaries, one after the other."""
    studies = [Study.of(number, run) for number, run in enumerate(runs)]
    compared = comparison_sentences(against_first(studies))
    parts: list[RenderableType] = [Text(plain(" ".join(compared))), ""] if compared else []
    return Group(*parts, *map(_run, studies))


def plain(text: str) -> str:
    """Text that cannot steer a terminal: control and direction characters become the replacement sign."""
    return "".join(
        " "
        if letter in "\n\t"
        else "\ufffd"
        if unicodedata.category(letter) in ("Cc", "Cf", "Cs")
        else letter
        for letter in text.replace("\u00a0%", "%")
    )


def _run(study: Study) -> RenderableType:
    run = study.run
    word, sentence, state = study.verdict
    parts: list[RenderableType] = [
        Text(plain(run.name), style="bold underline"),
        Text.assemble((f"{word}. ", f"bold {_WORDS[state]}"), sentence),
    ]
    if study.behaviour and study.behaviour.headline:
        parts.append(Text(plain(study.behaviour.headline)))
    suspicion, worst = study.suspicion
    if suspicion:
        sign, style = _STATES[worst]
        parts.append(Text.assemble((f"{sign} {worst} ", style), suspicion))
    parts.append(Text(plain(recipe(run)), style="dim"))
    parts += [Text(f"missing: {plain(note)}", style="yellow") for note in run.notes]
    if study.changes:
        parts += ["", _changes(study)]
    _, returns = run.series("return/mean")
    if len(returns) > 1:
        parts += ["", Text("return of a dialogue, step by step", style="dim"), Text(plot(returns))]
    parts += ["", _checks(study)]
    if study.behaviour and study.behaviour.sentences:
        parts += ["", Text("what it learnt to do", style="bold")]
        points = Table.grid(padding=(0, 1))
        for said in study.behaviour.sentences:
            points.add_row(" -", Text(plain(said)))
        parts.append(points)
    for title, dialogue, credit in _chosen(study):
        parts += ["", _dialogue(title, dialogue, credit)]
    return Group(*parts, "")


def _changes(study: Study) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title="validation, before and after", title_justify="left", padding=(0, 1)
    )
    for heading in ("", "before", "after", "change", "95 % interval", "way to the good helper"):
        table.add_column(heading, justify="left" if not heading else "right")
    for tile in tiles(study):
        change = tile["change"]
        share = tile["form"] == "share"
        told = (lambda x: f"{100 * x:+.0f} points") if share else signed
        table.add_row(
            tile["title"],
            plain(tell(change.before, tile["form"])),
            plain(tell(change.after, tile["form"])),
            told(change.change),
            f"{told(change.low)} to {told(change.high)}" if change.cards > 1 else "",
            "" if tile["way"] is None else plain(tell(tile["way"], "share")),
        )
    return table


def _checks(study: Study) -> Table:
    table = Table(
        box=None, title="is anything suspicious?", title_justify="left", padding=(0, 1), show_header=False
    )
    for check in study.checks:
        sign, style = _STATES[check.state]
        table.add_row(
            Text(f"{sign} {check.state}", style=style),
            check.name,
            Text(plain(check.figure)),
            Text(check.meaning, style="dim"),
        )
    return table


def _chosen(study: Study) -> list[tuple[str, SavedDialogue, Credit]]:
    """A typical dialogue before and after, and the one that improved most."""
    if not (study.first and study.last):
        if study.last is None or not study.last[0].dialogues:
            return []
        return [("the first validation dialogue", study.last[0].dialogues[0], study.last[1][0])]
    pair, pairs = typical_pair(study.first, study.last), changes(study.first, study.last)
    if pair is None:
        return []
    i, j, standing = pair
    best = pairs[-1][2]
    return [
        (f"before (the change of return is {standing})", study.first[0].dialogues[i], study.first[1][i]),
        ("after, the same card", study.last[0].dialogues[j], study.last[1][j]),
        (
            f"after, most improved ({signed(pairs[-1][0])})",
            study.last[0].dialogues[best],
            study.last[1][best],
        ),
    ]


def _dialogue(title: str, dialogue: SavedDialogue, credit: Credit) -> RenderableType:
    topic: Any = dialogue.card.get("topic") or ""
    lines: list[RenderableType] = [
        Text(f"{title}: {plain(dialogue.scenario)}", style="bold"),
        Text(f"{plain(str(topic))} Return {signed(credit.first_return)}.", style="dim"),
    ]
    for turn, reward in zip(dialogue.turns, credit.rewards, strict=True):
        score = (
            Text("unscored", style="dim")
            if reward is None
            else Text(signed(reward), style="red" if reward < 0 else "green")
        )
        lines.append(Padding(Text(_short(turn.user), style="dim"), (0, 0, 0, 2)))
        lines.append(
            Padding(Text.assemble("→ ", _short(turn.reply) or "(nothing)", "  ", score), (0, 0, 0, 4))
        )
    lack = f"D {dialogue.distances[0]:.1f} → {dialogue.distances[-1]:.1f}"
    ended = f"{dialogue.outcome} after {len(dialogue.turns)} turns, {lack}"
    lines.append(Padding(Text(plain(ended), style="dim"), (0, 0, 0, 2)))
    return Group(*lines)


def _short(text: str) -> str:
    return textwrap.shorten(plain(text), 400, placeholder=" …")
