"""An event loop that goes on while the main thread does other work."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread(AbstractContextManager):
    """An event loop in a thread of its own; `run` is that of `asyncio.Runner`, and `start` does not wait.

    A context manager, like a Runner: at its end tasks are cancelled, and the thread ends when they have.
    """

    def __enter__(self) -> LoopThread:
        ready: queue.Queue[asyncio.AbstractEventLoop] = queue.Queue()
        self._started: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

        async def serve() -> None:
            self._over = asyncio.Event()
            ready.put(asyncio.get_running_loop())
            await self._over.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="world", daemon=True)
        self._thread.start()
        self._loop = ready.get()
        return self

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. An exception in the waiting thread, such as KeyboardInterrupt, cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begins `work`; the task is one of the loop, for another `run` to await."""

        async def begin() -> asyncio.Task[T]:
            task = asyncio.ensure_future(work)
            self._started.add(task)
            # Nobody awaits it after an interruption: its exception is retrieved, else asyncio would log it.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            return task

        return self.run(begin())

    def cancel(self) -> None:
        """Cancels what `start` began, and waits until it has ended."""

        async def end() -> None:
            for task in list(self._started):
                task.cancel()
            await asyncio.gather(*self._started, return_exceptions=True)

        self.run(end())

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
