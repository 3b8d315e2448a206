"""Messages between the processes of one run: who has come, short values, requests to stop, failures.

Every process has one TCP connection to process 0. JAX's coordination service cannot do this: it ends a
process with a stack trace where another is missing or has died, and has no public way to exchange values
(docs/design.md, "Several hosts"). Arrays travel by collectives (`running/processes.py`). Nothing here knows
of devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections import defaultdict
from collections.abc import Callable

from mapo_jax.errors import UserError

AGAIN = "nothing that was saved is lost; start the same command on every host again"
_HELLO = b'["mapo_jax"]\n'
End, Address = Callable[[str], None], socket.socket | tuple[str, int]


class Peers:
    """The other processes of a run. A thread of its own, with an event loop, sends and receives.

    Every process makes the same calls of `exchange` in the same order. If a process dies, falls silent or
    leaves with last words, the others must exit: they may be in a collective, which cannot be cancelled.

    Attributes:
      stop_reason: the first request to stop, of any process; None to go on.
      over: whether this process has left.
    """

    def __init__(self, address: Address, count: int, index: int, join: float, silent: float, end: End):
        """Waits until all processes have come.

        Args:
          address: where process 0 listens; in process 0 the listening socket, which is closed in the end.
          count: processes, this one included.
          index: of this one, from 0.
          join: seconds to wait for the others.
          silent: a process of which nothing was heard for so many seconds is taken for dead.
          end: called with a sentence when another process is gone; it must end this one.

        Raises:
          UserError: processes are missing, or two have one number; every one that has come says the same.
          TimeoutError: process 0 could not be reached.
        """
        self.index, self.count, self._silent, self._end = index, count, silent, end
        self.over, self.stop_reason = False, None
        self._links: dict[int, tuple[asyncio.StreamWriter, asyncio.Task]] = {}
        self._inbox: dict[int, asyncio.Queue] = defaultdict(asyncio.Queue)
        self._loop = asyncio.new_event_loop()
        self._loop.call_soon(self._beat)
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        joining = (self._reach if index else self._gather)(address, join)
        if refusal := asyncio.run_coroutine_threadsafe(joining, self._loop).result():
            raise UserError(refusal)

    def exchange(self, what: str, value: object, *, everybody: bool = True) -> list | None:
        """All processes' values (JSON) in their order; `what` names the place in the program.

        Unless `everybody` gets them, only process 0 waits for them, and the others return None at once.
        """
        return asyncio.run_coroutine_threadsafe(self._meet(what, value, everybody), self._loop).result()

    def ask_to_stop(self, reason: str) -> None:
        """Sets everybody's `stop_reason`, if there is none yet. Does not wait; may be called in a handler."""
        self._loop.call_soon_threadsafe(self._stop, reason)

    def leave(self, last_words: str | None = None) -> None:
        """Ends this process's part; with last words, the other processes end as well."""
        asyncio.run_coroutine_threadsafe(self._depart(last_words), self._loop).result()

    # --- In the thread of the event loop. ---

    async def _gather(self, listener: socket.socket, seconds: float) -> str | None:
        server = await asyncio.start_server(self._greet, sock=listener, limit=2**30)
        refusal, deadline = None, self._loop.time() + seconds
        while refusal is None and (missing := sorted({*range(1, self.count)} - self._links.keys())):
            if (twice := -min(self._links, default=0)) > 0:
                refusal = f"two processes call themselves process {twice} of {self.count}"
            elif self._loop.time() > deadline:
                refusal = (
                    f"only {self.count - len(missing)} of {self.count} processes joined within {seconds:g} s;"
                    f" missing: process {', '.join(map(str, missing))}. Start the same command on every host,"
                    f" and see that they reach process 0 at {listener.getsockname()[0]}"
                )
            await asyncio.sleep(0.02)
        server.close()
        self._spread("value", refusal)
        if refusal is not None:
            await self._depart(None)
        return refusal

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # of strangers
            async with asyncio.timeout(10):
                word, other = json.loads(await reader.readline())
            if word == "mapo_jax" and 0 < other < self.count > len(self._links) + 1:
                writer.write(_HELLO)
                return self._add(-other if other in self._links else other, reader, writer)
        writer.close()

    async def _reach(self, address: tuple[str, int], seconds: float) -> str | None:
        async with asyncio.timeout(seconds):
            while 0 not in self._links:
                with contextlib.suppress(OSError):  # nobody is there yet, or a stranger
                    reader, writer = await asyncio.open_connection(*address, limit=2**30)
                    writer.write(json.dumps(["mapo_jax", self.index]).encode() + b"\n")
                    if await reader.readline() == _HELLO:
                        self._add(0, reader, writer)
                await asyncio.sleep(0.1)
        return (await self._inbox[0].get())[0]  # process 0 gives up in time, and knows who is missing

    def _add(self, other: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links[other] = writer, self._loop.create_task(self._listen(other, reader))

    async def _listen(self, other: int, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                async with asyncio.timeout(self._silent):
                    kind, *rest = json.loads(await reader.readline())  # ValueError at the end of the stream
                if kind == "value":
                    self._inbox[other].put_nowait(rest)
                elif kind == "stop":
                    self._stop(*rest)
                elif kind == "left":
                    return None if rest[1] is None else self._all_end(*rest)
        except TimeoutError:
            self._all_end(other, f"nothing was heard of it for {self._silent:g} s")
        except (OSError, ValueError):
            self._all_end(other, "its connection closed: it was killed, or its machine taken")

    async def _meet(self, what: str, value: object, everybody: bool) -> list | None:
        if self.index != 0:
            self._spread("value", what, value)
            return (await self._inbox[0].get())[0] if everybody else None
        met = [[what, value], *[await self._inbox[other].get() for other in range(1, self.count)]]
        if len(places := {place for place, _ in met}) > 1:
            self._all_end(0, f"the processes are at different places: {', '.join(sorted(places))}")
        values = [value for _, value in met]
        if everybody:
            self._spread("value", values)
        return values

    def _beat(self) -> None:
        if not self.over:
            self._spread("alive")
            self._loop.call_later(self._silent / 5, self._beat)

    def _stop(self, reason: str) -> None:
        if self.stop_reason is None and not self.over:
            self.stop_reason = reason
            self._spread("stop", reason)

    def _all_end(self, other: int, why: str) -> None:
        if not self.over:
            self.over = True
            self._spread("left", other, why)
            end = f"so process {self.index} ends; {AGAIN}"
            self._end(f"process {other} of {self.count} is gone ({why}), {end}")

    async def _depart(self, last_words: str | None) -> None:
        self.over = True
        self._spread("left", self.index, last_words)
        for writer, _ in self._links.values():
            writer.write_eof()
        if last_words is not None:  # until the others have heard it
            await asyncio.wait([task for _, task in self._links.values()], timeout=1)

    def _spread(self, *message: object) -> None:
        for writer, _ in self._links.values():
            if not writer.is_closing():
                writer.write(json.dumps(message).encode() + b"\n")
