"""The client against a scripted server: what is retried, what is not, and that no key ever leaves it."""

import asyncio
import json
import time

import pytest

from mapo_jax.config import RoleConfig
from mapo_jax.environment.allowance import allow
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.client import ATTEMPTS, Server
from mapo_jax.environment.live.limits import PerMinute, estimate_tokens

KEY = "sk-test-1234567890abcdef"
CHAT = [{"role": "user", "content": "Hello."}]


def call(server, times=1, key=KEY, seconds=6.0, schema=None, **settings):
    """Answers, or failures, of `times` calls at once; and what was told of the attempts."""
    attempts = []

    async def run():
        config = RoleConfig(url=server.url, model="m", **settings)
        async with Server(
            config, key=key, call_seconds=seconds, on_attempt=lambda *told: attempts.append(told)
        ) as client:
            calls = [client(CHAT, seed=i, schema=schema) for i in range(times)]
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run()), attempts


def test_an_answer_with_its_tokens_and_what_was_sent(serve):
    server = serve(lambda request, number: "Fine.")
    (answer,), attempts = call(server, extra_body={"top_k": 3}, temperature=0.5, max_tokens=7)
    assert answer == ("Fine.", 100, 20)
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
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": ["Me."]}}]},
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
    """Bytes that keep coming reset a read time-out; the limit is on the whole attempt."""
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
        async with Server(RoleConfig(url=server.url, model="m")) as client:
            return [(await client(CHAT, seed=i, schema={"type": "object"})).text for i in range(2)]

    assert asyncio.run(run()) == ["Gladly: {}", "{}"]
    first, second = server.requests
    assert "response_format" in first and first["messages"] == CHAT
    assert "response_format" not in second
    assert second["messages"][-1]["content"].endswith('JSON schema: {"type": "object"}')


def test_concurrency_is_bounded(serve):
    server = serve(lambda request, number: "Fine.", latency=0.05)

    async def run():
        async with Server(RoleConfig(url=server.url, model="m"), concurrency=3) as client:
            await asyncio.gather(*[client(CHAT, seed=i, schema=None) for i in range(12)])

    asyncio.run(run())
    assert server.count == 12 and server.most == 3


def test_requests_per_minute_hold_a_call_back(serve):
    server = serve(lambda request, number: "Fine.")

    async def run():
        async with Server(RoleConfig(url=server.url, model="m", requests_per_minute=2)) as client:
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
    assert answer.text == "so ?" and answer.text.encode()


def test_tokens_per_minute_count_what_was_really_used(serve):
    """Each call is estimated at 55.5 tokens and reports 120: 240 + 55.5 fits into 300, 360 does not."""
    server = serve(lambda request, number: "Fine.")

    async def run():
        config = RoleConfig(url=server.url, model="m", max_tokens=50, tokens_per_minute=300)
        async with Server(config) as client:
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


@pytest.mark.parametrize("wait", ["place", "attempt", "minute"])
def test_a_calls_time_is_that_of_its_attempts(serve, monkeypatch, wait):
    """On a clock that only the server's answers and our own sleeps move."""
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
        async with Server(config, concurrency=1) as client:
            if wait == "attempt":
                monkeypatch.setattr(asyncio, "sleep", slept)
            if wait == "minute":
                client._requests = PerMinute(1, clock=lambda: clock[0] / 1e4, sleep=slept)

            async def one(seed):
                async with allow(1e9, 1e9, lambda: clock[0]) as allowance:
                    await client(CHAT, seed=seed, schema=None)
                return allowance.used

            return await asyncio.gather(one(1), one(2))

    used = asyncio.run(run())
    monkeypatch.undo()
    assert sorted(used) == ([100, 200] if wait == "attempt" else [100, 100])
