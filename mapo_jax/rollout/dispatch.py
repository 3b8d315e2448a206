"""Asyncio interface of the engine: tasks wait for replies, and a thread decodes blocks of steps."""

from __future__ import annotations

import asyncio

from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Reply, Request


class Dispatcher:
    """Answers the requests of many dialogues in blocks of decode steps; the event loop is never blocked."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._has_work = asyncio.Event()

    async def reply(self, request: Request) -> Reply:
        """The reply to a request. If the caller is cancelled, the slot stays busy until the reply ends."""
        self._engine.submit(request)
        self._waiting[request.slot] = asyncio.get_running_loop().create_future()
        self._has_work.set()
        return await self._waiting[request.slot]

    async def serve(self) -> None:
        """Runs until it is cancelled; the current block is then finished, since it cannot be interrupted.

        An exception of the engine ends it and is raised in every waiting task.
        """
        try:
            while True:
                await self._has_work.wait()
                while self._engine.busy:
                    for slot, reply in (await self._block()).items():
                        future = self._waiting.pop(slot)
                        if not future.done():
                            future.set_result(reply)
                    # A world without delays answers within these passes, and so shares the next block.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                self._has_work.clear()
        except Exception as error:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
            self._waiting.clear()
            raise

    async def _block(self) -> dict[int, Reply]:
        block = asyncio.ensure_future(asyncio.to_thread(self._engine.advance))
        try:
            return await asyncio.shield(block)
        except asyncio.CancelledError:
            await asyncio.wait([block])
            raise
