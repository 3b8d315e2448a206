"""A frozen model on our own engine that completes chats, to serve as user, judge or director."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from mapo_jax.config import ENGINE, EnvironmentConfig, RoleConfig, played_roles
from mapo_jax.environment.allowance import waiting
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.roles import Completion, Messages, Schema, with_schema
from mapo_jax.errors import UserError
from mapo_jax.rollout.dispatch import Dispatcher
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Reply, Request
from mapo_jax.rollout.rows import ChatFormat

_DEFAULTS = {"slots": 8, "tokens": 4096}


class RoleEngine(NamedTuple):
    """What an engine for roles is made of; roles for which it is the same share the engine."""

    folder: str
    temperature: float
    slots: int
    tokens: int  # longest prompt with its answer


def role_engine(role: RoleConfig) -> RoleEngine | None:
    """The engine of a role; None if its model is not on one. Raises UserError for other sizes than it has."""
    if role.model is None or not role.model.startswith(ENGINE):
        return None
    sizes = _DEFAULTS | role.extra_body
    if set(sizes) != set(_DEFAULTS) or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise UserError(
            f"`extra_body` of {role.model} is {role.extra_body}; an engine takes slots and tokens there, "
            "whole numbers above 0"
        )
    return RoleEngine(role.model.removeprefix(ENGINE), role.temperature, **sizes)


def role_engines(environment: EnvironmentConfig) -> list[RoleEngine]:
    """The engines of the roles that are played, each once. Raises as `role_engine`."""
    engines = (role_engine(getattr(environment, name)) for name in played_roles(environment))
    return list(dict.fromkeys(filter(None, engines)))


class EngineModel:
    """Completes as many chats at once as the engine has slots; the next starts as soon as one has ended.

    For use within one event loop. A chat's random numbers follow from its seed and its tokens, so that its
    result depends neither on other chats nor on the order of arrival.
    """

    def __init__(self, engine: Engine, chat: ChatFormat) -> None:
        """`engine` has weights loaded; `chat` is the model's format."""
        self._engine, self._chat = engine, chat
        self._dispatcher = Dispatcher(engine)
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(engine.slots):
            self._free.put_nowait(slot)
        self._serving: asyncio.Task | None = None

    async def __call__(
        self, messages: Messages, *, seed: int, schema: Schema | None, max_tokens: int
    ) -> Completion:
        """The model's answer; a schema is added to the last message.

        Raises:
          RoleFailure: of kind malformed: the prompt does not fit, or the answer was cut at `max_tokens`.
        """
        if schema is not None:
            messages = with_schema(messages, schema)
        ids = self._chat.prompt(messages)
        if len(ids) >= self._engine.length:
            raise RoleFailure(
                "malformed",
                f"the prompt has {len(ids)} tokens; raise extra_body.tokens above {self._engine.length}",
            )
        with waiting():
            slot = await self._free.get()
        request = Request(slot, ids, key=_key(seed, ids), turn=0, limit=max_tokens, start=True)
        # Shielded: a cancelled caller must not free a slot whose reply is unfinished.
        reply = await asyncio.shield(asyncio.ensure_future(self._reply(request)))
        text = self._chat.decode(reply.ids)
        if reply.truncated:
            raise RoleFailure("malformed", f"the answer was cut after {len(reply.ids)} tokens", text)
        return Completion(text, len(ids), len(reply.ids))

    async def _reply(self, request: Request) -> Reply:
        if self._serving is None or self._serving.done():
            self._serving = asyncio.ensure_future(self._dispatcher.serve())
            # Its exception is raised in every waiting task; asyncio need not report it again.
            self._serving.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            return await self._dispatcher.reply(request)
        finally:
            self._free.put_nowait(request.slot)


def _key(seed: int, ids: Sequence[int]) -> tuple[int, int, int]:
    digest = hashlib.blake2b(json.dumps(list(ids)).encode(), digest_size=8).digest()
    return seed % 2**32, int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
