"""OpenAI-compatible servers, for the live world and for evaluations: the one client that there is.

`Connections` are one server's, shared by all who ask it; a `Server` is one model of it, as one role or one
evaluation asks it: limits, time-outs, attempts, structured output, and the reading of what comes back.

A server may send anything. What leaves this module is sound: text of whole characters, without the key,
token counts that are counts, and CallFailed for all the rest.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import httpx2
import openai

from mapo_jax.config import RoleConfig
from mapo_jax.environment.allowance import waiting
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.forms import excerpt, whole_characters
from mapo_jax.environment.live.keys import scrubber
from mapo_jax.environment.live.limits import PerMinute, prompt_tokens
from mapo_jax.environment.roles import Completion
from mapo_jax.errors import UserError

ATTEMPTS = 4
LONGEST_WAIT = 30.0  # seconds between two attempts, whatever the server asks for
LARGEST_BODY = 2**23  # bytes of a response, as sent and unpacked
_MOST_TOKENS = 2**53  # in one answer's usage: the whole numbers that every JSON reader agrees on
_POOL = 16  # connections of one pool, which looks at each of them for every request
_REDIRECTS = 3
_HELPLESS_CODES = ("insufficient_quota", "billing_hard_limit_reached")  # 429s that no waiting mends
_NO_SCHEMA_STATUS = (400, 404, 415, 422, 501)  # what servers say who do not know `response_format`

Messages = Sequence[Mapping[str, str]]
T = TypeVar("T")


class CallFailed(RoleFailure):
    """A call of a server that failed for good.

    Attributes:
      status: HTTP status, if that was the trouble.
      answered: whether the server sent a chat completion, if one that is of no use.
    """

    def __init__(
        self, kind: str, detail: str, raw: str = "", *, status: int | None = None, answered: bool = False
    ) -> None:
        super().__init__(kind, detail, raw)
        self.status, self.answered = status, answered


class ChatCompletion(NamedTuple):
    """What a model said."""

    text: str
    input_tokens: int
    output_tokens: int
    cut: bool  # at max_tokens


class Connections:
    """Connections to one server. A context manager, to be used within one event loop."""

    def __init__(self, url: str, *, concurrency: int = 64, call_seconds: float = 60.0) -> None:
        """Opens no connection yet.

        Args:
          url: of the API, up to and including /v1.
          concurrency: most requests under way, whoever makes them.
          call_seconds: longest wait for the next byte.

        Raises:
          UserError: the URL is none.
        """
        limits = httpx2.Limits(max_connections=_POOL, max_keepalive_connections=_POOL)
        try:
            self.clients = [
                openai.AsyncOpenAI(
                    base_url=url,
                    api_key="none",
                    max_retries=0,  # `Server` makes the attempts: counted, within limits, waits bounded
                    timeout=call_seconds,
                    http_client=_Bounded(limits=limits),
                )
                for _ in range(math.ceil(concurrency / _POOL))
            ]
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise UserError(
                f"{url!r} is not the URL of a server ({error}); write http://HOST:PORT/v1"
            ) from None
        # Places for requests; those used last first, so that few connections are kept warm.
        self.places: asyncio.LifoQueue[int] = asyncio.LifoQueue()
        for place in reversed(range(concurrency)):
            self.places.put_nowait(place)

    async def close(self) -> None:
        """Closes them."""
        for client in self.clients:
            await client.close()


class Server:
    """Calls one model of one server. A context manager, to be used within one event loop.

    An attempt is made again after a time-out, a lost connection, 408, 409, 429 and 5xx, and after an answer
    that is no chat completion at all; the waits grow, are jittered, and heed Retry-After (seconds or a date)
    up to LONGEST_WAIT. Everything else fails at once: it would fail again.
    """

    def __init__(
        self,
        config: RoleConfig,
        *,
        key: str | None = None,
        call_seconds: float = 60.0,
        concurrency: int = 64,
        attempts: int = ATTEMPTS,
        connections: Connections | None = None,
        on_attempt: Callable[[float | None, str | None], None] | None = None,
    ) -> None:
        """Opens no connection yet.

        Args:
          config: URL, model, sampling, limits.
          key: of the server, as `read_key` gives it; never in a message of an error, nor in an answer.
          call_seconds: longest attempt, from the request to the last byte.
          concurrency: most requests under way, if the connections are its own.
          attempts: most attempts of a call.
          connections: to config.url, shared with others, who close them; None for its own.
          on_attempt: told of every attempt: its seconds if it went well, else the kind of its failure.

        Raises:
          UserError: the URL is none.
        """
        self._config = config
        self._call_seconds = call_seconds
        self._attempts = attempts
        self._first_wait = min(1.0, call_seconds / 60)
        self._on_attempt = on_attempt or (lambda seconds, failure: None)
        self._scrub = scrubber(key)
        self._requests = PerMinute(config.requests_per_minute)
        self._tokens = PerMinute(config.tokens_per_minute)
        self._enforces: bool | None = None  # whether the server enforces a schema; None: not tried yet
        assert config.url is not None
        self._own = None
        if connections is None:
            self._own = connections = Connections(
                config.url, concurrency=concurrency, call_seconds=call_seconds
            )
        self._places = connections.places
        self._clients = [client.with_options(api_key=key or "none") for client in connections.clients]

    async def __call__(
        self, messages: Messages, *, seed: int, schema: Mapping[str, Any] | None
    ) -> Completion:
        """The model's answer, whole.

        Args:
          messages: the chat.
          seed: sent along; servers that know it sample the same again.
          schema: JSON schema of the answer. Enforced by the server if it can; else it is added to the last
            message.

        Raises:
          CallFailed: timeout, transport or malformed; after the last attempt, or at once.
        """
        said = await self.ask(messages, seed=seed, schema=schema)
        if said.cut:
            detail = f"the answer was cut at max_tokens={self._config.max_tokens}"
            raise CallFailed("malformed", detail, said.text, answered=True)
        return Completion(said.text, said.input_tokens, said.output_tokens)

    async def ask(
        self, messages: Messages, *, seed: int | None, schema: Mapping[str, Any] | None = None
    ) -> ChatCompletion:
        """What the model said, be it cut at max_tokens. As a call; seed may be None."""
        messages = [{**message, "content": whole_characters(message["content"])} for message in messages]
        estimate = prompt_tokens(messages) + min(self._config.max_tokens, 512)  # corrected when it is known
        taken = None

        async def attempt(client: openai.AsyncOpenAI) -> ChatCompletion:
            return await self._attempt(client, messages, seed, schema)

        async def wait() -> None:
            nonlocal taken
            await self._requests.take()
            taken = await self._tokens.take(estimate)

        said = await self._persist(attempt, wait)
        self._tokens.correct(taken, said.input_tokens + said.output_tokens)
        return said

    async def models(self) -> list[str]:
        """The names of the models that the server offers.

        Raises:
          CallFailed: as of a call.
        """

        async def attempt(client: openai.AsyncOpenAI) -> list[str]:
            listed = await _parsed(client.get("/models", cast_to=object))
            try:
                names = [model["id"] for model in listed["data"]]
            except (KeyError, TypeError):
                raise _Unusable("the answer is no list of models", _shown(listed)) from None
            if not all(isinstance(name, str) for name in names):
                raise _Unusable("the answer is no list of models", _shown(listed))
            return [self._scrub(whole_characters(name)) for name in names]

        return await self._persist(attempt, self._requests.take)

    async def close(self) -> None:
        """Closes the connections that are its own."""
        if self._own is not None:
            await self._own.close()

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _persist(
        self, attempt: Callable[[openai.AsyncOpenAI], Awaitable[T]], wait: Callable[[], Awaitable[Any]]
    ) -> T:
        """Makes attempts until one goes well; `wait` is awaited before each, for the limits per minute."""
        for number in range(self._attempts):
            await wait()
            # A place is held for the attempt alone: others may use it while this call waits.
            with waiting():
                place = await self._places.get()
            started = time.monotonic()
            try:
                async with asyncio.timeout(self._call_seconds):
                    result = await attempt(self._clients[place // _POOL])
            except Exception as error:
                failure, retry, asked = self._judge_error(error)
            else:
                self._on_attempt(time.monotonic() - started, None)
                return result
            finally:
                self._places.put_nowait(place)
            self._on_attempt(None, failure.kind)
            if not retry or number == self._attempts - 1:
                # Without its cause, whose text and request may hold the key.
                raise failure from None
            backoff = self._first_wait * 2**number * random.uniform(0.5, 1.5)
            with waiting():
                await asyncio.sleep(min(LONGEST_WAIT, max(backoff, asked)))
        raise AssertionError("unreachable")

    async def _attempt(
        self,
        client: openai.AsyncOpenAI,
        messages: Messages,
        seed: int | None,
        schema: Mapping[str, Any] | None,
    ) -> ChatCompletion:
        if schema is None:
            return await self._request(client, messages, seed)
        if self._enforces is not False:
            form = {"name": "answer", "schema": schema, "strict": True}
            try:
                said = await self._request(
                    client, messages, seed, {"response_format": {"type": "json_schema", "json_schema": form}}
                )
            except openai.APIStatusError as error:
                if self._enforces or error.status_code not in _NO_SCHEMA_STATUS:
                    raise
            else:
                # Some servers ignore `response_format` without a word: a first answer that does not begin as
                # JSON shows it. One that breaks off is no sign.
                if self._enforces is None and not said.cut:
                    self._enforces = said.text.lstrip().startswith("{")
                return said
        *earlier, last = messages
        text = f"{last['content']}\n\nJSON schema: {json.dumps(schema, ensure_ascii=False)}"
        said = await self._request(client, [*earlier, {**last, "content": text}], seed)
        if not said.cut:
            self._enforces = False
        return said

    async def _request(
        self,
        client: openai.AsyncOpenAI,
        messages: Messages,
        seed: int | None,
        form: Mapping[str, Any] | None = None,
    ) -> ChatCompletion:
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
        completion = await _parsed(client.post("/chat/completions", cast_to=object, body=sent))
        return self._read(completion, messages)

    def _read(self, completion: Any, messages: Messages) -> ChatCompletion:
        """What a completion says, which may be anything that a server can send."""
        try:
            choice = completion["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            content, role = message.get("content"), message["role"]
            usage = completion.get("usage")
            used = [
                (usage or {}).get(name) for name in ("prompt_tokens", "completion_tokens")
            ]  # null or missing where a server does not count
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Unusable("the answer is no chat completion", _shown(completion)) from None
        for count in used:
            if count is not None and (type(count) is not int or not 0 <= count <= _MOST_TOKENS):
                raise _Unusable("the answer's usage holds no numbers of tokens", _shown(usage))
        if role != "assistant":
            raise _Unusable(f"the answer has the role {_shown(role)[:100]!r}", _shown(content))
        text = self._scrub(whole_characters(_text(content)))
        cut = finish == "length"
        if finish == "content_filter":
            detail = "the server's content filter stopped the answer"
            raise CallFailed("malformed", detail, text, answered=True)
        thought = message.get("reasoning_content") or message.get("reasoning")
        thought = thought or (content if isinstance(content, list) else None)
        if not text and (thought or not isinstance(content, str)):
            detail = "the answer has no text"
            if thought:
                detail = "the answer is reasoning alone, without a word of text" + (
                    f", cut at max_tokens={self._config.max_tokens}" if cut else ""
                )
            raise CallFailed("malformed", detail, answered=True)
        return ChatCompletion(
            text,
            used[0] or math.ceil(prompt_tokens(messages)),
            used[1] or math.ceil(prompt_tokens([{"content": text}])),
            cut,
        )

    def _judge_error(self, error: Exception) -> tuple[CallFailed, bool, float]:
        """(the failure, whether to try again, seconds that the server wants us to wait)."""
        if isinstance(error, CallFailed):
            return error, False, 0.0
        # First without the key, then cut: half a key is a leak too.
        detail = self._scrub(whole_characters(" ".join(str(error).split())))[:500]
        if isinstance(error, _Unusable):
            return CallFailed("malformed", detail, excerpt(self._scrub(error.raw))), True, 0.0
        if isinstance(error, (TimeoutError, openai.APITimeoutError)):
            late = f"{type(error).__name__}: no answer within {self._call_seconds:g} s"
            return CallFailed("timeout", late), True, 0.0
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            retry = status in (408, 409, 429) or status >= 500
            if getattr(error, "code", None) in _HELPLESS_CODES:
                retry = False
            failure = CallFailed("transport", f"HTTP {status}: {detail}", status=status)
            return failure, retry, retry_after(error.response.headers.get("retry-after"))
        if isinstance(error, (openai.OpenAIError, httpx2.HTTPError)):
            return CallFailed("transport", f"{type(error).__name__}: {detail}"), True, 0.0
        raise error


class _Unusable(Exception):
    """An answer that is no answer."""

    def __init__(self, detail: str, raw: str = "") -> None:
        super().__init__(detail)
        self.raw = raw


class _Bounded(openai.DefaultAsyncHttpxClient):
    """Reads no response beyond LARGEST_BODY, neither as it is sent nor unpacked."""

    async def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        request.headers["accept-encoding"] = "gzip"  # what `_unpacked` knows
        options["follow_redirects"] = False  # the client would read their bodies whole
        for _ in range(_REDIRECTS + 1):
            response = await super().send(request, stream=True, **options)
            body = bytearray()
            try:
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > LARGEST_BODY:
                        raise _too_large()
            finally:
                await response.aclose()
            if response.next_request is None:
                break
            request = response.next_request
        headers = response.headers.copy()
        content = _unpacked(bytes(body), headers.pop("content-encoding", ""))
        for name in ("content-length", "transfer-encoding"):
            headers.pop(name, None)
        return httpx2.Response(
            response.status_code, headers=headers, content=content, request=response.request
        )


def _unpacked(body: bytes, encoding: str) -> bytes:
    if encoding.strip().lower() in ("", "identity"):
        return body
    if encoding.strip().lower() != "gzip":
        raise _Unusable(f"the answer is packed as {encoding[:100]!r}, which was not asked for")
    unpacker = zlib.decompressobj(wbits=31)
    try:
        content = unpacker.decompress(body, LARGEST_BODY + 1)
    except zlib.error as error:
        raise _Unusable(f"the answer is no gzip ({error})") from None
    if len(content) > LARGEST_BODY:
        raise _too_large()
    if not unpacker.eof:
        raise _Unusable("the answer breaks off")
    return content


def _too_large() -> _Unusable:
    return _Unusable(f"the answer is larger than {LARGEST_BODY} bytes")


async def _parsed(response: Awaitable[object]) -> Any:
    """The library's answer to a request, as JSON values."""
    try:
        return await response
    except (ValueError, RecursionError):  # thousands of brackets are no answer either
        raise _Unusable("the answer is no JSON") from None


def _text(content: Any) -> str:
    """The text of a message: itself, or its parts joined; parts that hold reasoning are not said."""
    if content is None or isinstance(content, str):
        return content or ""
    try:
        said = [part["text"] for part in content if part["type"] not in ("thinking", "reasoning")]
        kinds = {part["type"] for part in content} - {"thinking", "reasoning"}
        if isinstance(content, list) and kinds <= {"text"}:
            return "".join(said)
    except (KeyError, TypeError):
        pass
    raise _Unusable("the answer's content is no text", _shown(content))


def _shown(value: Any) -> str:
    try:
        return whole_characters(value if isinstance(value, str) else str(value))
    except RecursionError:
        return ""


def retry_after(header: str | None) -> float:
    """Seconds to wait by a Retry-After header, a number of them or an HTTP date; 0 if it says neither."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError, OSError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
