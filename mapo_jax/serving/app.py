"""The HTTP application: OpenAI's endpoints, health and metrics, feedback, the page, and loading of models."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, TypeVar

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mapo_jax.chat_log import ChatLog
from mapo_jax.commands import printable
from mapo_jax.environment.scenario import Scenario
from mapo_jax.errors import UserError
from mapo_jax.serving.metrics import Metrics
from mapo_jax.serving.protocol import ChatRequest, Feedback, Load, ProtocolError, read_request, usage
from mapo_jax.serving.served import Part, Prompt, ServedModel

T = TypeVar("T")
Loader = Callable[[str, str, int | None], ServedModel]

CLIENTS = 10_000  # whose rates are remembered
ASSETS = resources.files("mapo_jax.serving") / "assets"
CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_LOG = logging.getLogger("mapo_jax.serving")


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body_bytes: int = 2**20
    messages: int = 200  # of one request
    requests_per_minute: int = 0  # of one client; 0: any number
    waiting: int = 64  # replies that wait for a slot; beyond, requests are refused
    stall_seconds: float = 60.0  # a client that reads nothing for so long is disconnected


@dataclass
class Service:
    """What the application serves, and to whom.

    Attributes:
      models: by name; the first is the page's.
      key: that requests must carry; None: none.
      admin_key: of /admin; None: there is no such endpoint.
      load: loads a model: (name, path, step). Raises UserError.
      chats: where conversations are kept; None: nowhere.
      cards: that a person can play on the page.
      closing: whether no new request is taken.
    """

    models: dict[str, ServedModel]
    limits: Limits = Limits()
    key: str | None = None
    admin_key: str | None = None
    load: Loader | None = None
    chats: ChatLog | None = None
    cards: Sequence[Scenario] = ()
    closing: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    _rates: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)
    _loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    _retired: set[asyncio.Task[None]] = field(default_factory=set)

    # --- Who may ask. ---

    def admit(self, request: Request) -> None:
        """Raises ProtocolError for a request without the key, beyond its rate, or during the shutdown."""
        _check_key(request, self.key)
        if self.closing:
            raise ProtocolError(
                "The server is shutting down.", status=503, kind="server_error", headers={"retry-after": "10"}
            )

    def take_turn(self, request: Request) -> None:
        """Raises ProtocolError with `Retry-After` if a client is beyond its rate, or if too many wait."""
        limits = self.limits
        if sum(model.waiting for model in self.models.values()) >= limits.waiting:
            raise _too_many("The server is busy: too many requests are waiting.", 2)
        if not limits.requests_per_minute:
            return
        client, now = request.client.host if request.client else "", time.monotonic()
        left, since = self._rates.pop(client, (float(limits.requests_per_minute), now))
        left = min(limits.requests_per_minute, left + (now - since) * limits.requests_per_minute / 60)
        self._rates[client] = (left - 1 if left >= 1 else left, now)
        if len(self._rates) > CLIENTS:
            self._rates.popitem(last=False)
        if left < 1:
            seconds = -int(-(1 - left) * 60 // limits.requests_per_minute)
            raise _too_many(f"Rate limit reached: {limits.requests_per_minute} requests per minute.", seconds)

    async def body(self, request: Request) -> bytes:
        """The body of a request. Raises ProtocolError for one that is too large or no JSON."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # Also keeps pages of other origins out: with this type a browser asks for permission first.
            raise ProtocolError("The content type must be application/json.", status=415)
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > self.limits.body_bytes:
                raise ProtocolError(f"The body is larger than {self.limits.body_bytes} bytes.", status=413)
        return body

    # --- Chat. ---

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self.admit(request)
        asked = read_request(ChatRequest, await self.body(request))
        model = self.models.get(asked.model)
        if model is None:
            raise _no_model(asked.model)
        if len(asked.messages) > self.limits.messages:
            raise ProtocolError(
                f"A conversation may have {self.limits.messages} messages, not {len(asked.messages)}.",
                param="messages",
            )
        scenario = asked.metadata.scenario
        if scenario is not None and scenario not in {card.id for card in self.cards}:
            raise ProtocolError("There is no such scenario.", param="metadata.scenario")
        self.take_turn(request)
        prompt = model.prompt(asked)
        exchange = _Exchange(self, model, asked, prompt)
        if asked.stream:
            return _EventStream(exchange, self.limits.stall_seconds)
        outcome = "error"
        try:
            whole = await _unless_disconnected(request.receive, exchange.completion())
            outcome = "ok"
            return JSONResponse(whole)
        except _Disconnected:
            outcome = "disconnected"
            return Response(status_code=499)
        finally:
            exchange.end(outcome)

    async def models_list(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/{name}."""
        _check_key(request, self.key)
        name = request.path_params.get("name")
        if name is not None and name not in self.models:
            raise _no_model(name)
        found = [
            {"id": model.name, "object": "model", "created": model.created, "owned_by": "mapo_jax"}
            for model in self.models.values()
            if name in (None, model.name)
        ]
        return JSONResponse({"object": "list", "data": found} if name is None else found[0])

    async def feedback(self, request: Request) -> Response:
        """POST /v1/feedback: a rating of a kept reply."""
        self.admit(request)
        given = read_request(Feedback, await self.body(request))
        if self.chats is None or not self.chats.has(given.reply):
            raise ProtocolError("That reply was not kept, so it cannot be rated.", status=404, param="reply")
        if not await asyncio.to_thread(self.chats.add, "feedback", given.model_dump()):
            raise ProtocolError("The feedback could not be kept.", status=507, kind="server_error")
        return JSONResponse({"object": "feedback", "reply": given.reply})

    def keep(self, exchange: _Exchange, name: str, text: str, last: Part) -> None:
        """Notes where a conversation stands, and appends to the kept ones what is new in it."""
        model, asked = exchange.model, exchange.asked
        conversation, goes_on = model.remember(asked, exchange.prompt, text, last.row)
        if self.chats is None or not asked.store:
            return
        new = asked.chat[-1:] if goes_on else asked.chat
        row = {
            "conversation": conversation,
            "reply": name,
            "model": model.name,
            "source": model.source,
            "scenario": asked.metadata.scenario,
            "finish": last.finish,
            "tokens": last.tokens,
            "messages": [*new, {"role": "assistant", "content": text}],
        }
        had_problem = self.chats.problem is not None
        if not self.chats.add("turn", row) and not had_problem:
            _LOG.error("conversations are not kept: %s", printable(self.chats.problem or ""))

    # --- Around it. ---

    async def health(self, request: Request) -> Response:
        """GET /health; needs no key."""
        problem = self.chats and self.chats.problem
        status = "closing" if self.closing else "degraded" if problem else "ok"
        kept = "off" if self.chats is None else problem or "on"
        content = {"status": status, "models": list(self.models), "conversations": kept}
        if self.chats is not None and self.chats.lost:
            content["lost_lines"] = self.chats.lost
        return JSONResponse(content, status_code=503 if self.closing else 200)

    async def metrics_page(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        _check_key(request, self.key)
        models = self.models.values()
        self.metrics.running.set(sum(model.running for model in models))
        self.metrics.waiting.set(sum(model.waiting for model in models))
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def admin_load(self, request: Request) -> Response:
        """POST /admin/load: loads weights for a new or known name; replies under way end on the old."""
        if self.admin_key is None or self.load is None:
            raise HTTPException(404)
        _check_key(request, self.admin_key)
        asked = read_request(Load, await self.body(request))
        async with self._loading:
            try:
                new = await asyncio.to_thread(self.load, asked.model, asked.path, asked.step)
            except UserError as error:
                raise ProtocolError(f"The model was not loaded: {error}", code="not_loaded") from error
            old = self.models.get(asked.model)
            self.models[asked.model] = new
        if old is not None:
            task = asyncio.ensure_future(old.close())
            self._retired.add(task)
            task.add_done_callback(self._retired.discard)
        _LOG.info("serving %s from %s", printable(new.name), printable(new.source))
        return JSONResponse({"object": "model", "id": new.name, "source": new.source})

    async def page(self, request: Request) -> Response:
        """The page and its two files."""
        name, kind = {
            "/": ("page.html", "text/html"),
            "/page.css": ("page.css", "text/css"),
            "/page.js": ("page.js", "text/javascript"),
        }[request.url.path]
        headers = {
            "content-security-policy": CONTENT_SECURITY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return Response((ASSETS / name).read_bytes(), media_type=kind, headers=headers)

    async def page_facts(self, request: Request) -> Response:
        """GET /page.json: what the page shows besides the chat; needs no key."""
        cards = [
            {
                "id": card.id,
                "name": card.person.name,
                "age": card.person.age,
                "topic": card.topic,
                "situation": card.situation,
                "hope": card.hope,
                "trigger": card.story.trigger,
                "speech": card.person.speech,
            }
            for card in self.cards
        ]
        facts = {"models": list(self.models), "key": self.key is not None, "kept": self.chats is not None}
        return JSONResponse(facts | {"cards": cards, "messages": self.limits.messages})


@dataclass
class _Exchange:
    """One request for completions and the answer to it."""

    service: Service
    model: ServedModel
    asked: ChatRequest
    prompt: Prompt

    def __post_init__(self) -> None:
        self.model.users += 1
        self.watch = self.service.metrics.request(self.model.name, len(self.prompt.ids))
        self.name, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.texts = [""] * self.asked.n
        self.lasts: list[Part | None] = [None] * self.asked.n

    def end(self, outcome: str) -> None:
        """The answer was sent (ok), or could not be."""
        self.model.users -= 1
        self.watch.end(outcome)

    async def parts(self) -> AsyncIterator[Part | None]:
        async with aclosing(self.model.replies(self.asked, self.prompt)) as parts:
            async for part in parts:
                if part is None:
                    yield None
                    continue
                self.texts[part.choice] += part.text
                self.watch.tokens(part.choice, part.tokens)
                if part.finish:
                    self.lasts[part.choice] = part
                    # Before the client can know that the reply has ended.
                    name = self.name if self.asked.n == 1 else f"{self.name}-{part.choice}"
                    self.service.keep(self, name, self.texts[part.choice], part)
                yield part

    @property
    def usage(self) -> dict[str, Any]:
        lasts = [part for part in self.lasts if part]
        cached = sum(part.cached for part in lasts[:1])
        self.watch.usage(len(self.prompt.ids), cached)
        return usage(len(self.prompt.ids), cached, sum(part.tokens for part in lasts))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }

    async def completion(self) -> dict[str, Any]:
        """The answer as one object."""
        entries: list[list[dict[str, Any]]] = [[] for _ in self.texts]
        async for part in self.parts():
            if part is not None:
                entries[part.choice] += part.logprobs
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": {"content": entries[index], "refusal": None} if self.asked.logprobs else None,
                "finish_reason": self.lasts[index].finish,
            }
            for index, text in enumerate(self.texts)
        ]
        return self._body("chat.completion", choices) | {"usage": self.usage}

    async def events(self) -> AsyncIterator[dict[str, Any] | None]:
        """The answer as chunks; None while it waits."""
        options = self.asked.stream_options
        wants_usage = options is not None and options.include_usage
        empty = {"usage": None} if wants_usage else {}

        def chunk(index: int, delta: dict[str, Any], entries: Any = None, finish: str | None = None):
            choice = {"index": index, "delta": delta, "logprobs": entries, "finish_reason": finish}
            return self._body("chat.completion.chunk", [choice]) | empty

        for index in range(self.asked.n):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async with aclosing(self.parts()) as parts:
            async for part in parts:
                if part is None:
                    yield None
                    continue
                if part.text or part.logprobs:
                    entries = {"content": part.logprobs, "refusal": None} if self.asked.logprobs else None
                    yield chunk(part.choice, {"content": part.text}, entries)
                if part.finish:
                    yield chunk(part.choice, {}, None, part.finish)
        used = self.usage
        if wants_usage:
            yield self._body("chat.completion.chunk", []) | {"usage": used}


class _EventStream(Response):
    """Sends chunks as server-sent events; ends when the client is gone or reads nothing."""

    def __init__(self, exchange: _Exchange, stall_seconds: float) -> None:
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
        async with aclosing(self._exchange.events()) as chunks:
            try:
                async for chunk in chunks:
                    await write(
                        b": waiting\n\n" if chunk is None else b"data: " + orjson.dumps(chunk) + b"\n\n"
                    )
            except (TimeoutError, OSError):
                raise
            except Exception:
                _LOG.exception("a stream ended with an error")
                outcome = "error"
                await write(b"data: " + orjson.dumps(_SERVER_ERROR) + b"\n\n")
        await write(b"data: [DONE]\n\n", more=False)
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


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise ProtocolError(
            "Incorrect API key provided.",
            status=401,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def _no_model(name: str) -> ProtocolError:
    return ProtocolError(
        f"The model `{name[:200]}` does not exist.", status=404, param="model", code="model_not_found"
    )


def _too_many(message: str, seconds: int) -> ProtocolError:
    headers = {"retry-after": str(max(1, seconds))}
    return ProtocolError(
        message, status=429, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers
    )


_SERVER_ERROR = {
    "error": {"message": "The server had an error.", "type": "server_error", "param": None, "code": None}
}


def make_app(service: Service, *, hosts: Sequence[str] = ("*",)) -> Starlette:
    """The application.

    Args:
      hosts: names under which it may be called; a page elsewhere cannot reach a local server by a name of its
        own then.
    """

    async def protocol_error(request: Request, error: ProtocolError) -> Response:
        service.metrics.requests.labels("", str(error.status)).inc()
        return JSONResponse(error.body, error.status, error.headers)

    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"Unknown request URL: {request.method} {request.url.path[:200]}."
        refused = ProtocolError(message, status=error.status_code, headers=error.headers)
        return await protocol_error(request, refused)

    async def server_error(request: Request, error: Exception) -> Response:
        return JSONResponse(_SERVER_ERROR, 500)

    handlers: Mapping[Any, Any] = {
        ProtocolError: protocol_error,
        HTTPException: http_error,
        Exception: server_error,
    }
    return Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/models", service.models_list),
            Route("/v1/models/{name:path}", service.models_list),
            Route("/v1/feedback", service.feedback, methods=["POST"]),
            Route("/admin/load", service.admin_load, methods=["POST"]),
            Route("/health", service.health),
            Route("/metrics", service.metrics_page),
            *(Route(path, service.page) for path in ("/", "/page.css", "/page.js")),
            Route("/page.json", service.page_facts),
        ],
        exception_handlers=handlers,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )
