"""One OpenAI-compatible server, as one role calls it: pool, limits, time-outs, retries, structured output."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openai

from mapo_jax.config import RoleConfig
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.limits import PerMinute, prompt_tokens
from mapo_jax.environment.roles import Completion

ATTEMPTS = 4
_POOL = 16  # connections of one pool, which looks at each of them for every request
LONGEST_WAIT = 30.0  # seconds between two attempts, whatever the server asks for
_HELPLESS_CODES = ("insufficient_quota", "billing_hard_limit_reached")  # 429s that no waiting mends
_NO_SCHEMA_STATUS = (400, 404, 415, 422, 501)  # what servers say who do not know `response_format`

Messages = Sequence[Mapping[str, str]]


class Server:
    """Calls one model of one server. A context manager, to be used within one event loop.

    An attempt is made again after a time-out, a lost connection, 408, 409, 429 and 5xx, and after an answer
    that is no chat completion at all; the waits grow, are jittered, and heed Retry-After. Everything else
    fails at once: it would fail again.
    """

    def __init__(
        self,
        config: RoleConfig,
        *,
        key: str | None = None,
        call_seconds: float = 60.0,
        concurrency: int = 64,
        on_attempt: Callable[[float | None, str | None], None] | None = None,
    ) -> None:
        """Opens no connection yet.

        Args:
          config: URL, model, sampling, limits.
          key: of the server; never in a message of an error, nor in an answer.
          call_seconds: longest attempt, from the request to the last byte.
          concurrency: most requests under way.
          on_attempt: told of every attempt: its seconds if it went well, else the kind of its failure.
        """
        self._config = config
        self._key = key
        self._call_seconds = call_seconds
        self._first_wait = min(1.0, call_seconds / 60)
        self._on_attempt = on_attempt or (lambda seconds, failure: None)
        # Places for requests; those used last first, so that few connections are kept warm.
        self._places: asyncio.LifoQueue[int] = asyncio.LifoQueue()
        for place in reversed(range(concurrency)):
            self._places.put_nowait(place)
        self._requests = PerMinute(config.requests_per_minute)
        self._tokens = PerMinute(config.tokens_per_minute)
        self._enforces: bool | None = None  # whether the server enforces a schema; None: not tried yet
        self._clients = [
            openai.AsyncOpenAI(
                base_url=config.url,
                api_key=key or "none",
                max_retries=0,  # ours: they stop where a retry cannot help, and are counted
                timeout=call_seconds,
            )
            for _ in range(math.ceil(concurrency / _POOL))
        ]

    async def __call__(
        self, messages: Messages, *, seed: int, schema: Mapping[str, Any] | None
    ) -> Completion:
        """The model's answer.

        Args:
          messages: the chat.
          seed: sent along; servers that know it sample the same again.
          schema: JSON schema of the answer. Enforced by the server if it can; else it is added to the last
            message.

        Raises:
          RoleFailure: timeout, transport or malformed; after the last attempt, or at once.
        """
        estimate = prompt_tokens(messages) + min(self._config.max_tokens, 512)  # corrected when it is known
        place = await self._places.get()
        try:
            client = self._clients[place // _POOL]
            for attempt in range(ATTEMPTS):
                await self._requests.take()
                taken = await self._tokens.take(estimate)
                started = time.monotonic()
                try:
                    async with asyncio.timeout(self._call_seconds):
                        answer = await self._attempt(client, messages, seed, schema)
                except Exception as error:
                    failure, retry, wait = self._judge_error(error)
                    self._on_attempt(None, failure.kind)
                    if not retry or attempt == ATTEMPTS - 1:
                        # Without its cause, whose text and request may hold the key.
                        raise failure from None
                else:
                    self._on_attempt(time.monotonic() - started, None)
                    self._tokens.correct(taken, answer.input_tokens + answer.output_tokens)
                    return answer
                backoff = self._first_wait * 2**attempt * random.uniform(0.5, 1.5)
                await asyncio.sleep(min(LONGEST_WAIT, max(backoff, wait)))
        finally:
            self._places.put_nowait(place)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Closes the connections."""
        for client in self._clients:
            await client.close()

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _attempt(
        self, client: openai.AsyncOpenAI, messages: Messages, seed: int, schema: Mapping[str, Any] | None
    ) -> Completion:
        if schema is None:
            return await self._request(client, messages, seed)
        if self._enforces is not False:
            form = {"name": "answer", "schema": schema, "strict": True}
            try:
                answer = await self._request(
                    client, messages, seed, {"response_format": {"type": "json_schema", "json_schema": form}}
                )
            except openai.APIStatusError as error:
                if self._enforces or error.status_code not in _NO_SCHEMA_STATUS:
                    raise
            else:
                # Some servers ignore `response_format` without a word: a first answer that does not begin as
                # JSON shows it. One that breaks off is no sign.
                if self._enforces is None:
                    self._enforces = answer.text.lstrip().startswith("{")
                return answer
        *earlier, last = messages
        text = f"{last['content']}\n\nJSON schema: {json.dumps(schema, ensure_ascii=False)}"
        answer = await self._request(client, [*earlier, {**last, "content": text}], seed)
        self._enforces = False
        return answer

    async def _request(
        self,
        client: openai.AsyncOpenAI,
        messages: Messages,
        seed: int,
        form: Mapping[str, Any] | None = None,
    ) -> Completion:
        config = self._config
        # The library's plain POST: its typed call walks through every message and field, twice the work of
        # everything else, at hundreds of calls a second.
        body = {
            "model": config.model,
            "messages": list(messages),
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "seed": seed,
            **(form or {}),
            **config.extra_body,
        }
        sent = {name: value for name, value in body.items() if value is not None}
        completion = await client.post("/chat/completions", cast_to=object, body=sent)
        return self._read(completion, messages)

    def _read(self, completion: Any, messages: Messages) -> Completion:
        """The answer in a completion, which may be anything that a server can send."""
        try:
            choice = completion["choices"][0]
            text, role = choice["message"].get("content") or "", choice["message"]["role"]
            usage = completion.get("usage") or {}
            used = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
            raise _Unusable("the answer is no chat completion", str(completion)) from None
        if not isinstance(text, str):
            raise _Unusable("the answer's content is no text", str(text))
        if role != "assistant":
            raise _Unusable(f"the answer has the role {role!r}", text)
        text = self._scrub(text.encode(errors="replace").decode())  # JSON can spell half a character
        if choice.get("finish_reason") == "length":
            detail = f"the answer was cut at max_tokens={self._config.max_tokens}"
            raise RoleFailure("malformed", detail, text)
        if choice.get("finish_reason") == "content_filter":
            raise RoleFailure("malformed", "the server's content filter stopped the answer", text)
        return Completion(
            text,
            used[0] or math.ceil(prompt_tokens(messages)),
            used[1] or math.ceil(prompt_tokens([{"content": text}])),
        )

    def _judge_error(self, error: Exception) -> tuple[RoleFailure, bool, float]:
        """(the failure, whether to try again, seconds that the server wants us to wait)."""
        # First without the key, then cut: half a key is a leak too.
        detail = self._scrub(" ".join(str(error).split()))[:500]
        if isinstance(error, RoleFailure):
            return error, False, 0.0
        if isinstance(error, _Unusable):
            return RoleFailure("malformed", detail, self._scrub(error.raw)[:2000]), True, 0.0
        if isinstance(error, (TimeoutError, openai.APITimeoutError)):
            return RoleFailure("timeout", f"no answer within {self._call_seconds:g} s"), True, 0.0
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            retry = status in (408, 409, 429) or status >= 500
            if getattr(error, "code", None) in _HELPLESS_CODES:
                retry = False
            return RoleFailure("transport", f"HTTP {status}: {detail}"), retry, _retry_after(error)
        if isinstance(error, (openai.OpenAIError, ValueError)):
            # A lost connection; or a body that is no JSON, which the next attempt may well not have.
            return RoleFailure("transport", f"{type(error).__name__}: {detail}"), True, 0.0
        raise error

    def _scrub(self, text: str) -> str:
        """`text` without the key, which servers echo in their errors."""
        if self._key and len(self._key) >= 4:
            text = text.replace(self._key, "[key]")
            # OpenAI echoes a key with stars in its middle.
            text = re.sub(re.escape(self._key[:4]) + r"\S*\*+\S*", "[key]", text)
        return text


class _Unusable(Exception):
    """An answer that is no answer."""

    def __init__(self, detail: str, raw: str) -> None:
        super().__init__(detail)
        self.raw = raw


def _retry_after(error: openai.APIStatusError) -> float:
    try:
        seconds = float(error.response.headers.get("retry-after", 0))
    except ValueError:  # a date
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
