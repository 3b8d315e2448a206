"""One request for completions and the answer to it, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mapo_jax.serving.metrics import Metrics
from mapo_jax.serving.protocol import ChatRequest, usage
from mapo_jax.serving.served import Part, Prompt, ServedModel

T = TypeVar("T")

SERVER_ERROR = {
    "error": {"message": "The server had an error.", "type": "server_error", "param": None, "code": None}
}
_LOG = logging.getLogger("mapo_jax.serving")


class Exchange:
    """One request for completions and the answer to it."""

    def __init__(
        self,
        model: ServedModel,
        asked: ChatRequest,
        prompt: Prompt,
        metrics: Metrics,
        keep: Callable[[Exchange, str, str, Part], Awaitable[None]],
    ) -> None:
        """`keep` is called with a reply's name, text and last part before the client can know its end."""
        self.model, self.asked, self.prompt = model, asked, prompt
        model.users += 1
        self._watch, self._keep = metrics.request(model.name, len(prompt.ids)), keep
        self._name, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._texts = [""] * asked.n
        self._lasts: dict[int, Part] = {}

    def end(self, outcome: str) -> None:
        """The answer was sent (ok), or could not be."""
        self.model.users -= 1
        self._watch.end(outcome)

    async def _parts(self) -> AsyncIterator[Part | None]:
        async with aclosing(self.model.replies(self.asked, self.prompt)) as parts:
            async for part in parts:
                if part is not None:
                    self._texts[part.choice] += part.text
                    self._watch.tokens(part.choice, part.tokens)
                    if part.finish:
                        self._lasts[part.choice] = part
                        name = self._name if self.asked.n == 1 else f"{self._name}-{part.choice}"
                        await self._keep(self, name, self._texts[part.choice], part)
                yield part

    def _usage(self) -> dict[str, Any]:
        cached = self._lasts[0].cached
        self._watch.usage(cached)
        return usage(len(self.prompt.ids), cached, sum(part.tokens for part in self._lasts.values()))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._name, "object": kind, "created": self._created, "model": self.model.name}
        return head | {"choices": choices}

    async def completion(self) -> dict[str, Any]:
        """The answer as one object."""
        entries: list[list[dict[str, Any]]] = [[] for _ in self._texts]
        async for part in self._parts():
            if part is not None:
                entries[part.choice] += part.logprobs
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": {"content": entries[index], "refusal": None} if self.asked.logprobs else None,
                "finish_reason": self._lasts[index].finish,
            }
            for index, text in enumerate(self._texts)
        ]
        return self._body("chat.completion", choices) | {"usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, the last one with the end; a comment while it waits."""
        options = self.asked.stream_options
        wants_usage = options is not None and options.include_usage
        empty = {"usage": None} if wants_usage else {}
        begun = set()
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                if part is None:
                    yield b": waiting\n\n"
                elif part.text or part.logprobs or part.finish:
                    # As few events as blocks: an event costs both sides more than what is in it.
                    role = {} if part.choice in begun else {"role": "assistant"}
                    begun.add(part.choice)
                    entries = {"content": part.logprobs, "refusal": None} if part.logprobs else None
                    choice = {
                        "index": part.choice,
                        "delta": role | {"content": part.text},
                        "logprobs": entries,
                    }
                    choice["finish_reason"] = part.finish
                    yield _event(self._body("chat.completion.chunk", [choice]) | empty)
        used = self._usage()
        last = _event(self._body("chat.completion.chunk", []) | {"usage": used}) if wants_usage else b""
        yield last + _DONE


_DONE = b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def whole_answer(exchange: Exchange, receive: Receive) -> Response:
    """The answer to a request that is not streamed."""
    outcome = "error"
    try:
        answer = await _unless_disconnected(receive, exchange.completion())
        answer = Response(orjson.dumps(answer), media_type="application/json")
        outcome = "ok"
        return answer
    except _Disconnected:
        outcome = "disconnected"
        return Response(status_code=499)
    finally:
        exchange.end(outcome)


class EventStream(Response):
    """Sends the answer as server-sent events; ends when the client is gone or reads nothing."""

    def __init__(self, exchange: Exchange, stall_seconds: float) -> None:
        self._exchange, self._stall_seconds = exchange, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "disconnected"
        try:
            outcome = await _unless_disconnected(receive, self._send(send))
        except (_Disconnected, TimeoutError):
            pass
        finally:
            self._exchange.end(outcome)

    async def _send(self, send: Send) -> str:
        async def write(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._stall_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        outcome = "ok"
        async with aclosing(self._exchange.events()) as events:
            try:
                async for event in events:
                    await write(event)
            except (TimeoutError, OSError):
                raise
            except Exception:
                _LOG.exception("a stream ended with an error")
                outcome = "error"
                await write(_event(SERVER_ERROR) + _DONE)
        await write(b"", more=False)
        return outcome


class _Disconnected(Exception):
    """The client has closed its connection."""


async def _unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """Awaits `work`; raises _Disconnected, and cancels it, if the client closes its connection before."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _Disconnected
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
