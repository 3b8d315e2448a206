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
    settings = {"temperature": 0.0, "max_tokens": 9, "seed": 3, "retries": 0, "timeout": 5.0} | changes
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


def test_a_server_that_drips_is_given_up_in_bounded_time(monkeypatch):
    """Every byte comes in time, the answer never."""
    monkeypatch.setattr("mapo_jax.evaluation.endpoint.LONGEST_WAIT", 0.5)
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
    assert found == {} and url in error and "APIConnectionError" in error
    with pytest.raises(UserError, match="is the server up"):
        only_model(url)


def test_the_only_model_of_a_server(server):
    assert only_model(server.url) == "house-model"
