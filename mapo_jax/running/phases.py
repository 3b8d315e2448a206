"""Timing of a run by named phases, of which one is active at a time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

BETWEEN = "between phases"  # time outside all phases: writing rows, drawing the panel
_REMEMBERED = 100  # last stretches of a phase, for its median


class Stretch(NamedTuple):
    """A continuous interval in one phase."""

    phase: str
    number: int  # counts all stretches of the run
    started: float  # on the clock of `Phases`


class Phases:
    """A timer of nested phases; time counts for the innermost one.

    It costs two readings of the clock per phase, and never waits for a device: a phase ends with its code.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        """`now` returns seconds."""
        self.entered: Callable[[str], None] = lambda phase: None  # called with every phase that begins
        self._now = now
        self._names = [BETWEEN]
        self._seconds: dict[str, float] = defaultdict(float)
        self._stretches: dict[str, list[float]] = defaultdict(list)
        self.current = Stretch(BETWEEN, 0, now())

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """A context manager: its body is this phase."""
        self._switch([*self._names, phase])
        self.entered(phase)
        try:
            yield
        finally:
            self._switch(self._names[:-1])

    def add(self, phase: str, seconds: float) -> None:
        """Adds seconds that were not measured here to a phase."""
        self._seconds[phase] += seconds

    def take(self) -> dict[str, float]:
        """`timing_s/PHASE`: seconds in every phase that ended since the last call."""
        taken = {f"timing_s/{name}": seconds for name, seconds in self._seconds.items() if name != BETWEEN}
        self._seconds.clear()
        return taken

    def stretches(self, phase: str) -> list[float]:
        """Durations in seconds of the last finished stretches of a phase."""
        return list(self._stretches[phase])

    def _switch(self, names: list[str]) -> None:
        now = self._now()
        seconds = now - self.current.started
        self._seconds[self.current.phase] += seconds
        self._stretches[self.current.phase] = [*self._stretches[self.current.phase], seconds][-_REMEMBERED:]
        self._names = names
        # One assignment, as other threads read it.
        self.current = Stretch(names[-1], self.current.number + 1, now)
