"""Runs coroutines, also where an event loop is running already, as in a notebook."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def open_runner() -> Iterator[asyncio.Runner]:
    """An `asyncio.Runner`. If this thread's event loop is running, it has a loop in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with asyncio.Runner() as runner:
            yield runner
        return
    with ThreadPoolExecutor(1) as thread, _RunnerInThread(thread) as runner:
        yield runner


class _RunnerInThread(asyncio.Runner):
    """A runner whose caller waits for another thread, and so blocks its own loop meanwhile."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        super().__init__(loop_factory=asyncio.new_event_loop)  # leaves this thread's own loop in place
        self._thread = thread

    def run(self, coro: Coroutine[Any, Any, Any], **options: Any) -> Any:
        """As `asyncio.Runner.run`."""
        return self._thread.submit(super().run, coro, **options).result()

    def close(self) -> None:
        """As `asyncio.Runner.close`."""
        self._thread.submit(super().close).result()
