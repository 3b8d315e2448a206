"""Time limit of a role's call, which does not count the time that the call waits for capacity."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar


class Allowance:
    """The time of one call. The clock stops while it is in `waiting`.

    A call may make concurrent calls, as a judge with several samples does: while one of them waits, the clock
    of the whole call stops. (Each attempt also has its own limit.)
    """

    def __init__(self, seconds: float, deadline: float, clock: Callable[[], float]) -> None:
        """Use `allow`."""
        self._seconds, self._deadline, self._clock = seconds, deadline, clock
        self._used, self._since = 0.0, clock()
        self._waits = 0  # concurrent calls in `waiting`
        self.timeout = asyncio.timeout(None)
        self._open = True

    @property
    def used(self) -> float:
        """Seconds so far, without waits."""
        running = self._open and not self._waits
        return self._used + (self._clock() - self._since if running else 0.0)

    @property
    def expired(self) -> bool:
        """Whether the call was cancelled by its limit."""
        return self.timeout.expired()

    def wait(self, change: int) -> None:
        """One more call waits (1), or one less (-1)."""
        self._used, self._since = self.used, self._clock()
        self._waits += change
        self.schedule()

    def schedule(self) -> None:
        """Sets the timeout from the time left."""
        if not self._open or self.expired:  # a sample may outlive its call
            return
        left, until_deadline = self._seconds - self._used, self._deadline - self._clock()
        if self._waits and left > 0:
            left = until_deadline
        self.timeout.reschedule(asyncio.get_running_loop().time() + max(0.0, min(left, until_deadline)))

    def close(self) -> None:
        """Stops the clock."""
        self._used, self._open = self.used, False


_ALLOWANCE: ContextVar[Allowance | None] = ContextVar("allowance", default=None)


@asynccontextmanager
async def allow(seconds: float, deadline: float, clock=time.monotonic) -> AsyncIterator[Allowance]:
    """Ends what is awaited in this context with TimeoutError when its time is up.

    Args:
      seconds: time limit without waits (see `waiting`).
      deadline: time of `clock` at which it ends even while it waits.
      clock: for tests.
    """
    allowance = Allowance(seconds, deadline, clock)
    token = _ALLOWANCE.set(allowance)
    try:
        async with allowance.timeout:
            allowance.schedule()
            yield allowance
    finally:
        allowance.close()
        _ALLOWANCE.reset(token)


@contextmanager
def waiting() -> Iterator[None]:
    """A wait for a connection, a limit per minute or the next attempt, which no time limit counts."""
    allowance = _ALLOWANCE.get()
    if allowance is None:
        yield
        return
    allowance.wait(1)
    try:
        yield
    finally:
        allowance.wait(-1)
