"""Who may ask, and how much: the key, the rate of one client, and what a request may hold."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections import OrderedDict
from dataclasses import dataclass

from starlette.requests import Request

from mapo_jax.serving.protocol import ProtocolError

CLIENTS = 10_000  # whose rates are remembered
WRONG_KEYS_PER_MINUTE = 10  # of one client
VALUES_PER_MESSAGE = 20  # JSON values; a message with a tool call has ten


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body_bytes: int = 2**20
    messages: int = 200  # of one request
    requests_per_minute: int = 0  # of one client, feedback included; 0: any number
    waiting: int = 64  # replies that wait for a slot; beyond, requests are refused
    stall_seconds: float = 60.0  # a client that reads nothing for so long is disconnected
    body_seconds: float = 30.0  # until the whole body of a request has come

    @property
    def values(self) -> int:
        """JSON values of a body."""
        return VALUES_PER_MESSAGE * self.messages


class Rates:
    """How many requests each client has left: `per_minute` at once, and as many again every minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by client: requests, when

    def take(self, client: str, count: int = 1, what: str = "requests") -> None:
        """Counts a request; with a `count` of 0 only looks.

        Raises:
          ProtocolError: the client has none left; says when it has (`Retry-After`).
        """
        most = self._per_minute
        if not most:
            return
        now = time.monotonic()
        left, since = self._left.pop(client, (float(most), now))
        left = min(most, left + (now - since) * most / 60)
        after = left - count if left >= 1 else left
        if after < most:
            self._left[client] = (after, now)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        if left < 1:
            raise too_many(f"Rate limit reached: {most} {what} per minute.", -int(-(1 - left) * 60 // most))


def too_many(message: str, seconds: int) -> ProtocolError:
    """The refusal of a request that may be sent again after `seconds`."""
    headers = {"retry-after": str(max(1, seconds))}
    return ProtocolError(
        message, status=429, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers
    )


class KeyCheck:
    """Compares keys in constant time, and limits how many wrong ones a client can try."""

    def __init__(self) -> None:
        self._wrong = Rates(WRONG_KEYS_PER_MINUTE)

    def __call__(self, client: str, authorization: str, key: str | None) -> None:
        """Checks what a request's `authorization` says; a `key` of None: none is needed.

        Raises:
          ProtocolError: it is another key, or the client has tried too many.
        """
        if key is None:
            return
        # Also refuses the right key then: else guessing could go on, and would end with an answer.
        self._wrong.take(client, 0, "wrong keys")
        given = authorization.removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), key.encode()):
            self._wrong.take(client)
            raise ProtocolError(
                "Incorrect API key provided.",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def client_of(host: str) -> str:
    """Whose requests are counted together: an IPv4 address, or the /64 that one user of IPv6 has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:100]
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or f"{int(address) >> 64:x}/64")


async def read_body(request: Request, limits: Limits) -> bytearray:
    """The body of a request. Raises ProtocolError if it is too large, late, or of another type than JSON."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        # Also keeps pages of other origins out: with this type a browser asks for permission first.
        raise ProtocolError("The content type must be application/json.", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise ProtocolError(f"The body is larger than {limits.body_bytes} bytes.", status=413)
    except TimeoutError as error:
        raise ProtocolError(f"The body did not come within {limits.body_seconds:g} s.", status=408) from error
    return body
