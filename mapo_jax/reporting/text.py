"""The report for a terminal: the summary and a few dialogues."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mapo_jax.commands import printable
from mapo_jax.reporting.behaviour import changes, typical_pair
from mapo_jax.reporting.charts import format_value, signed
from mapo_jax.reporting.credit import Credit
from mapo_jax.reporting.dialogues import SavedDialogue
from mapo_jax.reporting.folder import SavedRun
from mapo_jax.reporting.study import Study
from mapo_jax.reporting.summary import against_first, comparison_sentences, recipe, tiles
from mapo_jax.running.display import plot

_STATES = {"fine": ("✓", "green"), "look": ("!", "yellow"), "alarm": ("✕", "red"), "unknown": ("?", "dim")}
_VERDICTS = {"good": "green", "bad": "red", "unclear": "yellow"}


def render_text(runs: Sequence[SavedRun]) -> RenderableType:
    """The comparison of the runs, then the summary of each."""
    studies = [Study.of(number, run) for number, run in enumerate(runs)]
    compared = comparison_sentences(against_first(studies))
    parts: list[RenderableType] = [_text(" ".join(compared)), ""] if compared else []
    return Group(*parts, *map(_run, studies))


def plain(text: str) -> str:
    """One line of text that is safe on a terminal (`commands.printable`)."""
    return printable(text.replace("\u00a0%", "%").replace("\n", " ").replace("\t", " "))


def _text(text: str, style: str = "") -> Text:
    return Text(plain(text), style=style)


def _run(study: Study) -> RenderableType:
    run, behaviour = study.run, study.behaviour
    word, sentence, state = study.verdict
    parts: list[RenderableType] = [
        _text(run.name, "bold underline"),
        Text.assemble((f"{word}. ", f"bold {_VERDICTS[state]}"), sentence),
    ]
    if behaviour and behaviour.headline:
        parts.append(_text(behaviour.headline))
    suspicion, worst = study.suspicion
    if suspicion:
        sign, style = _STATES[worst]
        parts.append(Text.assemble((f"{sign} {worst} ", style), suspicion))
    parts.append(_text(recipe(run), "dim"))
    parts += [_text(f"missing: {note}", "yellow") for note in run.notes]
    if study.changes:
        parts += ["", _changes(study)]
    _, returns = run.series("return/mean")
    if len(returns) > 1:
        parts += [
            "",
            Text("training: return of a dialogue, step by step", style="dim"),
            Text(plot(returns)),
        ]
    parts += ["", _checks(study)]
    if behaviour and behaviour.sentences:
        points = Table.grid(padding=(0, 1))
        for sentence in behaviour.sentences:
            points.add_row(" -", _text(sentence))
        parts += ["", Text("what it learnt to do", style="bold"), points]
    for title, dialogue, credit in _examples(study):
        parts += ["", _dialogue(title, dialogue, credit)]
    return Group(*parts, "")


def _changes(study: Study) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title="validation, before and after", title_justify="left", padding=(0, 1)
    )
    for heading in ("", "before", "after", "change", "95 % interval", "good helper", "way"):
        table.add_column(heading, justify="right" if heading else "left")
    for tile in tiles(study):
        change, form = tile["change"], tile["form"]
        difference = (lambda x: f"{100 * x:+.0f} points") if form == "share" else signed
        table.add_row(
            tile["title"],
            plain(format_value(change.before, form)),
            plain(format_value(change.after, form)),
            difference(change.change),
            f"{difference(change.low)} to {difference(change.high)}" if change.cards > 1 else "",
            "" if tile["helper"] is None else plain(format_value(tile["helper"], form)),
            "" if tile["progress"] is None else plain(format_value(tile["progress"], "share")),
        )
    return table


def _checks(study: Study) -> Table:
    table = Table(
        box=None, title="is anything suspicious?", title_justify="left", padding=(0, 1), show_header=False
    )
    for check in study.checks:
        sign, style = _STATES[check.state]
        state = Text(f"{sign} {check.state}", style=style)
        table.add_row(state, check.name, _text(check.figure), Text(check.meaning, style="dim"))
    return table


def _examples(study: Study) -> list[tuple[str, SavedDialogue, Credit]]:
    """Titled dialogues: a typical one before and after training, and the one that improved most."""
    first, last = study.first, study.last
    if first is None or last is None:
        rows = list(zip(last[0].dialogues[:1], last[1][:1], strict=True)) if last else []
        return [("the first validation dialogue", *row) for row in rows]
    pair, pairs = typical_pair(first, last), changes(first, last)
    if pair is None:
        return []
    i, j, standing = pair
    gain, _, best = pairs[-1]
    return [
        (f"before (the change of return is {standing})", first[0].dialogues[i], first[1][i]),
        ("after, the same card", last[0].dialogues[j], last[1][j]),
        (f"after, most improved ({signed(gain)})", last[0].dialogues[best], last[1][best]),
    ]


def _dialogue(title: str, dialogue: SavedDialogue, credit: Credit) -> RenderableType:
    lines: list[RenderableType] = [
        _text(f"{title}: {dialogue.card}", "bold"),
        _text(f"{dialogue.state.scenario.topic} Return {signed(credit.first_return)}.", "dim"),
    ]
    for turn, reward in zip(dialogue.turns, credit.rewards, strict=True):
        score = ("unscored", "dim") if reward is None else (signed(reward), "red" if reward < 0 else "green")
        reply = Text.assemble("→ ", _short(turn.reply) or "(nothing)", "  ", score)
        lines += [Padding(Text(_short(turn.user), style="dim"), (0, 0, 0, 2)), Padding(reply, (0, 0, 0, 4))]
    distances = f"D {dialogue.distances[0]:.1f} → {dialogue.distances[-1]:.1f}"
    ended = f"{dialogue.outcome} after {len(dialogue.turns)} turns, {distances}"
    return Group(*lines, Padding(_text(ended, "dim"), (0, 0, 0, 2)))


def _short(text: str) -> str:
    return textwrap.shorten(plain(text), 400, placeholder=" …")
