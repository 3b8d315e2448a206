"""One program at a time on the devices of a process, whichever thread runs it; and the time they are busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax


class Device(AbstractContextManager):
    """A lock around programs, with a clock. Where threads share it, a program is finished when it is left.

    A device runs one program at a time anyway. Programs of several devices must begin in one order on all of
    them, else each may wait for the other; two threads that dispatch at once do not ensure that.
    """

    def __init__(self, *, shared: bool = False) -> None:
        """Args: shared: whether several threads run programs, so that each must end before the next."""
        self.shared = shared
        self._lock = threading.Lock()
        self._clock: tuple[float, float | None] = 0.0, None  # seconds so far; since when it is busy
        self._taken = 0.0

    @property
    def seconds(self) -> float:
        """Time with a program at work, the host's work for it included, since this object was made."""
        seconds, since = self._clock
        return seconds if since is None else seconds + time.monotonic() - since

    def take_seconds(self) -> float:
        """Those since the last call; for one thread only."""
        before, self._taken = self._taken, self.seconds
        return self._taken - before

    def __enter__(self) -> Device:
        self._lock.acquire()
        self._clock = self._clock[0], time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._clock = self.seconds, None
        self._lock.release()


@dataclass(frozen=True)
class Exclusive:
    """A program that waits for its turn on a device; where threads share it, it returns with its results."""

    program: Callable[..., Any]  # jitted, for `lower`
    device: Device

    def __call__(self, *arguments: Any) -> Any:
        with self.device:
            results = self.program(*arguments)
            return jax.block_until_ready(results) if self.device.shared else results

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """That of the program."""
        return self.program.lower(*arguments)
