"""Scores as a person reads them on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from mapo_jax.evaluation import empa

Figures = Mapping[str, Any]


def with_interval(figures: Figures, name: str, form: str = "{:.1f}") -> str:
    """A figure and its interval, as in `85.1 [80.2, 89.7]`."""
    interval = figures["intervals"][name]
    value = form.format(figures[name])
    return value if interval is None else f"{value} [{', '.join(map(form.format, interval))}]"


def empa_tables(models: Mapping[str, Figures]) -> list[Table]:
    """The scores of every model; what they are made of; EPM-Q and passes by group."""
    scores = _table(
        "EMPA (95 % intervals over cases)", ("model", "cases", "EPM-Q", "passed", "turns", "IDR per turn")
    )
    groups = ("outcome", "efficiency", "stability")
    parts = _table("EPM-Q = 0.4 outcome + 0.2 efficiency + 0.4 stability", ("model", *groups))
    indices = _table("the nine indices, three for each", ("model", *empa.INDICES))
    for model, figures in models.items():
        scores.add_row(
            model,
            str(figures["cases"]),
            with_interval(figures, "epm_q"),
            f"{figures['passed']}/{figures['dialogues']}",
            f"{figures['turns']:.1f}",
            f"{figures['idr_mean']:+.2f} ± {figures['idr_std']:.2f}",
        )
        parts.add_row(model, *(with_interval(figures, name) for name in groups))
        indices.add_row(model, *(f"{figures[name]:.1f}" for name in empa.INDICES))
    return [scores, parts, indices, *_group_tables(models)]


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
        table = _table(f"EPM-Q and passed, by {title}", ("model", *groups))
        for model, found in zip(models, known, strict=True):
            cells = (found.get(group) for group in groups)
            table.add_row(
                model,
                *(
                    "" if cell is None else f"{cell['epm_q']:.1f}  {cell['passed']}/{cell['dialogues']}"
                    for cell in cells
                ),
            )
        tables.append(table)
    return tables


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table
