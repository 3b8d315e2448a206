"""Who may ask, and how much: the key, the rate of one client, and what a request may hold."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass

from starlette.requests import Request

from mapo_jax.serving.protocol import ProtocolError

CLIENTS = 10_000  # whose rates are remembered


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body_bytes: int = 2**20
    messages: int = 200  # of one request
    requests_per_minute: int = 0  # of one client, feedback included; 0: any number
    waiting: int = 64  # replies that wait for a slot; beyond, requests are refused
    stall_seconds: float = 60.0  # a client that reads nothing for so long is disconnected
    body_seconds: float = 30.0  # until the whole body of a request has come


class Rates:
    """How many requests each client has left: `per_minute` at once, and as many again every minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by client: requests, when

    def take(self, client: str) -> None:
        """Counts a request. Raises ProtocolError with `Retry-After` if the client has none left."""
        most = self._per_minute
        if not most:
            return
        now = time.monotonic()
        left, since = self._left.pop(client, (float(most), now))
        left = min(most, left + (now - since) * most / 60)
        self._left[client] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        if left < 1:
            raise too_many(f"Rate limit reached: {most} requests per minute.", -int(-(1 - left) * 60 // most))


def too_many(message: str, seconds: int) -> ProtocolError:
    """The refusal of a request that may be sent again after `seconds`."""
    headers = {"retry-after": str(max(1, seconds))}
    return ProtocolError(
        message, status=429, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers
    )


def check_key(authorization: str, key: str | None) -> None:
    """Raises ProtocolError if a key is needed and it is not what a request's `authorization` says."""
    if key is None:
        return
    given = authorization.removeprefix("Bearer ").strip()
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise ProtocolError(
            "Incorrect API key provided.",
            status=401,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request. Raises ProtocolError if it is too large, late, or of another type than JSON."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        # Also keeps pages of other origins out: with this type a browser asks for permission first.
        raise ProtocolError("The content type must be application/json.", status=415)
    body = b""
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise ProtocolError(f"The body is larger than {limits.body_bytes} bytes.", status=413)
    except TimeoutError as error:
        raise ProtocolError(f"The body did not come within {limits.body_seconds:g} s.", status=408) from error
    return body
