"""The engine for asyncio: many tasks ask, blocks of decode steps answer, and the event loop never waits."""

from __future__ import annotations

import asyncio

from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Reply, Request


class Dispatcher:
    """Takes requests from many dialogues and answers them in blocks; the event loop never waits for it."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._something_to_do = asyncio.Event()

    async def reply(self, request: Request) -> Reply:
        """The reply to a request. Who gives up waiting leaves the slot occupied until the reply has ended."""
        self._engine.submit(request)
        self._waiting[request.slot] = asyncio.get_running_loop().create_future()
        self._something_to_do.set()
        return await self._waiting[request.slot]

    async def serve(self) -> None:
        """Works until it is cancelled; then the block under way still ends, since nothing can stop it.

        What the engine raises ends it, and reaches everybody who waits.
        """
        try:
            while True:
                await self._something_to_do.wait()
                while self._engine.busy:
                    for slot, reply in (await self._block()).items():
                        answered = self._waiting.pop(slot)
                        if not answered.done():
                            answered.set_result(reply)
                    # A world that does not wait answers within these passes, and so shares the next block.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                self._something_to_do.clear()
        except Exception as error:
            for answered in self._waiting.values():
                if not answered.done():
                    answered.set_exception(error)
            self._waiting.clear()
            raise

    async def _block(self) -> dict[int, Reply]:
        block = asyncio.ensure_future(asyncio.to_thread(self._engine.advance))
        try:
            return await asyncio.shield(block)
        except asyncio.CancelledError:
            await asyncio.wait([block])
            raise
