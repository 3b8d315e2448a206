"""The HTTP application: OpenAI's endpoints, health and metrics, feedback, the page, and loading of models."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mapo_jax.chat_log import ChatLog
from mapo_jax.commands import machine_errors, printable
from mapo_jax.environment.scenario import Scenario
from mapo_jax.errors import UserError
from mapo_jax.serving.exchange import SERVER_ERROR, EventStream, Exchange, whole_answer
from mapo_jax.serving.limits import KeyCheck, Limits, Rates, client_of, read_body, too_many
from mapo_jax.serving.metrics import Metrics
from mapo_jax.serving.protocol import ChatRequest, Feedback, Load, ProtocolError, read_request
from mapo_jax.serving.served import Part, ServedModel

T = TypeVar("T", bound=BaseModel)
Loader = Callable[[str, str, int | None], ServedModel]

ASSETS = resources.files("mapo_jax.serving") / "assets"
CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MOST_LOGPROBS = 1_000_000  # of one answer, with alternatives: half a gigabyte
_PORT = re.compile(r":\d*$")
_LOG = logging.getLogger("mapo_jax.serving")


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
    limits: Limits = field(default_factory=Limits)
    key: str | None = None
    admin_key: str | None = None
    load: Loader | None = None
    chats: ChatLog | None = None
    cards: Sequence[Scenario] = ()
    closing: bool = False
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self._rates, self._check_key = Rates(self.limits.requests_per_minute), KeyCheck()
        self._reading = 0  # replies whose prompts are being tokenised
        self._writer = ThreadPoolExecutor(1, "conversations")  # a slow disk holds up only what is kept
        self._loading = asyncio.Lock()
        self._retired: set[asyncio.Task[None]] = set()

    def _know(self, request: Request, key: str | None) -> None:
        """Raises ProtocolError if the request has not the `key`."""
        self._check_key(_client(request), request.headers.get("authorization", ""), key)

    async def _admitted(self, request: Request, kind: type[T], key: str | None) -> T:
        """The checked body of a request that has the `key`, is within its client's rate, and comes in time.

        Raises:
          ProtocolError: it is not.
        """
        self._rates.take(_client(request))
        self._know(request, key)
        if self.closing:
            raise ProtocolError(
                "The server is shutting down.", status=503, kind="server_error", headers={"retry-after": "10"}
            )
        return read_request(kind, await read_body(request, self.limits), self.limits.values)

    # --- Chat. ---

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = await self._admitted(request, ChatRequest, self.key)
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
        most = model.engine.lanes + self.limits.waiting
        if asked.n > most:
            raise ProtocolError(f"This server can hold {most} replies at once, not {asked.n}.", param="n")
        tokens = min(asked.limit or model.reply_tokens or model.engine.length, model.engine.length)
        if asked.logprobs and asked.n * tokens * (1 + asked.top_logprobs) > MOST_LOGPROBS:
            raise ProtocolError(
                f"One answer can hold {MOST_LOGPROBS:,} log-probabilities; ask for fewer replies, tokens or "
                "alternatives.",
                param="logprobs",
            )
        waiting = self._reading + sum(model.waiting for model in self.models.values())
        if waiting + max(0, asked.n - model.free) > self.limits.waiting:
            raise too_many("The server is busy: too many requests are waiting.", 2)
        self._reading += asked.n
        try:
            prompt = await model.prompt(asked)
        finally:
            self._reading -= asked.n
        exchange = Exchange(model, asked, prompt, self.metrics, self._keep)
        if asked.stream:
            return EventStream(exchange, self.limits.stall_seconds)
        return await whole_answer(exchange, request.receive)

    async def models_list(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/{name}."""
        self._know(request, self.key)
        name = request.path_params.get("name")
        if name is not None and name not in self.models:
            raise _no_model(name)
        found = {
            key: {"id": key, "object": "model", "created": model.created, "owned_by": "mapo_jax"}
            for key, model in self.models.items()
        }
        return JSONResponse(found[name] if name else {"object": "list", "data": list(found.values())})

    async def feedback(self, request: Request) -> Response:
        """POST /v1/feedback: a rating of a kept reply."""
        given = await self._admitted(request, Feedback, self.key)
        if self.chats is None or not self.chats.has(given.reply):
            raise ProtocolError("That reply was not kept, so it cannot be rated.", status=404, param="reply")
        if not await self._add("feedback", given.model_dump()):
            raise ProtocolError("The feedback could not be kept.", status=507, kind="server_error")
        return JSONResponse({"object": "feedback", "reply": given.reply})

    async def _add(self, kind: str, row: dict[str, Any]) -> bool:
        """Appends a line to the kept conversations; whether it was written."""
        chats, had_problem = self.chats, self.chats.problem is not None
        written = await asyncio.get_running_loop().run_in_executor(self._writer, chats.add, kind, row)
        if not written and not had_problem:
            _LOG.error("conversations are not kept: %s", printable(chats.problem or ""))
        return written

    async def _keep(self, exchange: Exchange, name: str, text: str, last: Part) -> None:
        """Notes where a conversation stands, and appends to the kept ones what is new in it."""
        model, asked, chats = exchange.model, exchange.asked, self.chats
        messages = asked.kept
        conversation, goes_on = model.conversation(asked, exchange.prompt)
        written = False
        if chats is not None and asked.store and any(message["role"] == "user" for message in messages):
            row = {
                "conversation": conversation,
                "reply": name,
                "model": model.name,
                "source": model.source,
                "scenario": asked.metadata.scenario,
                "finish": last.finish,
                "tokens": last.tokens,
                "messages": [*messages[-1 if goes_on else 0 :], {"role": "assistant", "content": text}],
            }
            written = await self._add("turn", row)
        model.remember(asked, conversation, text, last.row, written)

    # --- Around it. ---

    async def health(self, request: Request) -> Response:
        """GET /health; needs no key."""
        problem = self.chats and self.chats.problem
        status = "closing" if self.closing else "degraded" if problem else "ok"
        kept = "off" if self.chats is None else problem or "on"
        content = {"status": status, "models": list(self.models), "conversations": kept}
        lost = {"lost_lines": self.chats.lost} if self.chats is not None and self.chats.lost else {}
        return JSONResponse(content | lost, status_code=503 if self.closing else 200)

    async def metrics_page(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        self._know(request, self.key)
        models = self.models.values()
        self.metrics.running.set(sum(model.running for model in models))
        self.metrics.waiting.set(sum(model.waiting for model in models))
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def admin_load(self, request: Request) -> Response:
        """POST /admin/load: loads weights for a new or known name; replies under way end on the old."""
        if self.admin_key is None or self.load is None:
            raise HTTPException(404)
        asked = await self._admitted(request, Load, self.admin_key)
        async with self._loading:
            try:
                with machine_errors():
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


def _client(request: Request) -> str:
    return client_of(request.client.host) if request.client else ""


def _no_model(name: str) -> ProtocolError:
    return ProtocolError(
        f"The model `{name[:200]}` does not exist.", status=404, param="model", code="model_not_found"
    )


class _HostCheck:
    """Refuses other host names: a page elsewhere cannot reach a local server by a name of its own then."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            host = _PORT.sub("", Headers(scope=scope).get("host", "")).lower()
            if host not in self._hosts:
                error = ProtocolError(f"This server does not answer to the name `{host[:200]}`.")
                app = JSONResponse(error.body, error.status)
        await app(scope, receive, send)


def make_app(service: Service, *, hosts: Sequence[str] = ()) -> Starlette:
    """The application.

    Args:
      hosts: names and addresses under which it may be called, in lower case; none: any.
    """

    async def protocol_error(request: Request, error: ProtocolError) -> Response:
        service.metrics.requests.labels("", str(error.status)).inc()
        return JSONResponse(error.body, error.status, error.headers)

    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"Unknown request URL: {request.method} {request.url.path[:200]}."
        refused = ProtocolError(message, status=error.status_code, headers=error.headers)
        return await protocol_error(request, refused)

    async def server_error(request: Request, error: Exception) -> Response:
        return JSONResponse(SERVER_ERROR, 500)

    async def gone(request: Request, error: ClientDisconnect) -> Response:
        service.metrics.requests.labels("", "disconnected").inc()
        return Response(status_code=499)  # which nobody reads

    handlers: dict[Any, Any] = {
        ProtocolError: protocol_error,
        HTTPException: http_error,
        ClientDisconnect: gone,
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
        exception_handlers=handlers | {Exception: server_error},
        middleware=[Middleware(_HostCheck, hosts=hosts)] if hosts else [],
    )
