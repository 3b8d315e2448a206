"""A watchdog: when a phase takes far longer than usual, it logs the stacks of all threads.

A hanging run looks like a working one. The watchdog thread takes no lock of the run, uses no device, and
ignores its own errors, so it can neither block a run nor make it fail.
"""

from __future__ import annotations

import logging
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable

from mapo_jax.running.phases import Phases

LOG = logging.getLogger("mapo_jax.heartbeat")  # no handler of its own, so it goes to standard error

FACTOR = 5.0  # a phase is late after this many times the median of its earlier durations,
LEAST_SECONDS = 60.0  # but not earlier than this
FIRST_SECONDS = 1800.0  # a phase that has never ended is late after this; it may compile programs
_CHECK_SECONDS = 5.0


class Heartbeat:
    """Logs a warning with the stacks of all threads when a phase is late, and whenever its time doubles.

    A context manager around the run.
    """

    def __init__(self, phases: Phases, now: Callable[[], float] = time.monotonic):
        """`now` is the clock of `phases`."""
        self._phases, self._now = phases, now
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._reported = (-1, 0.0)  # number of the stretch in the last warning, and its seconds by then

    def look(self) -> str | None:
        """The warning that is due now, if any."""
        stretch = self._phases.current
        seconds = self._now() - stretch.started
        finished = self._phases.stretches(stretch.phase)
        median = statistics.median(finished) if finished else None
        limit = FIRST_SECONDS if median is None else max(LEAST_SECONDS, FACTOR * median)
        number, reported = self._reported
        if seconds < (2 * reported if number == stretch.number else limit):
            return None
        self._reported = (stretch.number, seconds)
        usual = "for the first time" if median is None else f"where the median is {median:.1f} s"
        return (
            f"the run has been in the phase `{stretch.phase}` for {seconds:.0f} s, {usual}; "
            f"what its threads are doing:\n{stacks()}"
        )

    def _watch(self) -> None:
        while not self._stopped.wait(_CHECK_SECONDS):
            try:
                if (message := self.look()) is not None:
                    LOG.warning(message)
            except Exception:  # must not make the run fail
                continue

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()  # not joined: the thread may wait for a blocked log; it is a daemon


def stacks() -> str:
    """The stacks of all threads except the calling one, as text, the main thread's first.

    `faulthandler` has neither thread names nor source lines.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    caller, main = threading.get_ident(), threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"--- thread {names.get(ident, ident)} ---\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident != caller
    )
