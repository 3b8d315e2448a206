"""Charts as HTML that needs no script: lines in a stretched SVG, labels as text that keeps its size.

Colours are variables of the page's style (`--series-N`), so one drawing serves both themes and print. Series
differ by dash as well as by colour. The script adds a cursor with the values of `Chart.to_json`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import groupby
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from mapo_jax.reporting.dialogues import Vector, extended

Ends = Sequence[tuple[float, float]]

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2")


@dataclass(frozen=True)
class Series:
    """One line. A value that is not finite leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "series-1"  # a variable of the style
    dash: str = ""
    band: Ends = ()  # low and high at each x
    smooth: Sequence[float] = ()  # drawn bold; y is then drawn faint
    marks: bool = False  # points joined by a thin line, such as evaluations
    errors: Ends = ()  # low and high of each mark


@dataclass(frozen=True)
class Chart:
    """One or more series over the same axis."""

    key: str
    title: str
    series: tuple[Series, ...]
    meaning: str = ""
    x_name: str = "step"
    form: str = "number"  # number, share, or seconds
    levels: tuple[tuple[str, float], ...] = ()  # horizontal lines: name and value
    tall: bool = False
    zero: bool = False  # the y axis includes zero
    reach: tuple[float, ...] = ()  # further y values that the axis includes

    def to_json(self) -> dict[str, Any]:
        """What the cursor shows."""
        return {
            "x": self.x_name,
            "form": self.form,
            "domain": self.domain,
            "series": [
                {
                    "name": s.name,
                    "colour": s.colour,
                    "x": [round(float(x), 4) for x in s.x],
                    "y": [_short(y) for y in s.y],
                    "band": [[_short(low), _short(high)] for low, high in s.band or s.errors],
                }
                for s in self.series
            ],
        }

    @property
    def values(self) -> tuple[float, ...]:
        """Lowest and highest finite value of the lines; empty without any."""
        ys = [y for s in self.series for y in (*s.y, *(end for pair in (*s.band, *s.errors) for end in pair))]
        ys = [y for y in ys if math.isfinite(y)]
        return (min(ys), max(ys)) if ys else ()

    @property
    def domain(self) -> tuple[float, float, float, float]:
        """Lowest and highest x, lowest and highest y, with a margin around the values."""
        xs = [x for s in self.series for x in s.x]
        ys = [*self.values, *self.reach, *(level for _, level in self.levels)]
        if self.zero:
            ys.append(0.0)
        low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
        if self.form == "share" and high - low < 0.01:
            high = low + 0.1
        if high - low <= 1e-9 * max(1e-30, abs(high)):
            reach = abs(high) * 0.5 or 1.0
            low, high = (low - reach if low else 0.0), high + reach
        room = 0.06 * (high - low)
        least = low if (low >= 0 and low - room < 0) or self.form == "share" else low - room
        left, right = (min(xs), max(xs)) if xs else (0.0, 1.0)
        return left, right if right > left else left + 1, least, high + room


def on_one_scale(charts: Sequence[Chart]) -> list[Chart]:
    """The charts with y axes that all include the values of all."""
    reach = tuple(end for chart in charts for end in chart.values)
    return [replace(chart, reach=reach) for chart in charts]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two bounds: multiples of 1, 2, or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def format_value(value: float | None, form: str = "number") -> str:
    """A number for display: as `form` says (see `Chart`), with a typographic minus; a dash for no value."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if form == "seconds":
        return f"{format_value(value)}\u00a0s"
    size = abs(value)
    if form == "share":
        if 0 < size < 0.0005:
            return "<0.1\u00a0%"
        return _minus(f"{100 * value:.{0 if size >= 0.0995 or value == 0 else 1}f}\u00a0%")
    if value == 0:
        return "0"
    if size < 1e-3:
        mantissa, power = f"{value:.1e}".split("e")
        return _minus(f"{mantissa}e{int(power)}")
    digits = sum(size < bound for bound in (100, 10, 0.1))
    return _minus(f"{value:,.0f}" if size >= 10_000 else f"{value:.{digits}f}")


def counted_share(share: float | None, total: int) -> str:
    """A share with its count: "12 % (31 of 256)"; the share alone where the total is unknown, 0."""
    text = format_value(share, "share")
    return f"{text} ({round(share * total):,} of {total:,})" if total and share is not None else text


def signed(value: float | None) -> str:
    """A difference for display: with its sign, 0 without; a dash for no value."""
    if value is None:
        return "\u2013"
    text = f"{value:+.2f}" if abs(value) < 10 else f"{value:+.1f}"
    return "0" if float(text) == 0 else _minus(text)


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def draw(chart: Chart) -> Markup:
    """The chart as a figure (`assets/chart.html`)."""
    x0, x1, y0, y1 = chart.domain
    px = lambda x: 100 * (x - x0) / (x1 - x0)  # noqa: E731
    py = lambda y: 100 * (y1 - y) / (y1 - y0)  # noqa: E731
    html = TEMPLATES.get_template("chart.html").render(
        chart=chart,
        px=px,
        py=py,
        lines=[_line(series, px, py) for series in chart.series],
        x_ticks=[tick for tick in nice_ticks(x0, x1, 5) if tick == round(tick)],
        y_ticks=nice_ticks(y0, y1),
        now=_now(chart),
        description=describe(chart),
    )
    return Markup(html)


def _line(s: Series, px: Callable[[float], float], py: Callable[[float], float]) -> dict[str, Any]:
    """A series in the chart's coordinates."""
    points = [(px(x), py(y)) if math.isfinite(y) else None for x, y in zip(s.x, s.y, strict=True)]
    pieces = [list(group) for known, group in groupby(points, key=lambda point: point is not None) if known]
    unknown = [(math.nan, math.nan)] * len(points)
    band = list(zip(s.x, s.band or unknown, strict=True))
    low, high = ([(px(x), py(pair[i])) for x, pair in band if math.isfinite(pair[i])] for i in (0, 1))
    errors = [tuple(map(py, ends)) if all(map(math.isfinite, ends)) else None for ends in s.errors or unknown]
    marked = s.marks or len(s.x) == 1
    marks = [(*point, ends) for point, ends in zip(points, errors, strict=True) if point and marked]
    smooth = zip(s.x, s.smooth, strict=True) if s.smooth else ()
    return {
        "series": s,
        "pieces": [_points(piece) for piece in pieces if len(piece) > 1],
        "band": _points([*high, *low[::-1]]) if len(low) + len(high) > 2 else "",
        "smooth": _points([(px(x), py(y)) for x, y in smooth]),
        "marks": marks,
    }


def describe(chart: Chart) -> str:
    """The chart in a sentence, for screen readers."""
    parts = []
    for s in chart.series:
        known = [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
        if known:
            (x0, y0), (x1, y1) = known[0], known[-1]
            start, end = format_value(y0, chart.form), format_value(y1, chart.form)
            parts.append(f"{s.name}: {start} at {chart.x_name} {x0:g}, {end} at {x1:g}")
    return "; ".join(parts) + "." if parts else "No values."


def _now(chart: Chart) -> str:
    """First and last value of a chart with a single line, with the line's name beside marks; else empty."""
    lines = [s for s in chart.series if not s.marks]
    if len(lines) > 1:
        return ""
    for s in lines or chart.series:
        known = [format_value(y, chart.form) for y in (s.smooth or s.y) if math.isfinite(y)]
        if known:
            name = f"{s.name.split(',')[0]} " if len(chart.series) > 1 else ""
            return name + (known[0] if len(known) == 1 else f"{known[0]} → {known[-1]}")
    return "\u2013"


def _tick(value: float, form: str) -> str:
    if form == "share":
        return _minus(f"{100 * value:.3g}\u00a0%")
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(size, 1e4):
            return _minus(f"{value / size:g}{unit}")
    return _minus(re.sub("e-0?", "e\u2212", f"{value:.4g}"))


def _with_count(share: float | None, total: int) -> Markup:
    """As `counted_share`, with the count in small letters."""
    text, *count = counted_share(share, total).split(" ", 1)
    return Markup(" ").join([text, *(Markup("<small>{}</small>").format(each) for each in count)])


def _points(points: Sequence[tuple[float, float]], digits: int = 2) -> str:
    return " ".join(f"{x:.{digits}f},{y:.{digits}f}" for x, y in points)


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class TracePath:
    """One dialogue's trajectory in the state space."""

    positions: Sequence[Vector]
    colour: str
    href: str
    title: str


def draw_plane(
    axes: tuple[int, int], names: tuple[str, str], low: float, paths: list[TracePath], means: list[TracePath]
) -> Markup:
    """Trajectories projected on two of the three axes (`assets/plane.html`).

    Args:
      axes: indices of the axes drawn to the right and up.
      names: their names.
      low: lower end of both axes; the upper end is a little above zero.
      paths: one per dialogue, drawn as links.
      means: mean trajectories, drawn on top.
    """
    size, high = 300.0, 4.0
    scale = lambda value: size * (value - low) / (high - low)  # noqa: E731

    def projected(paths: list[TracePath]) -> list[tuple[TracePath, list[tuple[float, float]]]]:
        return [(p, [(scale(at[axes[0]]), size - scale(at[axes[1]])) for at in p.positions]) for p in paths]

    html = TEMPLATES.get_template("plane.html").render(
        size=size,
        names=names,
        rest=scale(-1.0),
        origin=scale(0),
        ticks=[(tick, scale(tick)) for tick in nice_ticks(low, high) if tick < 0],
        paths=projected(paths),
        means=projected(means),
    )
    return Markup(html)


def mean_path(paths: Sequence[Sequence[Vector]]) -> list[Vector]:
    """The mean position turn by turn; an ended dialogue stays where it ended."""
    longest = max(map(len, paths))
    return [tuple(point) for point in np.mean([extended(path, longest) for path in paths], 0).tolist()]


def asset(name: str) -> str:
    """A file of the page: template, style, script, or table."""
    return (resources.files("mapo_jax.reporting") / "assets" / name).read_text(encoding="utf-8")


TEMPLATES = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    loader=jinja2.FunctionLoader(asset),
)
TEMPLATES.globals |= {"draw": draw}
TEMPLATES.filters |= {
    "value": format_value,
    "signed": signed,
    "percent": lambda value: format_value(value, "share"),
    "counted": _with_count,
    "tick": _tick,
    "points": _points,
    "fixed": lambda value, digits=2: f"{value:.{digits}f}",
}
