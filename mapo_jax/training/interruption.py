"""SIGTERM and Ctrl-C as a request to save and leave, honoured at the next safe point."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupted(Exception):
    """The run was asked to stop and stands at a safe point: no update is half done."""


class StopRequest:
    """Collects SIGTERM and SIGINT while its context is entered.

    The first signal only sets `signal_name`; whoever holds a safe point calls `check`, which raises. A second
    signal acts as it would without us, for a person who does not want to wait.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.signal_name is not None:
            raise Interrupted(self.signal_name)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
