"""HTTP responses of any size and content: bounded, unpacked, and parsed as JSON."""

import email.utils
import math
import time
import zlib
from collections.abc import Awaitable
from typing import Any

import httpx2
import openai

LARGEST_BODY = 2**23  # bytes of a response, both packed and unpacked
_REDIRECTS = 3


class UnusableResponse(Exception):
    """A response that cannot be used as an answer."""

    def __init__(self, detail: str, raw: str = "") -> None:
        super().__init__(detail)
        self.raw = raw


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client that reads at most LARGEST_BODY bytes of a response, packed or unpacked."""

    async def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        request.headers["accept-encoding"] = "gzip"  # the only one that `_unpacked` supports
        options["follow_redirects"] = False  # the library would read their bodies without a bound
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
        body = _unpacked(bytes(body), headers.pop("content-encoding", ""))
        for name in ("content-length", "transfer-encoding"):
            headers.pop(name, None)
        return httpx2.Response(response.status_code, headers=headers, content=body, request=response.request)


def _unpacked(body: bytes, encoding: str) -> bytes:
    if encoding.strip().lower() in ("", "identity"):
        return body
    if encoding.strip().lower() != "gzip":
        raise UnusableResponse(f"the answer is packed as {encoding[:100]!r}, which was not asked for")
    unpacker = zlib.decompressobj(wbits=31)
    try:
        content = unpacker.decompress(body, LARGEST_BODY + 1)
    except zlib.error as error:
        raise UnusableResponse(f"the answer is no gzip ({error})") from None
    if len(content) > LARGEST_BODY:
        raise _too_large()
    if not unpacker.eof:
        raise UnusableResponse("the answer breaks off")
    return content


def _too_large() -> UnusableResponse:
    return UnusableResponse(f"the answer is larger than {LARGEST_BODY} bytes")


async def parsed_json(response: Awaitable[object]) -> Any:
    """The library's response, as JSON values."""
    try:
        return await response
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets
        raise UnusableResponse("the answer is no JSON") from None


def retry_after(header: str | None) -> float:
    """Seconds to wait by a Retry-After header, which is a number or an HTTP date; 0 if it is neither."""
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
