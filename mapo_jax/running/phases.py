"""Where the time of a run goes: named phases, one at a time, and how long each has taken."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

BETWEEN = "between phases"  # writing rows, drawing the panel: what no phase is entered for
_REMEMBERED = 100  # stretches of a phase that its median is taken from


class Stretch(NamedTuple):
    """A phase from when it was entered, or come back to, until it was left."""

    phase: str
    number: int  # of all stretches: tells two in the same phase apart
    started: float  # on the clock of `Phases`


class Phases:
    """A stopwatch with names, cheap enough to be always on.

    Phases nest; a second belongs to the innermost one. Entering and leaving costs two readings of the clock,
    and nothing waits for a device: a phase ends when its code does.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        """`now` gives seconds."""
        self._now = now
        self._names = [BETWEEN]
        self._seconds: dict[str, float] = defaultdict(float)
        self._stretches: dict[str, list[float]] = defaultdict(list)
        self.current = Stretch(BETWEEN, 0, now())

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The body is this phase."""
        self._switch([*self._names, phase])
        try:
            yield
        finally:
            self._switch(self._names[:-1])

    def add(self, phase: str, seconds: float) -> None:
        """Counts seconds to a phase that this process was not there for."""
        self._seconds[phase] += seconds

    def take(self) -> dict[str, float]:
        """`timing_s/PHASE`: seconds in every phase since this was last asked, for phases left meanwhile."""
        taken = {f"timing_s/{name}": seconds for name, seconds in self._seconds.items() if name != BETWEEN}
        self._seconds.clear()
        return taken

    def stretches(self, phase: str) -> list[float]:
        """Seconds of the last finished stretches of a phase."""
        return list(self._stretches[phase])

    def _switch(self, names: list[str]) -> None:
        now = self._now()
        seconds = now - self.current.started
        self._seconds[self.current.phase] += seconds
        self._stretches[self.current.phase] = [*self._stretches[self.current.phase], seconds][-_REMEMBERED:]
        self._names = names
        self.current = Stretch(names[-1], self.current.number + 1, now)  # one assignment: other threads look


def phase(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes all of a function a phase of the run, which is its first argument and has `phases`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(run: Any, *args: Any, **options: Any) -> Any:
            with run.phases(name):
                return function(run, *args, **options)

        return timed

    return decorate
