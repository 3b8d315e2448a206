"""The time that a call of a role may take, without what it waits for its turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar


class Allowance:
    """The time that a call may take. What it spends in `waiting` uses nothing up.

    A call may make others side by side, as a judge with samples does: while one of them waits, no time of the
    whole is used. (An attempt has a limit of its own.)
    """

    def __init__(self, seconds: float, deadline: float, clock: Callable[[], float]) -> None:
        """Use `allow`."""
        self._seconds, self._deadline, self._clock = seconds, deadline, clock
        self._used, self._since = 0.0, clock()
        self._waits = 0  # under way
        self._timeout = asyncio.timeout(None)
        self._open = True

    @property
    def used(self) -> float:
        """Seconds so far, without the waits."""
        running = self._open and not self._waits
        return self._used + (self._clock() - self._since if running else 0.0)

    @property
    def expired(self) -> bool:
        """Whether the call was cut off."""
        return self._timeout.expired()

    def wait(self, change: int) -> None:
        """One more call waits (1), or one less (-1)."""
        self._used, self._since = self.used, self._clock()
        self._waits += change
        self._schedule()

    def _schedule(self) -> None:
        if not self._open or self.expired:  # as for a sample that outlives the call
            return
        left, until_deadline = self._seconds - self._used, self._deadline - self._clock()
        if self._waits and left > 0:
            left = until_deadline
        self._timeout.reschedule(asyncio.get_running_loop().time() + max(0.0, min(left, until_deadline)))

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[Allowance]:
        token = _ALLOWANCE.set(self)
        try:
            async with self._timeout:
                self._schedule()
                yield self
        finally:
            self._used, self._open = self.used, False
            _ALLOWANCE.reset(token)


_ALLOWANCE: ContextVar[Allowance | None] = ContextVar("allowance", default=None)


def allow(
    seconds: float, deadline: float, clock: Callable[[], float] = time.monotonic
) -> AbstractAsyncContextManager[Allowance]:
    """Cuts off what is awaited in this context with TimeoutError.

    Args:
      seconds: longest time, without what is spent in `waiting`.
      deadline: time of `clock` at which it ends even while it waits.
      clock: for tests.
    """
    return Allowance(seconds, deadline, clock)._running()


@contextmanager
def waiting() -> Iterator[None]:
    """For a place, a limit per minute or another attempt: such time is nobody's fault, and is not counted."""
    allowance = _ALLOWANCE.get()
    if allowance is None:
        yield
        return
    allowance.wait(1)
    try:
        yield
    finally:
        allowance.wait(-1)
