"""The engine behind JetStream's orchestrator: its gRPC protocol, greedy replies (`--protocol jetstream`).

The package `google-jetstream` was archived in February 2026 and is not maintained any more. What is done here
about its faults: no BOS is added and no prompt shortened (requests become ids in this module, and what does
not fit is refused); texts are decoded over whole replies, not token by token; requests are refused when the
queue is full; importing it changes neither the log's level nor its handlers; `jax.tree_map`, which JAX has no
more, is not called. JetStream's own server object is not used: it listens at all addresses and, when it is
stopped, drops the replies under way.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import grpc
import numpy as np

from mapo_jax.errors import UserError
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request
from mapo_jax.rollout.sampling import RequestSampling
from mapo_jax.serving.limits import KeyCheck, Limits, client_of
from mapo_jax.serving.protocol import ProtocolError
from mapo_jax.serving.served import ServedModel
from mapo_jax.serving.text import ReplyText

_root = logging.getLogger()
_level, _handlers = _root.level, _root.handlers[:]
from jetstream.core import orchestrator  # noqa: E402
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc  # noqa: E402
from jetstream.engine import engine_api  # noqa: E402

_root.setLevel(_level)
_root.handlers[:] = _handlers
orchestrator.delete_pytree = lambda prefix: None  # calls jax.tree_map; our prefixes hold no arrays

Prefix = tuple[Sequence[int], int]  # ids, most tokens of the reply
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
GREEDY = RequestSampling(temperature=0.0)
GRACE_SECONDS = 3600.0  # in which replies under way may end after a signal


@dataclass
class _Slot:
    """A reply that is handed out token by token."""

    ids: tuple[int, ...] = ()
    given: int = 0
    ended: bool = False


class JetStreamEngine(engine_api.Engine):
    """Our engine as JetStream's: a cache stays in its slot, and `generate` hands out a block token by token.

    `insert` and `generate` are called by one thread.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._slots: dict[int, _Slot] = {}

    def prefill(self, *, params, existing_prefix=None, padded_tokens, true_length) -> Prefix:
        """The prefix; it is computed with others when the reply's first block is."""
        return padded_tokens

    def insert(self, prefix: Prefix, decode_state: None, slot: int) -> None:
        """Begins a reply in a slot."""
        ids, limit = prefix
        self._engine.cancel(slot)
        self._engine.submit(
            Request(slot, ids, key=(0, 0, slot), turn=0, limit=limit, start=True, sampling=GREEDY)
        )
        self._slots[slot] = _Slot()

    def generate(self, params, decode_state: None) -> tuple[None, engine_api.ResultTokens]:
        """The next token of every slot, invalid where its reply has ended."""
        live = {number: slot for number, slot in self._slots.items() if not slot.ended}
        if any(slot.given == len(slot.ids) for slot in live.values()):
            finished = self._engine.advance()
            for number, slot in live.items():
                reply = finished.get(number) or self._engine.sampled(number)
                slot.ids, slot.ended = reply.ids, number in finished
        data = np.zeros((self.max_concurrent_decodes, 3), np.int32)  # token, valid, tokens so far
        for number, slot in self._slots.items():
            if slot.given < len(slot.ids):
                slot.given += 1
                data[number] = slot.ids[slot.given - 1], 1, slot.given
        return None, engine_api.ResultTokens(data, (0, 1), (1, 2), (2, 3), samples_per_slot=1)

    def load_params(self) -> None:
        """The engine has them."""

    def init_decode_state(self) -> None:
        """The engine has it."""

    def get_prefix_destination_sharding(self) -> None:
        """Prefixes hold no arrays."""

    def get_tokenizer(self) -> None:
        """Only `build_tokenizer` reads it."""

    def build_tokenizer(self, metadata: None) -> Any:
        """What the orchestrator still needs of a tokenizer."""
        return SimpleNamespace(stop_tokens=set(self._engine.stop_ids))

    max_concurrent_decodes = property(lambda self: self._engine.resident)
    samples_per_slot = property(lambda self: 1)
    max_prefill_length = property(lambda self: self._engine.length)
    mesh = property(lambda self: None)
    colocated_cpus = property(lambda self: None)


class _Driver(orchestrator.Driver):
    def _process_prefill_content(self, request, tokenizer, is_bos, max_prefill_length):
        """(prefix, its tokens); JetStream's would add a BOS, pad, and cut from the left."""
        return (request.prefill_content, request.max_tokens), len(request.prefill_content)


class _Orchestrator(orchestrator.LLMOrchestrator):
    """Checks requests, which JetStream does not; an error in its threads would end the process."""

    def __init__(self, driver: _Driver, served: ServedModel, limits: Limits, key: str | None) -> None:
        super().__init__(driver)
        self._served, self._limits, self._key, self._open = served, limits, key, 0
        self._check_key = KeyCheck()

    async def Decode(self, request, context) -> AsyncIterator[Any]:
        """A reply to a text, as the first message of a chat, or to the ids of a row."""
        ids: tuple[int, ...] = ()
        try:
            peer = unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")
            given = dict(context.invocation_metadata()).get("authorization", "")
            self._check_key(client_of(peer), given, self._key)
            ids = await asyncio.to_thread(self._ids, request)  # a long text takes a second
        except ProtocolError as error:
            await context.abort(_CODES[error.status], str(error))
        if self._open >= self._served.engine.resident + self._limits.waiting:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "The server is busy; try again later.")
        chat = self._served.chat
        text = ReplyText(chat.decode, chat.stop_ids, ()) if request.HasField("text_content") else None
        limit = request.max_tokens or self._served.reply_tokens or self._served.engine.max_reply_tokens
        row = jetstream_pb2.DecodeRequest.TokenContent(token_ids=ids)
        self._open += 1
        try:
            request = jetstream_pb2.DecodeRequest(token_content=row, max_tokens=limit)
            async for response in super().Decode(request, context):
                sample = response.stream_content.samples[0]
                if text is not None:
                    last = not sample.token_ids  # the orchestrator ends a reply with an empty sample
                    sample.text = text.add(list(sample.token_ids), last=last)
                yield response
        finally:
            self._open -= 1

    def _ids(self, request) -> tuple[int, ...]:
        """The row. Raises ProtocolError for a request that cannot be answered as it is."""
        engine, chat = self._served.engine, self._served.chat
        if request.session_cache or request.priority:
            raise ProtocolError("session_cache and priority have no effect here; leave them out.")
        if request.HasField("text_content"):
            ids = chat.start(request.text_content.text)
        else:
            ids = tuple(request.token_content.token_ids)
        if not ids or not all(0 <= i < chat.vocabulary_size for i in ids):
            raise ProtocolError(f"A row has at least one id, all of them below {chat.vocabulary_size}.")
        if len(ids) >= engine.length:
            raise ProtocolError(f"The prompt has {len(ids)} tokens; a row holds {engine.length}.")
        if request.max_tokens < 0:
            raise ProtocolError("max_tokens must be positive, or 0 for the server's.")
        return ids


@asynccontextmanager
async def running(
    served: ServedModel, limits: Limits, key: str | None, address: str
) -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    """A server and its port. `server.stop(seconds)` ends it; the orchestrator's threads end with the context.

    Args:
      address: HOST:PORT; port 0: any free one.

    Raises:
      UserError: the address is taken.
    """
    engine = JetStreamEngine(served.engine)
    driver = _Driver([engine], [engine], [None], [None], interleaved_mode=True)
    try:
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", limits.body_bytes)]
        server = grpc.aio.server(options=options)
        servicer = _Orchestrator(driver, served, limits, key)
        jetstream_pb2_grpc.add_OrchestratorServicer_to_server(servicer, server)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise UserError(f"cannot listen at {address}; choose another --host or --port") from error
        await server.start()
        yield server, port
    finally:
        await asyncio.to_thread(driver.stop)


async def serve_jetstream(
    served: ServedModel, limits: Limits, key: str | None, address: str, report: Callable[[str], None]
) -> None:
    """Serves one model until SIGTERM or SIGINT; replies under way end first. Errors as of `running`."""
    async with running(served, limits, key, address) as (server, port):
        report(f"serving JetStream's protocol at {address.rpartition(':')[0]}:{port}")
        ends: list[asyncio.Task[None]] = []

        def end() -> None:  # a second signal does not wait
            ends.append(asyncio.ensure_future(server.stop(None if ends else GRACE_SECONDS)))

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, end)
        await server.wait_for_termination()
