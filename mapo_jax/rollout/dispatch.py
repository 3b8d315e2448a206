"""Asyncio interface of the engine: tasks wait for replies, and a thread decodes blocks of steps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Reply, Request

SHORT_BLOCK = 1  # steps, where lanes have just become free or taken


@dataclass
class _Stream:
    """A reply that is handed out in parts."""

    parts: asyncio.Queue[Reply | Exception] = field(default_factory=asyncio.Queue)
    given: int = 0  # tokens handed out


class Dispatcher:
    """Answers the requests of many dialogues in blocks of decode steps; the event loop is never blocked."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._streams: dict[int, _Stream] = {}
        self._dropped: dict[int, asyncio.Future[None]] = {}
        self._advancing = self._changed = False
        self._has_work = asyncio.Event()

    async def reply(self, request: Request) -> Reply:
        """The reply to a request. If the caller is cancelled, the slot stays busy until the reply ends."""
        self._engine.submit(request)
        self._waiting[request.slot] = asyncio.get_running_loop().create_future()
        self._has_work.set()
        return await self._waiting[request.slot]

    async def stream(self, request: Request) -> AsyncIterator[Reply]:
        """The reply to a request in parts, after every block; ends with it.

        Whoever leaves early calls `cancel` before the slot is used again.
        """
        self._engine.submit(request)
        stream = self._streams[request.slot] = _Stream()
        self._changed = True
        self._has_work.set()
        while self._streams.get(request.slot) is stream or not stream.parts.empty():
            part = await stream.parts.get()
            if isinstance(part, Exception):
                raise part
            yield part

    def cancel(self, slot: int) -> asyncio.Future[None]:
        """Ends the reply of a slot, if one is under way; the future is done when the slot is free."""
        self._changed |= self._streams.pop(slot, None) is not None
        dropped = self._dropped.setdefault(slot, asyncio.get_running_loop().create_future())
        if not self._advancing:
            self._drop()
        return dropped

    def _drop(self) -> None:
        for slot, dropped in self._dropped.items():
            self._engine.cancel(slot)
            dropped.set_result(None)
        self._dropped = {}

    def _hand_out(self, finished: dict[int, Reply]) -> None:
        """Gives every stream what is new in its reply."""
        for slot, stream in list(self._streams.items()):
            whole = finished.get(slot)
            part = self._engine.sampled(slot, stream.given) if whole is None else whole.part(stream.given)
            if part is not None:
                stream.parts.put_nowait(part)
                stream.given += len(part.ids)
            if whole is not None:
                del self._streams[slot]
                self._changed = True

    async def serve(self) -> None:
        """Runs until it is cancelled; the current block is then finished, since it cannot be interrupted.

        An exception of the engine ends it and is raised in every waiting task.
        """
        try:
            while True:
                await self._has_work.wait()
                while self._engine.busy:
                    finished = await self._block()
                    self._drop()
                    self._hand_out(finished)
                    for slot, reply in finished.items():
                        future = self._waiting.pop(slot, None)  # none for a stream
                        if future is not None and not future.done():
                            future.set_result(reply)
                    # A world without delays answers within these passes, and so shares the next block. Parts
                    # of replies that go on are read while that block runs.
                    for _ in range(2 if finished else 0):
                        await asyncio.sleep(0)
                self._has_work.clear()
        except Exception as error:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
            self._waiting.clear()
            for stream in self._streams.values():
                stream.parts.put_nowait(error)
            self._streams.clear()
            for dropped in self._dropped.values():  # the engine is reset before it is used again
                dropped.set_result(None)
            self._dropped = {}
            raise

    async def _block(self) -> dict[int, Reply]:
        # Requests that are sent together come one by one, and a client that has its reply sends the next.
        # Where lanes are free and one has just been taken or left, they need not wait for a whole block.
        short = self._changed and len(self._streams) < self._engine.lanes
        steps = (SHORT_BLOCK,) if short else ()
        self._advancing, self._changed = True, False
        block = asyncio.ensure_future(asyncio.to_thread(self._engine.advance, *steps))
        try:
            return await asyncio.shield(block)
        except asyncio.CancelledError:
            await asyncio.wait([block])
            raise
        finally:
            self._advancing = False
