"""Charts as HTML that needs no script: lines in a stretched SVG, labels as text that keeps its size.

Colours come from the page's style (`--series-N`), so that both themes and print share one drawing. Series
differ by dash as well as by colour. The script adds a cursor with values; it reads `Chart.to_json`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2")


@dataclass(frozen=True)
class Series:
    """One line. Values that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "series-1"  # a name in the style
    dash: str = ""
    band: Sequence[tuple[float, float]] = ()  # low and high at each x
    smooth: Sequence[float] = ()  # drawn bold, y then faint
    marks: bool = False  # points joined by a thin line, such as evaluations
    errors: Sequence[tuple[float, float]] = ()  # low and high of each mark


@dataclass(frozen=True)
class Chart:
    """A chart of one or more series over the same axis."""

    key: str
    title: str
    series: tuple[Series, ...]
    meaning: str = ""
    x_name: str = "step"
    form: str = "number"  # number, share, or seconds
    levels: tuple[tuple[str, float], ...] = ()  # horizontal lines with a name
    tall: bool = False
    zero: bool = False  # the axis holds zero

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
    def domain(self) -> tuple[float, float, float, float]:
        """Least and largest x, least and largest y, wide enough for the labels' round numbers."""
        xs = [x for s in self.series for x in s.x]
        ys = [y for s in self.series for y in s.y if math.isfinite(y)]
        ys += [y for s in self.series for pair in (*s.band, *s.errors) for y in pair if math.isfinite(y)]
        ys += [level for _, level in self.levels]
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


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two bounds: multiples of 1, 2, or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tell(value: float | None, form: str = "number") -> str:
    """A number as a person writes it; a dash for none."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if form == "seconds":
        return f"{tell(value)}\u00a0s"
    if form == "share":
        if 0 < abs(value) < 0.0005:
            return "<0.1\u00a0%"
        digits = 0 if abs(value) >= 0.0995 or value == 0 else 1
        return f"{100 * value:.{digits}f}\u00a0%".replace("-", "\u2212")
    if value == 0:
        return "0"
    size = abs(value)
    if size and size < 1e-3:
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(power)}".replace("-", "\u2212")
    if size >= 10_000:
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    else:
        text = f"{value:.3f}" if size < 0.1 else f"{value:.2f}"
    return text.replace("-", "\u2212")


def signed(value: float | None) -> str:
    """A difference as a person writes it: with its sign, 0 without; a dash for none."""
    if value is None:
        return "\u2013"
    text = f"{value:+.2f}" if abs(value) < 10 else f"{value:+.1f}"
    return "0" if float(text) == 0 else text.replace("-", "\u2212")


def draw(chart: Chart) -> Markup:
    """The chart as a figure."""
    x0, x1, y0, y1 = chart.domain
    px = lambda x: 100 * (x - x0) / (x1 - x0)  # noqa: E731
    py = lambda y: 100 * (y1 - y) / (y1 - y0)  # noqa: E731
    shapes, overlay = [], []
    for tick in nice_ticks(y0, y1):
        shapes.append(f'<line class="grid" x1="0" x2="100" y1="{py(tick):.2f}" y2="{py(tick):.2f}"/>')
        overlay.append(f'<span class="ytick" style="top:{py(tick):.2f}%">{_tick(tick, chart.form)}</span>')
    for tick in nice_ticks(x0, x1, 5):
        if tick == round(tick):
            overlay.append(f'<span class="xtick" style="left:{px(tick):.2f}%">{tick:.0f}</span>')
    for name, level in chart.levels:
        shapes.append(f'<line class="level" x1="0" x2="100" y1="{py(level):.2f}" y2="{py(level):.2f}"/>')
        side = "below" if py(level) < 12 else "above"
        overlay.append(f'<span class="levelname {side}" style="top:{py(level):.2f}%">{escape(name)}</span>')
    for s in chart.series:
        points = [(px(x), py(y)) if math.isfinite(y) else None for x, y in zip(s.x, s.y, strict=True)]
        colour = f"--c:var(--{s.colour})"
        if s.band:
            rim = [(px(x), py(h)) for x, (_, h) in zip(s.x, s.band, strict=True) if math.isfinite(h)]
            rim += [(px(x), py(low)) for x, (low, _) in zip(s.x, s.band, strict=True) if math.isfinite(low)][
                ::-1
            ]
            if len(rim) > 2:
                shapes.append(f'<polygon class="band" style="{colour}" points="{_points(rim)}"/>')
        faint = "faint" if s.smooth or s.marks else ""
        dash = f' stroke-dasharray="{s.dash}"' if s.dash else ""
        shapes += [
            f'<polyline class="line {faint}" style="{colour}"{dash} points="{_points(piece)}"/>'
            for piece in _pieces(points)
        ]
        if s.smooth:
            smooth = [(px(x), py(y)) for x, y in zip(s.x, s.smooth, strict=True)]
            shapes.append(f'<polyline class="line" style="{colour}"{dash} points="{_points(smooth)}"/>')
        if s.marks or len(s.x) == 1:
            for index, point in enumerate(points):
                if point is None:
                    continue
                if s.errors and all(map(math.isfinite, s.errors[index])):
                    low, high = (py(y) for y in s.errors[index])
                    overlay.append(
                        f'<i class="whisker" style="{colour};left:{point[0]:.2f}%;top:{high:.2f}%;'
                        f'height:{low - high:.2f}%"></i>'
                    )
                overlay.append(
                    f'<i class="mark" style="{colour};left:{point[0]:.2f}%;top:{point[1]:.2f}%"></i>'
                )
    legend = _legend(chart)
    label = escape(f"{chart.title}. {describe(chart)}")
    meaning = Markup('<p class="meaning">{}</p>').format(chart.meaning) if chart.meaning else ""
    return Markup(
        f'<figure class="chart{" tall" if chart.tall else ""}" data-chart="{escape(chart.key)}">'
        f'<figcaption><b>{escape(chart.title)}</b><span class="now">{_now(chart)}</span></figcaption>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{label}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'
        f'<div class="overlay" aria-hidden="true">{"".join(overlay)}</div></div>'
        f'<p class="xname" aria-hidden="true">{escape(chart.x_name)}</p>{legend}{meaning}</figure>'
    )


def describe(chart: Chart) -> str:
    """The chart in a sentence, for those who do not see it."""
    parts = []
    for s in chart.series:
        known = [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
        if known:
            (x0, y0), (x1, y1) = known[0], known[-1]
            parts.append(
                f"{s.name}: {tell(y0, chart.form)} at {chart.x_name} {x0:g}, {tell(y1, chart.form)} at {x1:g}"
            )
    return "; ".join(parts) + "." if parts else "No values."


def _legend(chart: Chart) -> str:
    if len(chart.series) < 2:
        return ""
    entries = []
    for s in chart.series:
        if s.marks:
            key = f'<i class="mark key" style="--c:var(--{s.colour})"></i>'
        else:
            dash = f' stroke-dasharray="{s.dash}"' if s.dash else ""
            key = (
                '<svg class="key" viewBox="0 0 22 6" aria-hidden="true">'
                f'<line class="line" style="--c:var(--{s.colour})" x1="0" x2="22" y1="3" y2="3"{dash}/></svg>'
            )
        entries.append(f"<li>{key}{escape(s.name)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _now(chart: Chart) -> str:
    """First and last value of the only line; of several lines none is the chart's."""
    lines = [s for s in chart.series if not s.marks]
    if len(lines) > 1:
        return ""
    for s in lines or chart.series:
        known = [y for y in (s.smooth or s.y) if math.isfinite(y)]
        if known:
            if len(known) == 1:
                return tell(known[0], chart.form)
            return f"{tell(known[0], chart.form)} → {tell(known[-1], chart.form)}"
    return "\u2013"


def _tick(value: float, form: str) -> str:
    if form == "share":
        return f"{100 * value:.3g}\u00a0%".replace("-", "\u2212")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k".replace("-", "\u2212")
    return re.sub("e-0?", "e\u2212", f"{value:.4g}").replace("-", "\u2212")


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _pieces(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    return [piece for piece in pieces if len(piece) > 1]


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


# --- The state space. ---


@dataclass(frozen=True)
class TracePath:
    """One dialogue's way through the state space."""

    positions: Sequence[tuple[float, float, float]]
    colour: str
    href: str
    title: str


@dataclass(frozen=True)
class Plane:
    """A view of the paths along one axis."""

    across: int  # index of the axis drawn to the right
    up: int
    names: tuple[str, str]
    paths: tuple[TracePath, ...] = field(default=())


def draw_plane(plane: Plane, low: float, means: Sequence[TracePath]) -> Markup:
    """Paths seen on two of the three axes, from `low` to a little above zero on both."""
    size, high = 300.0, 4.0
    scale = lambda value: size * (value - low) / (high - low)  # noqa: E731
    x = lambda position: scale(position[plane.across])  # noqa: E731
    y = lambda position: size - scale(position[plane.up])  # noqa: E731
    rest = scale(-1.0)
    ticks = [tick for tick in nice_ticks(low, high) if tick < 0]
    parts = [
        f'<rect class="rest" x="{rest:.1f}" y="0" width="{size - rest:.1f}" height="{size - rest:.1f}"/>',
        f'<line class="grid" x1="{scale(0):.1f}" x2="{scale(0):.1f}" y1="0" y2="{size}"/>',
        f'<line class="grid" x1="0" x2="{size}" y1="{size - scale(0):.1f}" y2="{size - scale(0):.1f}"/>',
    ]
    for tick in ticks:
        at, name = scale(tick), _tick(tick, "number")
        parts.append(
            f'<line class="grid fine" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{size}"/>'
            f'<line class="grid fine" x1="0" x2="{size}" y1="{size - at:.1f}" y2="{size - at:.1f}"/>'
            f'<text class="tick" x="{at:.1f}" y="{size - 4}" text-anchor="middle">{name}</text>'
            f'<text class="tick" x="4" y="{size - at - 3:.1f}">{name}</text>'
        )
    for path in plane.paths:
        line = " ".join(f"{x(p):.1f},{y(p):.1f}" for p in path.positions)
        end = path.positions[-1]
        parts.append(
            f'<a href="{escape(path.href)}" tabindex="-1" class="way" style="--c:var(--{path.colour})">'
            f"<title>{escape(path.title)}</title>"
            f'<polyline points="{line}"/>{_end_mark(path.colour, x(end), y(end), 3.2)}</a>'
        )
    for path in means:
        line = " ".join(f"{x(p):.1f},{y(p):.1f}" for p in path.positions)
        start, end = path.positions[0], path.positions[-1]
        parts.append(
            f'<g class="meanway" style="--c:var(--{path.colour})"><title>{escape(path.title)}</title>'
            f'<polyline class="halo" points="{line}"/><polyline points="{line}"/>'
            f'<circle class="start" cx="{x(start):.1f}" cy="{y(start):.1f}" r="5"/>'
            f"{_end_mark(path.colour, x(end), y(end), 7)}</g>"
        )
    across, up = (escape(name) for name in plane.names)
    return Markup(
        f'<figure class="plane"><svg viewBox="0 0 {size:.0f} {size:.0f}" role="img" '
        f'aria-label="{len(plane.paths)} dialogues on the axes {across} and {up}">{"".join(parts)}</svg>'
        f'<figcaption><span class="across">{across} →</span><span class="up">{up} →</span></figcaption>'
        "</figure>"
    )


def _end_mark(colour: str, x: float, y: float, size: float) -> str:
    """A square before training, a disc after: told apart without colour."""
    if colour == "before":
        corner = f'x="{x - size:.1f}" y="{y - size:.1f}"'
        return f'<rect class="end" {corner} width="{2 * size}" height="{2 * size}"/>'
    return f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'


def mean_path(paths: Sequence[Sequence[tuple[float, float, float]]]) -> list[tuple[float, float, float]]:
    """The mean position turn by turn; a dialogue that has ended stays where it ended."""
    longest = max(len(path) for path in paths)
    held = np.asarray([[*path, *[path[-1]] * (longest - len(path))] for path in paths], float)
    return [tuple(point) for point in held.mean(0).tolist()]
