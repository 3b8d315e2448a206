"""Scores as a person reads them on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mapo_jax.commands import printable
from mapo_jax.scores import empa

Figures = Mapping[str, Any]


def _text(words: str) -> Text:
    """Words of others: no markup, and nothing that steers a terminal."""
    return Text(printable(words))


def empa_tables(models: Mapping[str, Figures]) -> list[Table]:
    """The scores of every model; what they are made of; EPM-Q and passes by group."""
    scores = _table(
        "EMPA (95 % intervals over cases)", ("model", "cases", "EPM-Q", "passed", "turns", "IDR per turn")
    )
    parts = _table("EPM-Q = 0.4 outcome + 0.2 efficiency + 0.4 stability", ("model", "", "its indices"))
    for model, figures in models.items():
        scores.add_row(
            _text(model),
            str(figures["cases"]),
            _with_ends(figures["epm_q"], figures["intervals"]["epm_q"]),
            f"{figures['passed']}/{figures['dialogues']}",
            f"{figures['turns']:.1f}",
            f"{figures['idr_mean']:+.2f} ± {figures['idr_std']:.2f}",
        )
        parts.add_row(_text(model))
        for part, indices in _PARTS.items():
            parts.add_row(
                f"  {part}",
                _with_ends(figures[part], figures["intervals"][part]),
                "  ".join(f"{index} {figures[index]:5.1f}" for index in indices),
            )
        parts.add_section()
    return [scores, parts, *_group_tables(models)]


_PARTS = {"outcome": empa.OUTCOME, "efficiency": empa.EFFICIENCY, "stability": empa.STABILITY}
_GROUPING_TITLES = {
    "difficulty": "|P| at the start",
    "strongest_axis": "strongest axis",
    "domain": "domain",
}


def _group_tables(models: Mapping[str, Figures]) -> list[Table]:
    tables = []
    for grouping, title in _GROUPING_TITLES.items():
        known = [figures["groups"].get(grouping, {}) for figures in models.values()]
        groups = list(dict.fromkeys(group for found in known for group in found))
        if grouping == "difficulty":
            groups = [name for name, _ in empa.DIFFICULTIES if name in groups]
        if not groups:
            continue
        table = _table(f"EPM-Q and passed, by {title}", ("model", *map(_text, groups)))
        for model, found in zip(models, known, strict=True):
            cells = (found.get(group) for group in groups)
            table.add_row(
                _text(model),
                *(
                    "" if cell is None else f"{cell['epm_q']:.1f}  {cell['passed']}/{cell['dialogues']}"
                    for cell in cells
                ),
            )
        tables.append(table)
    return tables


def _table(title: str, headings: Sequence[str | Text]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        # On a narrow terminal names are broken, figures never.
        table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    return table


def eqbench_tables(scores: Figures) -> list[Table]:
    """The result, and with a revision both passes."""
    table = _table(
        f"EQ-Bench v2, parsing: {scores['parsing']} (95 % intervals)",
        ("", "score", "unparseable as 0", "parseable", "counts"),
    )
    passes = {"first_pass": "first pass", "revised": "revised"}
    if scores["revision"]:
        rows = [
            (label + (" = result" if scores["result"] == name else ""), scores[name])
            for name, label in passes.items()
        ]
    else:
        rows = [("result", scores)]
    for label, part in rows:
        table.add_row(
            label,
            "none" if part["score"] is None else _with_ends(part["score"], part["interval"], "{:.2f}"),
            f"{part['score_unparseable_zero']:.2f}",
            f"{part['parseable']}/{scores['questions']}",
            "yes" if part["counts"] else "no",
        )
    return [table]


def emobench_tables(scores: Figures) -> list[Table]:
    """Accuracy of each task, and by language and category; an unparseable answer is not right."""
    ordered = "accuracy_by_order" in scores
    table = _table(
        "EmoBench, % right (95 % intervals over scenarios)",
        ("", "items", "right", "of parsed", "unparsed", *(["agree"] if ordered else [])),
    )
    tasks = {"EA": "EA, what helps best", "EU": "EU, emotion and cause"}
    for task, title in tasks.items():
        if task not in scores or not scores[task]["answers"]:
            continue
        found = scores[task]
        _accuracy_row(table, title, found)
        for name, label in (("emotion_accuracy", "  emotion"), ("cause_accuracy", "  cause")):
            if name in found:
                table.add_row(label, "", f"{100 * found[name]:.1f}")
        for grouping in ("languages", "categories"):
            for group, figures in found[grouping].items():
                if figures["answers"]:
                    _accuracy_row(table, _text(f"  {group.replace('_', ' ')}"), figures)
        table.add_section()
    return [table]


def _accuracy_row(table: Table, label: str | Text, figures: Figures) -> None:
    asked = "" if figures["answered"] == figures["items"] else f"/{figures['items']}"
    parseable, agreement = figures["accuracy_parseable"], figures.get("agreement")
    table.add_row(
        label,
        f"{figures['answered']}{asked}",
        _with_ends(100 * figures["accuracy"], figures["interval"], "{:.1f}", 100),
        "" if parseable is None else f"{100 * parseable:.1f}",
        f"{figures['unparseable']}/{figures['answers']}",
        *([] if agreement is None else [f"{100 * agreement:.1f}"]),
    )


def _with_ends(value: float, interval: Sequence[float] | None, form: str = "{:.1f}", scale: float = 1) -> str:
    shown = form.format(value)
    if interval is None:
        return shown
    return f"{shown} [{', '.join(form.format(scale * end) for end in interval)}]"


def worst_table(turns: Sequence[Mapping[str, Any]]) -> Table:
    """The worst turns of some conversations, with what was found harmful in them."""
    table = Table(title="the worst turns", title_justify="left", show_lines=True)
    table.add_column("reward", justify="right")
    table.add_column("where")
    table.add_column("what was said", overflow="fold")
    for turn in turns:
        found = [f"{name} {level}: {reason}" for name, level, _, reason in turn["findings"] if level < 0]
        said = [f"user: {turn['user']}", f"reply: {turn['reply']}", *found]
        where = f"{turn['case']}, {turn['turn']}"
        table.add_row(f"{turn['reward']:+.2f}", _text(where), _text("\n".join(said)))
    return table
