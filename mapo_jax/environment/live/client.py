"""The client of OpenAI-compatible servers, for the live world and for evaluations.

`Connections` are those to one server, shared by all its users. A `Server` is one model on it for one role or
evaluation: limits, timeouts, attempts, structured output, and the parsing of responses.

A server may send anything. The results of this module are valid: text of whole characters without the key,
token counts that are counts, and CallFailed for everything else.
"""

import asyncio
import itertools
import math
import random
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx2
import openai

from mapo_jax.config import RoleConfig
from mapo_jax.environment.allowance import waiting
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.forms import excerpt, whole_characters
from mapo_jax.environment.live.keys import scrubber
from mapo_jax.environment.live.limits import PerMinute, prompt_tokens
from mapo_jax.environment.live.transport import BoundedClient, UnusableResponse, parsed_json, retry_after
from mapo_jax.environment.roles import Completion, Messages, Schema, with_schema
from mapo_jax.errors import UserError
from mapo_jax.speech import text_of

ATTEMPTS = 4
LONGEST_WAIT = 30.0  # seconds between two attempts, whatever the server asks for
_MOST_TOKENS = 2**53  # in one answer's usage: the largest whole number that every JSON parser represents
_POOL = 16  # connections of one pool, which scans all of them for every request
_PERMANENT_CODES = ("insufficient_quota", "billing_hard_limit_reached")  # of a 429 that no wait resolves
_NO_SCHEMA_STATUS = (400, 404, 415, 422, 501)  # from servers that do not support `response_format`

T = TypeVar("T")


class CallFailed(RoleFailure):
    """A call of a server that finally failed.

    Attributes:
      status: HTTP status, if that was the reason.
      answered: whether the server sent a chat completion, although an unusable one.
    """

    def __init__(
        self, kind: str, detail: str, raw: str = "", *, status: int | None = None, answered: bool = False
    ) -> None:
        super().__init__(kind, detail, raw)
        self.status, self.answered = status, answered


class Connections:
    """Connections to one server, for one event loop; with `contextlib.aclosing` a context manager."""

    def __init__(self, url: str, *, concurrency: int = 64, call_seconds: float = 60.0) -> None:
        """Opens no connection yet.

        Args:
          url: of the API, up to and including /v1.
          concurrency: maximum of concurrent requests, of all users together.
          call_seconds: longest wait for the next byte.

        Raises:
          UserError: the URL is invalid.
        """
        limits = httpx2.Limits(max_connections=_POOL, max_keepalive_connections=_POOL)
        try:
            self.clients = [
                openai.AsyncOpenAI(
                    base_url=url,
                    api_key="none",
                    max_retries=0,  # `Server` makes the attempts: it counts them and keeps the limits
                    timeout=call_seconds,
                    http_client=BoundedClient(limits=limits),
                )
                for _ in range(math.ceil(concurrency / _POOL))
            ]
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise UserError(f"{url!r} is no URL of a server ({error}); write http://HOST:PORT/v1") from None
        # Places for requests, last used first, so that few connections stay open.
        self.places: asyncio.LifoQueue[int] = asyncio.LifoQueue()
        for place in reversed(range(concurrency)):
            self.places.put_nowait(place)

    async def aclose(self) -> None:
        """Closes all connections."""
        for client in self.clients:
            await client.close()


class Server:
    """Calls one model of one server, within one event loop.

    It retries after a timeout, a lost connection, 408, 409, 429 and 5xx, and after a response that is no chat
    completion. The waits grow, have jitter, and respect Retry-After (seconds or a date) up to LONGEST_WAIT.
    Other failures are final at once.
    """

    def __init__(
        self,
        config: RoleConfig,
        connections: Connections,
        *,
        key: str | None = None,
        call_seconds: float = 60.0,
        attempts: int = ATTEMPTS,
        on_attempt: Callable[[float | None, str | None], None] | None = None,
    ) -> None:
        """Opens no connection yet.

        Args:
          config: model, sampling, limits.
          connections: to the server; its owner closes them.
          key: of the server, from `read_key`; never part of an error message or an answer.
          call_seconds: longest attempt, from the request to the last byte.
          attempts: maximum of attempts per call.
          on_attempt: called after every attempt, with its seconds if it succeeded, else its kind of failure.
        """
        self._config, self._attempts = config, attempts
        self._call_seconds, self._first_wait = call_seconds, min(1.0, call_seconds / 60)
        self._on_attempt = on_attempt or (lambda seconds, failure: None)
        self._scrub = scrubber(key)
        self._requests = PerMinute(config.requests_per_minute)
        self._tokens = PerMinute(config.tokens_per_minute)
        self._enforces: bool | None = None  # whether the server enforces a schema; None: not tried yet
        self._places = connections.places
        self._clients = [client.with_options(api_key=key or "none") for client in connections.clients]

    async def __call__(self, messages: Messages, *, seed: int, schema: Schema | None) -> Completion:
        """The model's answer; one cut at max_tokens is a failure.

        Args:
          messages: the chat.
          seed: part of the request; servers that support it repeat their sample.
          schema: JSON schema of the answer, enforced by the server if it can; else added to the last message.

        Raises:
          CallFailed: timeout, transport or malformed; after the last attempt, or at once.
        """
        answer = await self.ask(messages, seed=seed, schema=schema)
        if answer.cut:
            detail = f"the answer was cut at max_tokens={self._config.max_tokens}"
            raise CallFailed("malformed", detail, answer.text, answered=True)
        return answer

    async def ask(self, messages: Messages, *, seed: int | None, schema: Schema | None = None) -> Completion:
        """The model's answer, perhaps cut at max_tokens. Arguments and errors of a call; seed may be None."""
        messages = [{**message, "content": whole_characters(message["content"])} for message in messages]
        estimate = prompt_tokens(messages) + min(self._config.max_tokens, 512)  # corrected after the answer
        taken = None

        async def attempt(client: openai.AsyncOpenAI) -> Completion:
            return await self._attempt(client, messages, seed, schema)

        async def wait() -> None:
            nonlocal taken
            await self._requests.take()
            taken = await self._tokens.take(estimate)

        answer = await self._retry(attempt, wait)
        self._tokens.correct(taken, answer.input_tokens + answer.output_tokens)
        return answer

    async def models(self) -> list[str]:
        """The names of the models that the server offers.

        Raises:
          CallFailed: as in a call.
        """

        async def attempt(client: openai.AsyncOpenAI) -> list[str]:
            response = await parsed_json(client.get("/models", cast_to=object))
            try:
                return [self._scrub(whole_characters(model["id"])) for model in response["data"]]
            except (KeyError, TypeError, AttributeError):
                raise UnusableResponse("the answer is no list of models", _shown(response)) from None

        return await self._retry(attempt, self._requests.take)

    async def _retry(
        self, attempt: Callable[[openai.AsyncOpenAI], Awaitable[T]], wait: Callable[[], Awaitable[Any]]
    ) -> T:
        """Makes attempts until one succeeds; awaits `wait` before each, for the limits per minute."""
        for number in itertools.count(1):
            await wait()
            # The place is taken for the attempt only: other calls may use it while this one waits.
            with waiting():
                place = await self._places.get()
            started = time.monotonic()
            try:
                async with asyncio.timeout(self._call_seconds):
                    result = await attempt(self._clients[place // _POOL])
            except Exception as error:
                failure, retry, requested_wait = self._classify(error)
            else:
                self._on_attempt(time.monotonic() - started, None)
                return result
            finally:
                self._places.put_nowait(place)
            self._on_attempt(None, failure.kind)
            if not retry or number == self._attempts:
                # Without its cause, whose text and request may contain the key.
                raise failure from None
            backoff = self._first_wait * 2 ** (number - 1) * random.uniform(0.5, 1.5)
            with waiting():
                await asyncio.sleep(min(LONGEST_WAIT, max(backoff, requested_wait)))

    async def _attempt(
        self, client: openai.AsyncOpenAI, messages: Messages, seed: int | None, schema: Schema | None
    ) -> Completion:
        if schema is None:
            return await self._request(client, messages, seed)
        if self._enforces is not False:
            form = {"name": "answer", "schema": schema, "strict": True}
            response_format = {"type": "json_schema", "json_schema": form}
            try:
                answer = await self._request(client, messages, seed, response_format=response_format)
            except openai.APIStatusError as error:
                if self._enforces or error.status_code not in _NO_SCHEMA_STATUS:
                    raise
            else:
                # Some servers silently ignore `response_format`: their first answer does not begin as JSON.
                # A cut answer proves nothing.
                if self._enforces is None and not answer.cut:
                    self._enforces = answer.text.lstrip().startswith("{")
                return answer
        answer = await self._request(client, with_schema(messages, schema), seed)
        if not answer.cut:
            self._enforces = False
        return answer

    async def _request(
        self, client: openai.AsyncOpenAI, messages: Messages, seed: int | None, **options: Any
    ) -> Completion:
        config = self._config
        # The library's plain POST: its typed call inspects every message and field, which at hundreds of
        # calls a second costs twice as much as everything else.
        body = {
            "model": config.model,
            "messages": list(messages),
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "seed": seed,
            **options,
            **config.extra_body,
        }
        body = {name: value for name, value in body.items() if value is not None}
        response = await parsed_json(client.post("/chat/completions", cast_to=object, body=body))
        return self._read(response, messages)

    def _read(self, response: Any, messages: Messages) -> Completion:
        """The answer in a response, which may be any JSON value."""
        try:
            choice = response["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            content, role = message.get("content"), message["role"]
            usage = response.get("usage")  # null or missing if the server does not count
            counts = [(usage or {}).get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UnusableResponse("the answer is no chat completion", _shown(response)) from None
        for count in counts:
            if count is not None and (type(count) is not int or not 0 <= count <= _MOST_TOKENS):
                raise UnusableResponse("the answer's usage holds no numbers of tokens", _shown(usage))
        if role != "assistant":
            raise UnusableResponse(f"the answer has the role {_shown(role)[:100]!r}", _shown(content))
        try:
            text = self._scrub(text_of(content) or "")
        except ValueError:
            raise UnusableResponse("the answer's content is no text", _shown(content)) from None
        cut = finish == "length"
        if finish == "content_filter":
            detail = "the server's content filter stopped the answer"
            raise CallFailed("malformed", detail, text, answered=True)
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        reasoning = reasoning or (content if isinstance(content, list) else None)
        if not text and (reasoning or not isinstance(content, str)):
            detail = "the answer has no text"
            if reasoning:
                detail = "the answer is reasoning alone, without a word of text"
                detail += f", cut at max_tokens={self._config.max_tokens}" if cut else ""
            raise CallFailed("malformed", detail, answered=True)
        prompts = (messages, [{"content": text}])
        used = (count or math.ceil(prompt_tokens(chat)) for count, chat in zip(counts, prompts, strict=True))
        return Completion(text, *used, cut)

    def _classify(self, error: Exception) -> tuple[CallFailed, bool, float]:
        """(the failure, whether to retry, the wait in seconds that the server requests)."""
        if isinstance(error, CallFailed):
            return error, False, 0.0
        # The key is removed before the text is cut: half a key would be a leak too.
        detail = self._scrub(whole_characters(" ".join(str(error).split())))[:500]
        if isinstance(error, UnusableResponse):
            return CallFailed("malformed", detail, excerpt(self._scrub(error.raw))), True, 0.0
        if isinstance(error, (TimeoutError, openai.APITimeoutError)):
            detail = f"{type(error).__name__}: no answer within {self._call_seconds:g} s"
            return CallFailed("timeout", detail), True, 0.0
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            permanent = getattr(error, "code", None) in _PERMANENT_CODES
            retry = not permanent and (status in (408, 409, 429) or status >= 500)
            failure = CallFailed("transport", f"HTTP {status}: {detail}", status=status)
            return failure, retry, retry_after(error.response.headers.get("retry-after"))
        if isinstance(error, (openai.OpenAIError, httpx2.HTTPError)):
            reason = _unconnected(error) or f"{type(error).__name__}: {detail}"
            return CallFailed("transport", reason), True, 0.0
        raise error


def _unconnected(error: BaseException | None) -> str:
    """Why no connection was made, from the error below the library's; empty if it is none of these."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return "the connection was refused: nothing listens there"
        if isinstance(error, socket.gaierror):
            return f"the server's name is not known ({error.strerror})"
        error = error.__cause__ or error.__context__
    return ""


def _shown(value: Any) -> str:
    try:
        return whole_characters(value if isinstance(value, str) else str(value))
    except RecursionError:
        return ""
