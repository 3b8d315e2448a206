"""Messages between the processes of one run: joining, short values, stop requests, failures.

Every process has one TCP connection to process 0. JAX's coordination service cannot do this: when a process
is missing or dies, it aborts the others with a stack trace, and it has no public call to exchange values
(docs/design.md, "Several hosts"). Arrays are exchanged by collectives (`running/processes.py`).
"""

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
    """Connections to the other processes of a run, served by an event loop in a background thread.

    Every process makes the same calls of `exchange` in the same order. If a process dies, stops responding or
    leaves with an error, the others must exit: they may be in a collective, which cannot be cancelled.

    Attributes:
      stop_reason: the first stop request of any process; None without one.
      over: whether this process has left.
    """

    def __init__(self, address: Address, count: int, index: int, join: float, silent: float, end: End):
        """Waits until all processes have joined.

        Args:
          address: of process 0; in process 0 the listening socket, which is closed at the end.
          count: number of processes.
          index: of this process, from 0.
          join: seconds to wait for the others.
          silent: seconds without a message after which a process counts as dead.
          end: called with a sentence when another process is gone; it must exit this process.

        Raises:
          UserError: processes are missing, or two have the same index; the same error in all that joined.
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
        """All processes' values (JSON) in their order; `what` names the call.

        If not `everybody`, only process 0 gets them, and the others return None without waiting.
        """
        return asyncio.run_coroutine_threadsafe(self._meet(what, value, everybody), self._loop).result()

    def ask_to_stop(self, reason: str) -> None:
        """Sets `stop_reason` in all processes unless it is set. Does not wait; safe in a signal handler."""
        self._loop.call_soon_threadsafe(self._stop, reason)

    def leave(self, reason: str | None = None) -> None:
        """Leaves the run; with a reason, the other processes exit as well."""
        asyncio.run_coroutine_threadsafe(self._depart(reason), self._loop).result()

    # --- The methods below run in the thread of the event loop. ---

    async def _gather(self, listener: socket.socket, seconds: float) -> str | None:
        server = await asyncio.start_server(self._greet, sock=listener, limit=2**30)
        refusal, deadline = None, self._loop.time() + seconds
        while refusal is None and (missing := sorted({*range(1, self.count)} - self._links.keys())):
            if (repeated := -min(self._links, default=0)) > 0:
                refusal = f"two processes call themselves process {repeated} of {self.count}"
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
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # from other programs
            async with asyncio.timeout(10):
                word, other = json.loads(await reader.readline())
            if word == "mapo_jax" and 0 < other < self.count > len(self._links) + 1:
                writer.write(_HELLO)
                return self._add(-other if other in self._links else other, reader, writer)
        writer.close()

    async def _reach(self, address: tuple[str, int], seconds: float) -> str | None:
        async with asyncio.timeout(seconds):
            while 0 not in self._links:
                with contextlib.suppress(OSError):  # process 0 does not listen yet
                    reader, writer = await asyncio.open_connection(*address, limit=2**30)
                    writer.write(json.dumps(["mapo_jax", self.index]).encode() + b"\n")
                    if await reader.readline() == _HELLO:
                        self._add(0, reader, writer)
                await asyncio.sleep(0.1)
        return (await self._inbox[0].get())[0]  # process 0 has a time limit, and names missing processes

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
        messages = [[what, value], *[await self._inbox[other].get() for other in range(1, self.count)]]
        if len(places := {place for place, _ in messages}) > 1:
            self._all_end(0, f"the processes are at different places: {', '.join(sorted(places))}")
        values = [value for _, value in messages]
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

    async def _depart(self, reason: str | None) -> None:
        self.over = True
        self._spread("left", self.index, reason)
        for writer, _ in self._links.values():
            writer.write_eof()
        if reason is not None:  # give the others time to receive it
            await asyncio.wait([task for _, task in self._links.values()], timeout=1)

    def _spread(self, *message: object) -> None:
        for writer, _ in self._links.values():
            if not writer.is_closing():
                writer.write(json.dumps(message).encode() + b"\n")
