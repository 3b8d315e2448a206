"""A watch over a long run: when a phase takes far longer than it usually does, the log says where it stands.

A run that hangs looks like one that works. The watch is a thread of its own that only looks: it holds no lock
of the run, touches no device, and whatever goes wrong in it is swallowed, so that it can neither stop a run
nor fail it.
"""

from __future__ import annotations

import logging
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from mapo_jax.running.phases import Phases

LOG = logging.getLogger("mapo_jax.heartbeat")  # without a handler of its own: standard error

FACTOR = 5.0  # a phase is late at so many times the median of its stretches,
LEAST_SECONDS = 60.0  # but not before this,
FIRST_SECONDS = 1800.0  # and one that has never ended, compilation included, not before this
_CHECK_SECONDS = 5.0


class Heartbeat:
    """Logs a warning with the stacks of all threads while a phase is late; again whenever the time doubles.

    A context manager around the run. Late is: `FACTOR` times the median of the phase's last stretches, at
    least `LEAST_SECONDS`; for a phase that has not ended yet `FIRST_SECONDS`.
    """

    def __init__(self, phases: Phases, now: Callable[[], float] = time.monotonic):
        """`now` is the clock of `phases`."""
        self._phases, self._now = phases, now
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._told = (-1, 0.0)  # the stretch that was reported, and its seconds by then

    def look(self) -> str | None:
        """What there is to say now, if anything."""
        stretch = self._phases.current
        seconds = self._now() - stretch.started
        finished = self._phases.stretches(stretch.phase)
        median = statistics.median(finished) if finished else None
        limit = FIRST_SECONDS if median is None else max(LEAST_SECONDS, FACTOR * median)
        number, told = self._told
        if seconds < (2 * told if number == stretch.number else limit):
            return None
        self._told = (stretch.number, seconds)
        usual = "for the first time" if median is None else f"where the median is {median:.1f} s"
        return (
            f"the run has been in the phase `{stretch.phase}` for {seconds:.0f} s, {usual}; "
            f"what its threads are doing:\n{stacks()}"
        )

    def _watch(self) -> None:
        while not self._stopped.wait(_CHECK_SECONDS):
            try:
                message = self.look()
                if message is not None:
                    LOG.warning(message)
            except Exception:  # a watch that fails is no reason for the run to
                continue

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()  # not joined: it may be writing to a log that is stuck, and is a daemon


def stacks() -> str:
    """The stacks of all threads but the one that asks, as text, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own, main = threading.get_ident(), threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"--- thread {names.get(ident, ident)} ---\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident != own
    )
