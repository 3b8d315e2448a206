"""SIGTERM, Ctrl-C and a deadline as a request to save and leave, honoured at the next safe point."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

from mapo_jax.peers import Peers


class Interrupted(Exception):
    """The run was asked to stop and stands at a safe point: no update is half done."""


class StopRequest:
    """Collects SIGTERM and SIGINT while its context is entered, and watches the clock.

    The first signal only sets `reason`; whoever holds a safe point calls `check`, which raises. A second
    signal acts as it would without us, for a person who does not want to wait. With several processes a
    request to one is a request to all.
    """

    def __init__(self, deadline_minutes: float = 0.0, peers: Peers | None = None) -> None:
        """Starts the clock.

        Args:
          deadline_minutes: when to ask for a stop; 0: never.
          peers: the other processes of the run.
        """
        self._minutes = deadline_minutes
        self._deadline = time.monotonic() + 60 * deadline_minutes if deadline_minutes else None
        self._peers = peers
        self._reason: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop: a signal's name, or the deadline; None to go on."""
        if self._reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self._ask(f"its deadline of {self._minutes:g} minutes")
        if self._reason is None and self._peers is not None:
            self._reason = self._peers.stop_reason
        return self._reason

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted if there is a reason to stop."""
        if (reason := self.reason) is not None:
            raise Interrupted(reason)

    def _ask(self, reason: str) -> None:
        self._reason = reason
        if self._peers is not None:
            self._peers.ask_to_stop(reason)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self._ask(signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
