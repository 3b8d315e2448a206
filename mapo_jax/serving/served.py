"""A model that is served: its engine, whose slots keep conversations, and replies as they are sampled."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import jinja2

from mapo_jax.rollout.dispatch import Dispatcher
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.serving.protocol import ChatRequest, ProtocolError, logprob_entries
from mapo_jax.serving.text import ReplyText, speller

REMEMBERED_TOKENS = 4_000_000  # of conversations whose rows are kept as ids, 16 MB
PING_SECONDS = 15.0  # a stream that waits says so, or proxies would close it
INLINE_CHARACTERS = 4000  # a prompt of more takes over 5 ms and is made in a thread
MESSAGE_CHARACTERS = 250  # what rendering a message costs, as characters to tokenise
_PROMPTS = ThreadPoolExecutor(1, "prompts")


@dataclass(frozen=True)
class Conversation:
    """A conversation up to a reply, as the model saw it."""

    id: str
    row: array  # its ids, with the reply and the end of its turn; empty if it cannot be continued as ids
    kept: bool  # all of it
    continued: bool = False  # a later request has gone on from here


@dataclass(frozen=True)
class Prompt:
    """A request's messages as tokens."""

    ids: tuple[int, ...]
    conversation: Conversation | None  # that they continue


@dataclass(frozen=True)
class Part:
    """What is new in one of a request's replies."""

    choice: int
    text: str
    tokens: int  # so far
    logprobs: list[dict[str, Any]]
    finish: str | None = None  # stop or length, with the last part
    cached: int = 0  # tokens of the prompt that were in the cache
    row: tuple[int, ...] | None = None  # with the last part: the row, if a next request may continue it


class ServedModel:
    """One model's engine, and which conversation lies in which of its slots.

    At most `streams` replies are sampled at once; others wait in the order of arrival. A conversation's row
    is remembered as ids: its next request renders only the new user message, so that the row is the one that
    training would have, and it continues in the slot that still holds the row.
    """

    def __init__(self, name: str, engine: Engine, chat: ChatFormat, *, source: str, reply_tokens: int | None):
        """`engine` has weights loaded and is made with `per_request`.

        Args:
          source: where the model was read from.
          reply_tokens: most tokens of a reply whose request has no limit; None: what fits.
        """
        self.name, self.engine, self.chat, self.source = name, engine, chat, source
        self.reply_tokens = reply_tokens
        self.created = int(time.time())
        self.users = 0  # requests that are being answered
        self.waiting = 0  # replies without a slot
        self.running = 0
        self._streams = asyncio.Semaphore(engine.lanes)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(engine.slots))  # longest free first
        self._dispatcher = Dispatcher(engine)
        self._serving: asyncio.Task[None] | None = None
        self._spell = speller(chat)
        self._remembered: OrderedDict[bytes, Conversation] = OrderedDict()
        self._remembered_tokens = 0

    @property
    def free(self) -> int:
        """How many more replies could be sampled now."""
        return max(0, self.engine.lanes - self.running - self.waiting)

    # --- Prompts. ---

    async def prompt(self, request: ChatRequest) -> Prompt:
        """The request's row. A long one is made in a thread, so that the replies under way go on.

        Raises:
          ProtocolError: messages that the template refuses, or too many tokens.
        """
        texts, conversation = request.texts, None
        if texts is not None and texts[-1][0] == "user":
            conversation = self._remembered.get(_key(texts[:-1]))
        new = texts[-1:] if conversation is not None and conversation.row else texts
        if new is not None and sum(MESSAGE_CHARACTERS + len(text) for _, text in new) < INLINE_CHARACTERS:
            ids = self._ids(request, conversation)
        else:
            self.users += 1
            try:
                loop = asyncio.get_running_loop()
                ids = await loop.run_in_executor(_PROMPTS, self._ids, request, conversation)
            finally:
                self.users -= 1
        if len(ids) >= self.engine.length:
            raise ProtocolError(
                f"This model's maximum context length is {self.engine.length} tokens. However, your messages "
                f"resulted in {len(ids)} tokens. Please reduce the length of the messages.",
                param="messages",
                code="context_length_exceeded",
            )
        return Prompt(ids, conversation)

    def _ids(self, request: ChatRequest, conversation: Conversation | None) -> tuple[int, ...]:
        texts = request.texts
        if conversation is not None and conversation.row:
            return (*conversation.row, *self.chat.next_user(texts[-1][1]))
        if texts is not None and [role for role, _ in texts] == ["user"]:
            return self.chat.start(texts[0][1])  # as the template renders it, a few milliseconds faster
        try:
            return self.chat.prompt(request.chat)
        except (jinja2.TemplateError, TypeError) as error:
            raise ProtocolError(f"Invalid 'messages': {error}.", param="messages") from error

    def conversation(self, request: ChatRequest, prompt: Prompt) -> tuple[str, bool]:
        """The id of a new reply's conversation, and whether that goes on in one that was kept.

        A second continuation from one place is a conversation of its own, with all that was said before; so
        is the continuation of one of which something was not kept.
        """
        if prompt.conversation is not None:
            key = _key(request.texts[:-1])
            before = self._remembered.get(key)
            if before is not None and not before.continued:
                self._put(key, replace(before, continued=True))
                if before.kept:
                    return before.id, True
        return f"conv-{secrets.token_hex(12)}", False

    def remember(
        self,
        request: ChatRequest,
        name: str,
        reply: str,
        row: Sequence[int] | None,
        kept: bool,
    ) -> None:
        """Notes that the conversation `name` has gone on by a reply, and whether all of it was kept."""
        texts = request.texts
        if texts is None:
            return
        ids = array("i", row if row is not None and self.chat.history == "append" else ())
        self._put(_key([*texts, ("assistant", reply)]), Conversation(name, ids, kept))

    def _put(self, key: bytes, conversation: Conversation) -> None:
        earlier = self._remembered.pop(key, None)
        self._remembered[key] = conversation
        self._remembered_tokens += _size(conversation) - (_size(earlier) if earlier else 0)
        while self._remembered_tokens > REMEMBERED_TOKENS:
            self._remembered_tokens -= _size(self._remembered.popitem(last=False)[1])

    # --- Replies. ---

    async def replies(self, request: ChatRequest, prompt: Prompt) -> AsyncIterator[Part | None]:
        """The parts of a request's `n` replies as they are sampled; closing it frees their slots.

        None after every PING_SECONDS without a part.
        """
        parts: asyncio.Queue[Part | BaseException] = asyncio.Queue()
        seed = secrets.randbits(32) if request.seed is None else request.seed

        async def work(choice: int) -> None:
            try:
                async for part in self._reply(request, prompt.ids, seed, choice):
                    parts.put_nowait(part)
            except Exception as error:
                parts.put_nowait(error)

        tasks = [asyncio.ensure_future(work(choice)) for choice in range(request.n)]
        try:
            unfinished = request.n
            while unfinished:
                try:
                    async with asyncio.timeout(PING_SECONDS):
                        part = await parts.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(part, BaseException):
                    raise part
                unfinished -= part.finish is not None
                yield part
        finally:
            for task in tasks:
                task.cancel()

    async def _reply(
        self, request: ChatRequest, ids: Sequence[int], seed: int, choice: int
    ) -> AsyncIterator[Part]:
        self.waiting += 1
        try:
            await self._streams.acquire()
        finally:
            self.waiting -= 1
        self._serve()
        self.running += 1
        slot = self.engine.continued(self._free, ids)
        cached = 0 if slot is None else len(self.engine.row(slot))
        if slot is None:
            slot = next(iter(self._free))
        del self._free[slot]
        text = ReplyText(self.chat.decode, self.chat.stop_ids, request.stops)
        try:
            asked = Request(
                slot,
                ids[cached:],
                key=(seed % 2**32, (seed >> 32) % 2**32, choice),
                turn=0,
                limit=request.limit or self.reply_tokens,
                start=not cached,
                sampling=request.sampling,
                alternatives=request.logprobs,
            )
            left = min(asked.limit or self.engine.max_reply_tokens, self.engine.length - len(ids))
            async for reply in self._dispatcher.stream(asked):
                known = len(text.ids)
                last = reply.ids[-1] in self.chat.stop_ids or known + len(reply.ids) >= left
                new = text.add(reply.ids, last=last)
                kept = text.ids[known:]
                if kept and kept[-1] in self.chat.stop_ids:
                    kept = kept[:-1]
                entries = []
                if request.logprobs:
                    found = reply.alternatives[: len(kept)]
                    entries = logprob_entries(kept, found, request.top_logprobs, self._spell)
                finish = row = None
                if text.stopped:
                    finish = "stop"
                elif last:
                    finish = "length" if reply.truncated else "stop"
                    closing = () if reply.ids[-1] in self.chat.end_of_turn else self.chat.end_of_turn
                    row = (*ids, *text.ids, *closing)
                yield Part(choice, new, len(text.ids), entries, finish, cached, row)
                if finish:
                    return
        finally:
            # The slot is free once the engine has dropped what may be left of the reply.
            self._dispatcher.cancel(slot).add_done_callback(lambda _: self._release(slot))

    def _release(self, slot: int) -> None:
        self._free[slot] = None
        self.running -= 1
        self._streams.release()

    def _serve(self) -> None:
        """Starts the engine's loop, again if an error has ended it."""
        if self._serving is None or self._serving.done():
            if self._serving is not None:
                self.engine.reset()  # after an error
            self._serving = asyncio.ensure_future(self._dispatcher.serve())
            # Its exception is raised in every stream; asyncio need not report it again.
            self._serving.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def close(self) -> None:
        """Waits for the replies that are under way, then frees the memory of the weights and the cache."""
        while self.users or self.running:
            await asyncio.sleep(0.02)
        if self._serving is not None:
            self._serving.cancel()
            with suppress(asyncio.CancelledError):
                await self._serving
        self.engine.unload()


def _size(conversation: Conversation) -> int:
    return len(conversation.row) + 64  # what an entry without ids takes, in tokens


def _key(texts: Sequence[tuple[str, str]]) -> bytes:
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()
