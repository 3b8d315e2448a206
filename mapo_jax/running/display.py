"""The progress of a run: a live panel on a terminal, one line per step elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mapo_jax.commands import printable, show
from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.scores.figures import dialogue_rewards

PHASES = {  # of `running/phases.py`, and what is shown while they last
    "warm_up": "compiling the sampler",
    "rollout": "dialogues",
    "update": "update",
    "checkpoint": "saving",
    "evaluation": "validation",
    "calibration": "testing the judge",
    "report": "writing the report",
}
LONG_SECONDS = 1.0  # without a terminal: a phase that took so long is named again
PLAIN_SECONDS = 30.0  # without a terminal: time between two lines about a phase that goes on
_PACE = 20  # last steps, for the time that is left
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # a braille cell: four rows, two columns


def plot(values: Sequence[float], width: int = 60, height: int = 6) -> str:
    """A curve in braille dots: `height` lines of `width` characters, with the range at the left.

    Non-finite values are left out. More values than dots are averaged in bins; fewer are interpolated.
    """
    points = np.asarray([value for value in values if np.isfinite(value)], float)
    if points.size == 0:
        return ""
    columns = 2 * width
    if points.size > columns:
        dots = np.array([chunk.mean() for chunk in np.array_split(points, columns)])
    else:
        dots = np.interp(np.linspace(0, points.size - 1, columns), np.arange(points.size), points)
    low, high = dots.min(), dots.max()
    span = high - low or 1.0
    rows = 4 * height
    cells = np.zeros((height, width), int)
    for column, value in enumerate(dots):
        row = round((high - value) / span * (rows - 1))
        cells[row // 4, column // 2] |= _DOTS[row % 4][column % 2]
    labels = [""] * height
    labels[0], labels[-1] = f"{high:+.2f}", f"{low:+.2f}"
    return "\n".join(
        f"{label:>7} " + "".join(chr(0x2800 + cell) for cell in line)
        for label, line in zip(labels, cells, strict=True)
    )


def duration(seconds: float) -> str:
    """Seconds in the two largest units: "3 h 05 min", "4 min 10 s", "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Display:
    """Shows a run's progress; a context manager.

    On a terminal: a panel with the phase, the finished steps, the time left and the curve of the mean return.
    Elsewhere (a log file, `progress=False`): one plain line per step, and lines about phases that take long.
    """

    def __init__(
        self,
        title: str,
        steps: int,
        *,
        live: bool,
        console: Console | None = None,
        verbose: bool = False,
        now: Callable[[], float] = time.monotonic,
    ):
        """Args:

        live: show the panel if the console is a terminal.
        verbose: more figures per step, and the table at the end.
        now: returns seconds.
        """
        self.console = console or Console(highlight=False)
        self.verbose = verbose
        self._title, self._steps, self._now = title, steps, now
        self._live = live and self.console.is_terminal
        self._returns: list[float] = []
        self._seconds: list[float] = []  # of the steps
        self._last = ""
        self._phase, self._began, self._spoke = "", now(), now()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[counted]}"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
        )
        self._step_task = self._progress.add_task("steps", total=steps, counted=f"0/{steps}")
        self._phase_task = self._progress.add_task("starting", total=None, counted="")
        self._screen = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)

    def __enter__(self) -> Display:
        if self._live:
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the live panel; its last state stays on the screen."""
        if self._live:
            self._screen.stop()

    def continue_after(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Takes over the finished steps of an earlier process, so that the curve shows them."""
        for row in rows:
            if isinstance(value := row.get("return/mean"), float):
                self._returns.append(value)
                self._seconds.append(row.get("timing_s/step") or 0.0)
                self._count(row["step"])

    def _count(self, step: int) -> None:
        self._progress.update(self._step_task, completed=step, counted=f"{step}/{self._steps}")

    def enter(self, phase: str, earlier: Sequence[float] = ()) -> None:
        """Shows that a phase of PHASES begins.

        Without a terminal it is a line the first time, and again if it is long and no part of every step,
        which has a line of its own.

        Args:
          earlier: seconds that it took before.
        """
        label, long = PHASES.get(phase, phase), earlier and earlier[-1] >= LONG_SECONDS
        if not earlier or (long and phase not in ("rollout", "update")):
            self.announce(label)
        else:
            self._show(label)

    def announce(self, what: str) -> None:
        """Shows what begins now; without a terminal as a line."""
        self._show(what)
        if not self._live:
            self.note(f"{what} ...")

    def phase(self, name: str, done: int = 0, total: int | None = None, *, counted: str = "") -> None:
        """Shows the current phase and its progress.

        Args:
          counted: the numbers to show instead of `done/total`, which the bar and the time left follow.
        """
        counted = counted or (f"{done}/{total}" if total else "")
        self._show(name, done, total, counted)
        seconds = self._now() - self._began
        if not self._live and done and total and self._now() - self._spoke > PLAIN_SECONDS < seconds:
            left = duration(seconds / done * (total - done))
            self.note(f"{name}: {counted}, {left} left")

    def _show(self, name: str, done: int = 0, total: int | None = None, counted: str = "") -> None:
        if name != self._phase:
            self._phase, self._began = name, self._now()
            self._progress.reset(self._phase_task)
        self._progress.update(
            self._phase_task, description=name, completed=done, total=total, counted=counted
        )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a finished step, in fewer than 80 columns."""
        self._returns.append(metrics["return/mean"])
        self._seconds.append(metrics["timing_s/step"])
        self._count(step)
        # Without the first step, which compiles.
        left = (self._steps - step) * statistics.median(self._seconds[1:][-_PACE:] or self._seconds)
        self._last = (
            f"step {step:>4}/{self._steps}  return {metrics['return/mean']:+6.2f}  "
            f"reward {metrics['reward/mean']:+5.2f}  turns {metrics['turns/mean']:.1f}  "
            f"{metrics['timing_s/step']:.1f} s" + (f", {duration(left)} left" if left else "")
        )
        if self.verbose:
            self._last += (
                f"  entropy {metrics['actor/entropy']:5.3f}  grad {metrics['actor/grad_norm']:6.3f}"
                f"{_time_by_phase(metrics)}"
            )
        if not self._live:
            self.note(self._last)

    def evaluation(self, done: int, metrics: Mapping[str, float]) -> None:
        """Shows the results of the validation dialogues."""
        self.note(
            f"validation after {done} steps: return {metrics['return/mean']:+.2f}  "
            f"reward {metrics['reward/mean']:+.2f}  EPM-Q {metrics['epm_q']:.1f}  "
            f"turns {metrics['turns/mean']:.1f}"
        )

    def note(self, text: str) -> None:
        """Prints a line above the panel; on a terminal wrapped between words."""
        self._spoke = self._now()
        show(self.console, text)

    def _render(self) -> Panel:
        parts = [self._progress]
        if self._returns:
            parts += [Text("mean return per step", style="dim"), Text(plot(self._returns)), Text(self._last)]
        return Panel(Group(*parts), title=escape(self._title))


def _time_by_phase(metrics: Mapping[str, float]) -> str:
    """The times of a step's phases and its MFU, if known."""
    parts = [
        f"{label} {metrics[name]:.1f}"
        for label, name in (
            ("rollout", "timing_s/rollout"),
            ("of it world", "timing_s/environment"),
            ("update", "timing_s/update"),
        )
        if name in metrics
    ]
    text = f" ({', '.join(parts)})" if parts else ""
    return text + (f"  MFU {metrics['perf/mfu']:.1%}" if "perf/mfu" in metrics else "")


def transcript(state: DialogueState, label: str) -> str:
    """A dialogue as text, with the reward of each reply."""
    lines = [f"--- {label}: {state.scenario.id} ({state.scenario.topic}) ---"]
    for turn, reward in zip(state.turns, dialogue_rewards(state), strict=True):
        score = "unscored" if reward is None else f"{reward:+.2f}"
        lines += [f"  user   {turn.user}", f"  policy {turn.reply or '(nothing)'}   [{score}]"]
    return printable("\n".join([*lines, f"  ({state.outcome} after {state.turn_count} turns)"]))


_RESULTS = (  # label, metric, format
    ("return of a dialogue", "return/mean", "{:+.2f}"),
    ("reward per turn", "reward/mean", "{:+.2f}"),
    ("EPM-Q", "epm_q", "{:.1f}"),
    ("replies that harm", "judge/harm", "{:.0%}"),
    ("turns", "turns/mean", "{:.1f}"),
)


def results_table(
    first: Mapping[str, float], last: Mapping[str, float], helper: Mapping[str, float]
) -> Table:
    """Validation before and after training beside the good helper; "way made" is the share of that gap."""
    table = Table(title="validation dialogues", title_justify="left")
    for heading in ("", "before", "after", "good helper", "way made"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = list(_RESULTS)
    for name in sorted({*first, *last, *helper}):
        group, _, rest = name.partition("/")
        if group == "naming" and not rest.endswith(("_chance", "_rate")):
            rows.append((f"{rest} named right", name, "{:.0%}"))
        if group == "kind" and any(figures.get(name) for figures in (first, last, helper)):
            rows.append(
                ("largest share of one kind" if rest == "most" else f"share of {rest}", name, "{:.0%}")
            )
    for label, name, form in rows:
        values = [figures.get(name) for figures in (first, last, helper)]
        way = ""
        if name in ("return/mean", "reward/mean", "epm_q") and None not in values and values[2] > values[0]:
            way = f"{(values[1] - values[0]) / (values[2] - values[0]):.0%}"
        table.add_row(label, *("" if value is None else form.format(value) for value in values), way)
    return table
