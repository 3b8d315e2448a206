"""The client against a scripted server: what it retries, what it does not, and that it reveals no key."""

import asyncio
import contextlib
import email.utils
import gzip
import json
import socket
import time
import zlib
from types import SimpleNamespace

import pytest

from mapo_jax.config import RoleConfig
from mapo_jax.environment.allowance import allow
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.client import (
    ATTEMPTS,
    LONGEST_WAIT,
    CallFailed,
    Connections,
    Server,
)
from mapo_jax.environment.live.keys import scrubber
from mapo_jax.environment.live.limits import PerMinute, estimate_tokens
from mapo_jax.environment.live.transport import LARGEST_BODY, retry_after

KEY = "sk-test-1234567890abcdef"
CHAT = [{"role": "user", "content": "Hello."}]


@contextlib.asynccontextmanager
async def connected(config, concurrency=64, **options):
    """A server with connections of its own."""
    async with contextlib.aclosing(Connections(config.url, concurrency=concurrency)) as connections:
        yield Server(config, connections, **options)


def call(server, times=1, key=KEY, seconds=6.0, schema=None, **settings):
    """Answers or failures of `times` concurrent calls, and the arguments of on_attempt."""
    attempts = []

    async def run():
        config = RoleConfig(url=server.url, model="m", **settings)
        options = {"call_seconds": seconds, "on_attempt": lambda *arguments: attempts.append(arguments)}
        async with connected(config, key=key, **options) as client:
            calls = [client(CHAT, seed=i, schema=schema) for i in range(times)]
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run()), attempts


def test_an_answer_with_its_tokens_and_what_was_sent(serve):
    server = serve(lambda request, number: "Fine.")
    (answer,), attempts = call(server, extra_body={"top_k": 3}, temperature=0.5, max_tokens=7)
    assert answer == ("Fine.", 100, 20, False)
    (request,) = server.requests
    assert request["model"] == "m" and request["messages"] == CHAT and request["top_k"] == 3
    assert request["temperature"] == 0.5 and request["max_tokens"] == 7 and request["seed"] == 0
    assert "response_format" not in request
    call(server, extra_body={"max_tokens": None, "max_completion_tokens": 9})  # null leaves a field out
    assert "max_tokens" not in server.requests[1] and server.requests[1]["max_completion_tokens"] == 9
    assert f"authorization: bearer {KEY}" in server.headers[0].lower()
    ((seconds, failure),) = attempts
    assert 0 < seconds < 6 and failure is None


@pytest.mark.parametrize(
    "fault",
    [
        ("status", 429, {"retry-after": "0"}),
        ("status", 500, {}),
        ("status", 503, {}),
        ("status", 408, {}),
        ("close",),
        ("cut",),
        ("json",),
        ("stall", 30),
        {"id": "c1", "object": "chat.completion", "choices": []},
        {"choices": [{"index": 0, "message": {"role": "user", "content": "Me."}, "finish_reason": "stop"}]},
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": [{"type": "image"}]}}]},
        {
            "choices": [{"message": {"role": "assistant", "content": "Me."}}],
            "usage": {"prompt_tokens": 1e999},
        },
    ],
    ids=[
        "429", "500", "503", "408", "close", "cut", "no-json", "stall", "no-choice", "wrong-role", "no-text",
        "infinite",
    ],
)  # fmt: skip
def test_what_a_retry_can_mend_is_mended(serve, fault):
    server = serve(lambda request, number: "Fine." if number > 2 else fault)
    (answer,), attempts = call(server, seconds=1.5 if fault == ("stall", 30) else 6.0)
    assert answer.text == "Fine." and server.count == 3
    assert [failure is None for _, failure in attempts] == [False, False, True]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_no_retry_can_mend_fails_at_once(serve, status):
    server = serve(lambda request, number: ("status", status, {}))
    (failure,), _ = call(server)
    assert (
        isinstance(failure, RoleFailure) and failure.kind == "transport" and f"HTTP {status}" in str(failure)
    )
    assert server.count == 1


def test_a_server_that_is_not_there_is_said_to_be_so():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        (failure,), _ = call(SimpleNamespace(url=url))
    assert str(failure) == "transport: the connection was refused: nothing listens there"


def test_attempts_and_time_are_bounded(serve):
    server = serve(lambda request, number: ("stall", 30))
    started = time.monotonic()
    (failure,), attempts = call(server, seconds=1.0)
    assert failure.kind == "timeout"
    assert [kind for _, kind in attempts] == ["timeout"] * ATTEMPTS
    # Four attempts of 1 s, waits of at most 1.5 x (1 + 2 + 4) x 1/60 s; the rest is for a busy
    # machine, and far less than the stalls, of which one alone would take 30 s.
    assert time.monotonic() - started < 4 * 1.0 + 12.0


def test_a_trickle_does_not_outlast_the_time_limit(serve):
    """Each byte resets a read timeout; the limit applies to the whole attempt."""
    server = serve(lambda request, number: "unused")

    async def trickle(writer, what):
        await server._send(writer, 200, b"", length=10_000)
        for _ in range(200):
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.05)

    server._respond = trickle
    started = time.monotonic()
    (failure,), _ = call(server, seconds=1.0)
    assert failure.kind == "timeout" and time.monotonic() - started < 4 * 1.0 + 12.0


def test_retry_after_is_heeded(serve):
    server = serve(lambda request, number: "Fine." if number > 1 else ("status", 429, {"retry-after": "0.4"}))
    started = time.monotonic()
    (answer,), _ = call(server)
    assert answer.text == "Fine." and time.monotonic() - started >= 0.4


def test_a_cut_answer_is_malformed_with_its_text(serve):
    from_server = {
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Half a"}, "finish_reason": "length"}
        ]
    }
    server = serve(lambda request, number: from_server)
    (failure,), _ = call(server)
    assert (failure.kind, failure.raw, server.count) == ("malformed", "Half a", 1)
    assert "max_tokens" in failure.detail


def test_the_schema_is_enforced_where_the_server_can(serve):
    schema = {"type": "object"}
    able = serve(lambda request, number: "{}")
    call(able, times=3, schema=schema)
    assert all(r["response_format"]["json_schema"]["schema"] == schema for r in able.requests)
    assert all(r["messages"] == CHAT for r in able.requests)

    def unable(request, number):
        return ("status", 400, {}) if "response_format" in request else "{}"

    server = serve(unable)
    (one,), _ = call(server, schema=schema)
    assert one.text == "{}" and server.count == 2
    assert server.requests[1]["messages"][-1]["content"].endswith('{"type": "object"}')


def test_a_server_that_ignores_the_schema_gets_it_in_the_prompt(serve):
    server = serve(lambda request, number: "Gladly: {}" if number == 1 else "{}")

    async def run():
        async with connected(RoleConfig(url=server.url, model="m")) as client:
            return [(await client(CHAT, seed=i, schema={"type": "object"})).text for i in range(2)]

    assert asyncio.run(run()) == ["Gladly: {}", "{}"]
    first, second = server.requests
    assert "response_format" in first and first["messages"] == CHAT
    assert "response_format" not in second
    assert second["messages"][-1]["content"].endswith('JSON schema: {"type": "object"}')


def test_concurrency_is_bounded(serve):
    server = serve(lambda request, number: "Fine.", latency=0.05)

    async def run():
        async with connected(RoleConfig(url=server.url, model="m"), concurrency=3) as client:
            await asyncio.gather(*[client(CHAT, seed=i, schema=None) for i in range(12)])

    asyncio.run(run())
    assert server.count == 12 and server.most == 3


def test_requests_per_minute_hold_a_call_back(serve):
    server = serve(lambda request, number: "Fine.")

    async def run():
        async with connected(RoleConfig(url=server.url, model="m", requests_per_minute=2)) as client:
            calls = [asyncio.ensure_future(client(CHAT, seed=i, schema=None)) for i in range(3)]
            done, waiting = await asyncio.wait(calls, timeout=3)
            for call in waiting:
                call.cancel()
            return len(done), len(waiting)

    assert asyncio.run(run()) == (2, 1)


@pytest.mark.parametrize("echo", [KEY, f"{KEY[:8]}****{KEY[-4:]}"])
def test_a_key_that_the_server_echoes_is_taken_out(serve, echo):
    for what in (("status", 401, {}, f"Incorrect API key provided: {echo}."), f"Your key is {echo}."):
        (outcome,), _ = call(serve(lambda request, number, what=what: what))
        text = f"{outcome} {outcome!r} {getattr(outcome, 'raw', '')} {getattr(outcome, '__cause__', '')}"
        assert echo not in text and "[key]" in text


def test_no_half_of_a_key_is_left_where_a_long_text_is_cut(serve):
    for before in range(460, 500, 7):
        server = serve(lambda request, number, n=before: ("status", 401, {}, f"{'x' * n}{KEY}"))
        (failure,), _ = call(server)
        assert KEY[:8] not in str(failure)


def test_half_a_character_does_not_stop_anything(serve):
    body = '{"choices": [{"message": {"role": "assistant", "content": "so \\ud83d"}}]}'
    server = serve(lambda request, number: json.loads(body))
    (answer,), _ = call(server)
    assert answer.text == "so \ufffd" and answer.text.encode()


def test_tokens_per_minute_count_what_was_really_used(serve):
    """Each call is estimated at 55.5 tokens and reports 120: 240 + 55.5 fits into 300, 360 does not."""
    server = serve(lambda request, number: "Fine.")

    async def run():
        config = RoleConfig(url=server.url, model="m", max_tokens=50, tokens_per_minute=300)
        async with connected(config) as client:
            passed = 0
            try:
                async with asyncio.timeout(3):
                    for seed in range(5):
                        await client(CHAT, seed=seed, schema=None)
                        passed += 1
            except TimeoutError:
                return passed

    assert asyncio.run(run()) == 3


def test_tokens_are_estimated_by_script():
    assert estimate_tokens("abcdefgh") == 2 and estimate_tokens("\u4f60\u597d") == pytest.approx(1.6)


SAID = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Me."}, "finish_reason": "stop"}]
}
PACKED = {"content-encoding": "gzip"}


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens"])
@pytest.mark.parametrize("count", [2**63, 2**53 + 1, -1, 1.5, 1e999, "12", True, [], {}], ids=repr)
def test_usage_that_counts_nothing_is_malformed_and_tried_again(serve, field, count):
    server = serve(lambda request, number: "Fine." if number > 1 else {**SAID, "usage": {field: count}})
    (answer,), attempts = call(server)
    assert answer.text == "Fine." and server.count == 2 and attempts[0][1] == "malformed"


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, {"prompt_tokens": 2**53}])
def test_usage_that_is_left_out_is_estimated(serve, usage):
    (answer,), _ = call(serve(lambda request, number: {**SAID, "usage": usage}))
    assert answer.input_tokens == ((usage or {}).get("prompt_tokens") or 6) and answer.output_tokens == 5


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"[" * 200_000, {}),
        (b'{"a":' * 200_000, {}),
        (b'{"choices": ' + b"[" * 800 + b"]" * 800 + b"}", {}),
        (b"\xff\xfe\x00", {}),
        (b"9" * 5000, {}),
        (b"null", {}),
        (b"<html></html>", {}),
        (b" " * (LARGEST_BODY + 1), {}),
        (gzip.compress(b" " * (LARGEST_BODY + 1)), PACKED),
        (gzip.compress(gzip.compress(b" " * 300_000_000, 1), 1), {"content-encoding": "gzip, gzip"}),
        (gzip.compress(b"{}")[:-9], PACKED),
        (b"no gzip", PACKED),
        (zlib.compress(b"{}"), {"content-encoding": "deflate"}),
    ],
    ids=["lists", "objects", "deep", "bytes", "number", "null", "html", "large", "bomb", "two-bombs",
         "cut-gzip", "no-gzip", "deflate"],
)  # fmt: skip
def test_bodies_that_are_no_answer_are_malformed_and_tried_again(serve, body, headers):
    server = serve(lambda request, number: "Fine." if number > 2 else ("body", body, headers))
    (answer,), attempts = call(server)
    assert answer.text == "Fine." and [kind for _, kind in attempts] == ["malformed", "malformed", None]


def test_an_error_has_a_limit_too(serve):
    server = serve(lambda request, number: ("status", 400, {}, "x" * (LARGEST_BODY + 1)))
    (failure,), _ = call(server)
    assert failure.kind == "malformed" and "larger than" in failure.detail


def test_packed_answers_are_read(serve):
    body = gzip.compress(json.dumps(SAID).encode())
    (answer,), _ = call(serve(lambda request, number: ("body", body, PACKED)))
    assert answer.text == "Me."


def test_what_a_useless_answer_held_is_kept_as_an_excerpt(serve):
    server = serve(lambda request, number: {"choices": [], "text": f"{'x' * 10**6} {KEY}"})
    (failure,), _ = call(server)
    assert not failure.answered and len(failure.raw) < 5000 and failure.raw.endswith("[key]'}")


def test_a_redirect_is_followed(serve):
    server = serve(lambda request, number: "Fine.")
    elsewhere = serve(lambda request, number: ("status", 307, {"location": f"{server.url}/chat/completions"}))
    (answer,), _ = call(elsewhere)
    assert answer.text == "Fine." and f"bearer {KEY}" not in server.headers[0].lower()  # another origin
    (failure,), _ = call(serve(lambda request, number: ("status", 307, {"location": "/v1/chat/completions"})))
    assert failure.kind == "transport" and failure.status == 307


def test_retry_after_is_a_number_of_seconds_or_a_date():
    assert retry_after("7.5") == 7.5
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    assert retry_after(date) == pytest.approx(3600, abs=60)


@pytest.mark.parametrize(
    "header", [None, "", "soon", "-5", "nan", "inf", "1e999", "Wed, 21 Oct 2015 07:28:00 GMT", "9 9 9",
               "Wed, 21 Oct 99999999999 07:28:00 GMT"]
)  # fmt: skip
def test_retry_after_that_says_nothing_is_no_wait(header):
    assert retry_after(header) == 0.0


@pytest.mark.parametrize("wait", ["90", "1000000", "Fri, 31 Dec 2199 23:59:59 GMT"])
def test_no_wait_is_longer_than_the_longest(serve, monkeypatch, wait):
    server = serve(lambda request, number: "Fine." if number > 1 else ("status", 429, {"retry-after": wait}))
    slept, sleep = [], asyncio.sleep

    async def note(seconds):
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr("mapo_jax.environment.live.client.asyncio.sleep", note)
    (answer,), _ = call(server)
    assert answer.text == "Fine." and LONGEST_WAIT in slept and max(slept) == LONGEST_WAIT


def test_a_failure_says_its_status_and_whether_it_was_answered(serve):
    (failure,), _ = call(serve(lambda request, number: ("status", 401, {})))
    assert isinstance(failure, CallFailed) and (failure.status, failure.answered) == (401, False)
    half = {"choices": [{"message": {"role": "assistant", "content": "Half"}, "finish_reason": "length"}]}
    (failure,), _ = call(serve(lambda request, number: half))
    assert (failure.status, failure.answered) == (None, True)


def test_roles_of_one_server_share_its_connections(serve):
    server = serve(lambda request, number: "Fine.", latency=0.05)

    async def run():
        shared = Connections(server.url, concurrency=3)
        roles = [
            Server(RoleConfig(url=server.url, model=name), shared, key=f"sk-{name}")
            for name in ("user", "judge")
        ]
        await asyncio.gather(*[role(CHAT, seed=i, schema=None) for i in range(6) for role in roles])
        assert (await roles[0](CHAT, seed=9, schema=None)).text == "Fine."
        await shared.aclose()

    asyncio.run(run())
    assert server.count == 13 and server.most == 3
    keys = {
        (request["model"], key)
        for request, key in zip(server.requests, map(bearer, server.headers), strict=True)
    }
    assert keys == {("user", "sk-user"), ("judge", "sk-judge")}


def bearer(head):
    return next(line.split()[-1] for line in head.splitlines() if line.lower().startswith("authorization"))


def test_a_role_that_waits_for_its_minute_holds_no_connection(serve):
    server = serve(lambda request, number: "Fine.")

    async def run():
        shared = Connections(server.url, concurrency=1)
        slow = Server(RoleConfig(url=server.url, model="slow", requests_per_minute=1), shared)
        fast = Server(RoleConfig(url=server.url, model="fast"), shared)
        await slow(CHAT, seed=0, schema=None)
        waiting = asyncio.ensure_future(slow(CHAT, seed=1, schema=None))
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            assert (await fast(CHAT, seed=0, schema=None)).text == "Fine."
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await shared.aclose()

    asyncio.run(run())


def test_half_a_character_in_a_message_is_sent_whole(serve):
    server = serve(lambda request, number: "Fine.")

    async def run():
        async with connected(RoleConfig(url=server.url, model="m")) as client:
            await client([{"role": "user", "content": "so \ud83d"}], seed=0, schema={"type": "object"})

    asyncio.run(run())
    assert server.requests[0]["messages"][0]["content"] == "so \ufffd"


def test_a_key_is_found_however_it_is_spelled():
    key = 'sk-a/b"c\\d%1'
    spelled = [
        key,
        key.upper(),
        json.dumps(key)[1:-1],
        json.dumps(json.dumps(key))[3:-3],
        "".join(f"\\u{ord(c):04x}" for c in key),
        "".join(f"\\\\u{ord(c):04X}" for c in key),
        "".join(f"\\x{ord(c):02x}" for c in key),
        "".join(f"%{ord(c):02X}" for c in key),
        f"sk-{key[3:].replace('/', chr(92) + '/')}",
        "sk-a****d%1",
    ]
    for text in spelled:
        assert scrubber(key)(f"<{text} >") == "<[key] >", text
    assert scrubber(key)("sk-b and sk-a alone") == "sk-b and sk-a alone"
    assert scrubber(None)("x") == scrubber("abc")("x") == "x"


@pytest.mark.parametrize("wait", ["place", "attempt", "minute"])
def test_a_calls_time_is_that_of_its_attempts(serve, monkeypatch, wait):
    """On a clock that only the server's answers and our sleeps advance."""
    clock = [0.0]
    sleep = asyncio.sleep

    async def slept(seconds):
        clock[0] += 1e6 if seconds > 0 else 0.0
        await sleep(0)

    def answer(request, number):
        clock[0] += 100
        return ("status", 429, {"retry-after": "7"}) if wait == "attempt" and number == 1 else "Fine."

    server = serve(answer)

    async def run():
        config = RoleConfig(url=server.url, model="m")
        async with connected(config, concurrency=1) as client:
            if wait == "attempt":
                monkeypatch.setattr(asyncio, "sleep", slept)
            if wait == "minute":
                client._requests = PerMinute(1, clock=lambda: clock[0] / 1e4, sleep=slept)

            async def one(seed):
                async with allow(1e9, 1e9, lambda: clock[0]) as allowance:
                    await client(CHAT, seed=seed, schema=None)
                return allowance.used

            if wait == "minute":  # one after the other: time that passes during a wait counts for other calls
                return [await one(1), await one(2)]
            return await asyncio.gather(one(1), one(2))

    used = asyncio.run(run())
    monkeypatch.undo()
    assert sorted(used) == ([100, 200] if wait == "attempt" else [100, 100])
