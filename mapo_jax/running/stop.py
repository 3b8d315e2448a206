"""Stop requests: SIGTERM, Ctrl-C and a deadline set a stop flag, which is checked at safe points."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from mapo_jax.peers import Peers

Check = Callable[[], None]
"""Raises Interrupted after a stop request; called at safe points."""


ANSWER = "stopping at the next safe point; once more to quit at once"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A stop request reached a safe point: no update is half applied."""


class StopRequest:
    """Handles SIGTERM and SIGINT inside its context, and a deadline.

    The first signal sets `reason`; at safe points `check` raises. A second signal has its default effect. A
    request to one of several processes reaches all.
    """

    def __init__(
        self,
        deadline_minutes: float = 0.0,
        peers: Peers | None = None,
        answer: Callable[[str], None] | None = None,
    ) -> None:
        """Starts the time of the deadline.

        Args:
          deadline_minutes: time until the stop request; 0 for no deadline.
          peers: the other processes of the run.
          answer: shows ANSWER at once after the first signal, from a thread: the main thread may be in a
            compiled program, which runs to its end. A second signal then ends the process.
        """
        self._answer = answer
        self._minutes = deadline_minutes
        self._deadline = time.monotonic() + 60 * deadline_minutes if deadline_minutes else None
        self._peers = peers
        self._reason: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def reason(self) -> str | None:
        """A signal's name or the deadline; None without a stop request."""
        if self._reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self._request(f"its deadline of {self._minutes:g} minutes")
        if self._reason is None and self._peers is not None:
            self._reason = self._peers.stop_reason
        return self._reason

    def __enter__(self) -> StopRequest:
        if self._answer is not None:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._answer_signals, args=(reader,), daemon=True).start()
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self._answer is not None:
            signal.set_wakeup_fd(self._previous_writer)
            os.close(self._writer)

    def _answer_signals(self, reader: int) -> None:
        answered = False
        while number := os.read(reader, 1):
            if number[0] in _SIGNALS:
                if answered:
                    os._exit(128 + number[0])
                answered = True
                self._answer(ANSWER)
        os.close(reader)

    def check(self) -> None:
        """Raises Interrupted after a stop request."""
        if (reason := self.reason) is not None:
            raise Interrupted(reason)

    def _request(self, reason: str) -> None:
        self._reason = reason
        if self._peers is not None:
            self._peers.ask_to_stop(reason)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        for each, previous in self._previous.items():
            # A shell's background jobs ignore SIGINT; there too the second one must end the process.
            signal.signal(each, signal.SIG_DFL if previous == signal.SIG_IGN else previous)
        self._request(signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
