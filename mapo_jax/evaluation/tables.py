"""Scores as tables for a terminal."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from rich.table import Table
from rich.text import Text

from mapo_jax.commands import printable
from mapo_jax.scores import empa

Figures = Mapping[str, Any]


def _text(words: str) -> Text:
    """Text from outside: no markup, no control characters."""
    return Text(printable(words))


def empa_tables(models: Mapping[str, Figures]) -> list[Table]:
    """The scores of every model; their indices; EPM-Q and passes by group."""
    headings = ("model", "cases", "EPM-Q", "passed", "turns", "IDR per turn")
    scores = _table("EMPA (95 % intervals over cases)", headings)
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
        for part, indices in empa.PARTS.items():
            listed = "  ".join(f"{index} {figures[index]:5.1f}" for index in indices)
            parts.add_row(f"  {part}", _with_ends(figures[part], figures["intervals"][part]), listed)
        parts.add_section()
    return [scores, parts, *_group_tables(models)]


_GROUPINGS = {"difficulty": "|P| at the start", "strongest_axis": "strongest axis", "domain": "domain"}


def _group_tables(models: Mapping[str, Figures]) -> list[Table]:
    tables = []
    for grouping, title in _GROUPINGS.items():
        by_model = {model: figures["groups"].get(grouping, {}) for model, figures in models.items()}
        groups = list(dict.fromkeys(chain.from_iterable(by_model.values())))
        if grouping == "difficulty":
            groups = [name for name, _ in empa.DIFFICULTIES if name in groups]
        if not groups:
            continue
        table = _table(f"EPM-Q and passed, by {title}", ("model", *map(_text, groups)))
        for model, by_group in by_model.items():
            cells = {g: f"{f['epm_q']:.1f}  {f['passed']}/{f['dialogues']}" for g, f in by_group.items()}
            table.add_row(_text(model), *(cells.get(group, "") for group in groups))
        tables.append(table)
    return tables


def _table(title: str, headings: Sequence[str | Text]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        # On a narrow terminal only names wrap, not figures.
        table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    return table


def eqbench_tables(scores: Figures) -> list[Table]:
    """The result; with a revision, both passes."""
    headings = ("", "score", "unparseable as 0", "parseable", "counts")
    table = _table(f"EQ-Bench v2, parsing: {scores['parsing']} (95 % intervals)", headings)
    rows = {"result": scores}
    if scores["revision"]:
        passes = {"first_pass": "first pass", "revised": "revised"}
        passes[scores["result"]] += " = result"
        rows = {label: scores[name] for name, label in passes.items()}
    for label, row in rows.items():
        table.add_row(
            label,
            "none" if row["score"] is None else _with_ends(row["score"], row["interval"], "{:.2f}"),
            f"{row['score_unparseable_zero']:.2f}",
            f"{row['parseable']}/{scores['questions']}",
            "yes" if row["counts"] else "no",
        )
    return [table]


def emobench_tables(scores: Figures) -> list[Table]:
    """Accuracy of each task, and by language and category; an unparseable answer counts as wrong."""
    ordered = "accuracy_by_order" in scores
    headings = ("", "items", "right", "of parsed", "unparsed", *(["agree"] if ordered else []))
    table = _table("EmoBench, % right (95 % intervals over scenarios)", headings)
    for task, title in (("EA", "EA, what helps best"), ("EU", "EU, emotion and cause")):
        if task not in scores or not scores[task]["answers"]:
            continue
        figures = scores[task]
        _accuracy_row(table, title, figures)
        for part in ("emotion", "cause"):
            if f"{part}_accuracy" in figures:
                table.add_row(f"  {part}", "", f"{100 * figures[f'{part}_accuracy']:.1f}")
        for group, of_group in (figures["languages"] | figures["categories"]).items():
            if of_group["answers"]:
                _accuracy_row(table, _text(f"  {group.replace('_', ' ')}"), of_group)
        table.add_section()
    return [table]


def _accuracy_row(table: Table, label: str | Text, figures: Figures) -> None:
    of_items = "" if figures["answered"] == figures["items"] else f"/{figures['items']}"
    parseable, agreement = figures["accuracy_parseable"], figures.get("agreement")
    table.add_row(
        label,
        f"{figures['answered']}{of_items}",
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
    """The worst turns of some conversations, with the judge's findings of harm."""
    table = Table(title="the worst turns", title_justify="left", show_lines=True)
    table.add_column("reward", justify="right")
    table.add_column("where")
    table.add_column("messages and findings", overflow="fold")
    for turn in turns:
        harm = [f"{name} {level}: {reason}" for name, level, _, reason in turn["findings"] if level < 0]
        lines = [f"user: {turn['user']}", f"reply: {turn['reply']}", *harm]
        place = f"{turn['case']}, {turn['turn']}"
        table.add_row(f"{turn['reward']:+.2f}", _text(place), _text("\n".join(lines)))
    return table
