import contextlib
import socket
import threading
import time

import pytest

from mapo_jax.errors import UserError
from mapo_jax.evaluation.answers import Prompt
from mapo_jax.evaluation.endpoint import PATIENCE, Endpoint, only_model

PROMPTS = [Prompt(f"p{i}", f"number {i}", {"id": i}) for i in range(12)]


def endpoint(url, **changes):
    settings = {"temperature": 0.0, "max_tokens": 9, "seed": 3, "retries": 0, "timeout": 60.0} | changes
    return Endpoint(url, "house-model", **settings)


def collect(endpoint, prompts=PROMPTS):
    found = {}
    try:
        endpoint.answer(prompts, lambda prompt, answer: found.__setitem__(prompt.id, answer.text))
    except UserError as error:
        return found, str(error)
    return found, None


def test_every_prompt_gets_its_own_answer(server):
    server.reply = lambda request: f"you said {request['messages'][-1]['content']}"
    found, error = collect(endpoint(server.url))
    assert error is None
    assert found == {f"p{i}": f"you said number {i}" for i in range(12)}
    assert {request["model"] for request in server.requests} == {"house-model"}
    assert {request["max_tokens"] for request in server.requests} == {9}
    assert "seed" not in server.requests[0]  # greedy needs none
    collect(endpoint(server.url, temperature=0.7))
    seeds = [request["seed"] for request in server.requests[12:]]
    assert len(set(seeds)) == 12 and server.requests[-1]["temperature"] == 0.7


def test_no_more_calls_at_once_than_asked_for(server):
    now, most, lock = 0, 0, threading.Lock()

    def reply(request):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return "fine"

    server.reply = reply
    collect(endpoint(server.url, concurrency=3))
    assert most == 3


def test_a_failure_costs_one_answer_and_is_told_at_the_end(server):
    server.reply = lambda request: 400 if request["messages"][-1]["content"] == "number 5" else "fine"
    found, error = collect(endpoint(server.url, concurrency=2))
    assert found.keys() == {prompt.id for prompt in PROMPTS} - {"p5"}
    assert "failed 1 calls to house-model" in error and "told to fail" in error


def test_passing_trouble_is_tried_again(server):
    tries = []

    def reply(request):
        tries.append(request)
        return 503 if len(tries) == 1 else "fine"

    server.reply = reply
    found, error = collect(endpoint(server.url, retries=2), PROMPTS[:1])
    assert found == {"p0": "fine"} and error is None and len(tries) == 2


def test_a_server_that_always_fails_is_given_up_soon(server):
    server.reply = lambda request: 500
    found, error = collect(endpoint(server.url, concurrency=1))
    assert found == {} and f"failed {PATIENCE} calls" in error
    server.requests.clear()
    server.reply = lambda request: 401
    collect(endpoint(server.url, concurrency=1))
    assert len(server.requests) == 1  # a wrong key gets no better


def test_a_server_that_hangs_is_given_up_in_bounded_time(server):
    server.reply = lambda request: time.sleep(3) or "late"
    began = time.monotonic()
    _, error = collect(endpoint(server.url, timeout=0.2, concurrency=4))
    assert "Timeout" in error
    assert time.monotonic() - began < 2.5


def test_a_server_that_drips_is_given_up_in_bounded_time():
    """Every byte comes in time, the answer never."""
    over = threading.Event()

    def drip(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
            )
            while not over.wait(0.1):
                connection.sendall(b" ")

    def listen():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=listen, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        began = time.monotonic()
        _, error = collect(endpoint(url, timeout=0.5, concurrency=5))
        over.set()
    assert "TimeoutError" in error and time.monotonic() - began < 10


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_down_is_named():
    url = f"http://127.0.0.1:{free_port()}/v1"
    found, error = collect(endpoint(url))
    assert found == {} and url in error and "the connection was refused" in error
    with pytest.raises(UserError, match="is the server up"):
        only_model(url)


def test_the_only_model_of_a_server(server):
    assert only_model(server.url) == "house-model"


@pytest.mark.parametrize(
    "models",
    [b"<html>Welcome</html>", [], [{"id": "m"}], {}, {"data": {"id": "m"}}, {"data": [{}]}, {"data": [5]},
     {"data": [{"id": 5}]}, {"data": None}, "m", None],
)  # fmt: skip
def test_what_is_no_list_of_models_is_the_sentence_about_v1(server, models):
    server.models = models
    with pytest.raises(UserError, match=r"does not say which models .* end with /v1\? Name one with"):
        only_model(server.url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:x/v1", "http://[::1/v1"])
def test_what_is_no_url_is_one_sentence(url):
    for ask in (lambda: only_model(url), lambda: endpoint(url).answer(PROMPTS, lambda *_: None)):
        with pytest.raises(UserError, match="is no URL of a server"):
            ask()


@pytest.mark.parametrize("end", ["\n", "\r", " ", "\u201d", "\u00e9", "\x7f"])
def test_a_key_that_cannot_be_one_is_named_and_never_sent(server, monkeypatch, end):
    monkeypatch.setenv("OPENAI_API_KEY", f"sk-test-1234567890{end}")
    for ask in (
        lambda: only_model(server.url),
        lambda: endpoint(server.url).answer(PROMPTS, lambda *_: None),
    ):
        with pytest.raises(UserError, match="the key in OPENAI_API_KEY holds") as caught:
            ask()
        assert "sk-" not in str(caught.value)
    assert server.requests == []


def test_a_key_that_the_server_echoes_is_neither_printed_nor_saved(server, monkeypatch):
    key = "sk-test-1234567890abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    escaped = "".join(f"\\u{ord(character):04x}" for character in key)
    server.reply = lambda request: f"You sent {key}, {escaped} and {key[:7]}****{key[-4:]}."
    found, error = collect(endpoint(server.url))
    assert server.headers[0]["Authorization"] == f"Bearer {key}"
    assert error is None and set(found.values()) == {"You sent [key], [key] and [key]"}
    server.reply, server.complaint = (lambda request: 401), f"no such key: {key} {escaped}"
    _, error = collect(endpoint(server.url))
    assert "no such key: [key] [key]" in error
    server.models = {"data": [{"id": f"a{key}"}, {"id": f"b{escaped}"}]}
    with pytest.raises(UserError, match=r"offers a\[key\], b\[key\]; use"):
        only_model(server.url)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "One, "}, {"type": "text", "text": "two."}], "One, two."),
        ([{"type": "thinking", "thinking": ["Hm."]}, {"type": "text", "text": "Yes."}], "Yes."),
        ("half \ud83d", "half \ufffd"),
        ("whole \ud83d\ude00", "whole \U0001f600"),
        ("", ""),
    ],
)  # fmt: skip
def test_contents_that_hold_text_are_answers(server, content, text):
    server.reply = lambda request: content
    found, error = collect(endpoint(server.url), PROMPTS[:1])
    assert (found, error) == ({"p0": text}, None) and found["p0"].encode() is not None


@pytest.mark.parametrize(
    "message",
    [
        {"content": None},
        {"content": None, "reasoning_content": "Hm."},
        {"content": "", "reasoning": "Hm."},
        {"content": [{"type": "thinking", "thinking": "Hm."}]},
    ],
)
def test_a_completion_without_text_is_no_answer_and_no_failed_call(server, message):
    server.reply = lambda request: message
    found, error = collect(endpoint(server.url))
    assert found == {prompt.id: None for prompt in PROMPTS} and error is None


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"content": [{"type": "image_url", "image_url": {}}]}, "content is no text"),
        ({"content": [{"type": "text"}]}, "content is no text"),
        ({"content": [{"type": "text", "text": 5}]}, "content is no text"),
        ({"content": {"type": "text", "text": "Me."}}, "content is no text"),
        ({"content": 5}, "content is no text"),
        ({"content": True}, "content is no text"),
    ],
)
def test_contents_that_are_no_text_are_failed_calls(server, message, why):
    server.reply = lambda request: message
    found, error = collect(endpoint(server.url), PROMPTS[:1])
    assert found == {} and "failed 1 calls" in error and why in error


def test_more_connections_than_the_process_may_open_are_one_sentence(server, monkeypatch):
    limits = [(300, 300)]
    monkeypatch.setattr("resource.getrlimit", lambda which: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda which, pair: limits.append(pair))
    with pytest.raises(UserError, match=r"`--concurrency` allows for 256 connections.* may open 300; lower"):
        endpoint(server.url, concurrency=256).answer(PROMPTS, lambda *_: None)
    assert server.requests == []
    limits.append((300, 4096))
    assert collect(endpoint(server.url, concurrency=256))[1] is None
    soft, hard = limits[-1]
    assert 300 < soft < 1000 and hard == 4096  # raised, and no further than it must
