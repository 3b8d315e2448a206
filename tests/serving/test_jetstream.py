"""JetStream's own client stub against our engine behind its orchestrator.

Run with `pytest -m peer tests/serving/test_jetstream.py`; needs requirements-jetstream.txt.
"""

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import pytest

from mapo_jax.rollout.requests import Request
from mapo_jax.serving.limits import WRONG_KEYS_PER_MINUTE, Limits

pytestmark = pytest.mark.peer
grpc = pytest.importorskip("grpc", reason="pip install -r requirements-jetstream.txt")
LEVEL, HANDLERS = logging.getLogger().level, logging.getLogger().handlers[:]
pytest.importorskip("jetstream.core", reason="pip install -r requirements-jetstream.txt")

from jetstream.core.proto.jetstream_pb2 import DecodeRequest, HealthCheckRequest  # noqa: E402
from jetstream.core.proto.jetstream_pb2_grpc import OrchestratorStub  # noqa: E402

from mapo_jax.serving import jetstream  # noqa: E402
from mapo_jax.serving.served import ServedModel  # noqa: E402

TEXTS = [f"Hello, it is me, number {number}. I am 累了 😀." for number in range(12)]


@pytest.fixture
def running(tiny):
    """`running(key=..., limits=...)`: the stub of a server with four slots."""
    loop, stack = asyncio.new_event_loop(), AsyncExitStack()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    def start(key=None, limits=Limits()):  # noqa: B008
        tiny[0].reset()
        served = ServedModel("tiny", *tiny, source="tests", reply_tokens=16)
        context = jetstream.running(served, limits, key, "127.0.0.1:0")
        server, port = run(stack.enter_async_context(context))
        stack.push_async_callback(server.stop, 30)
        return OrchestratorStub(grpc.insecure_channel(f"127.0.0.1:{port}"))

    yield start
    run(stack.aclose())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)


def ask(stub, text=None, ids=None, max_tokens=12, **options):
    if text is not None:
        content = {"text_content": DecodeRequest.TextContent(text=text)}
    else:
        content = {"token_content": DecodeRequest.TokenContent(token_ids=ids)}
    metadata = options.pop("metadata", None)
    request = DecodeRequest(max_tokens=max_tokens, **content, **options)
    answers = stub.Decode(request, metadata=metadata, timeout=60)
    return [answer.stream_content.samples[0] for answer in answers]


def told(samples):
    """(ids, text) of a reply."""
    return tuple(i for s in samples for i in s.token_ids), "".join(s.text for s in samples)


def alone(tiny, ids, limit=12):
    """What the engine samples by itself, without the token that ends it."""
    engine, chat = tiny
    request = Request(0, ids, key=(0, 0, 0), turn=0, limit=limit, start=True, sampling=jetstream.GREEDY)
    (reply,) = engine.reply([request])
    return tuple(i for i in reply.ids if i not in chat.stop_ids)


def test_twelve_requests_over_four_slots_are_the_engines(running, tiny):
    """At once, of different lengths; the texts are whole characters."""
    limits = [4 + number for number in range(12)]
    chat = tiny[1]
    wanted = [alone(tiny, chat.start(text), limit) for text, limit in zip(TEXTS, limits, strict=True)]
    stub = running()
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda text, most: told(ask(stub, text, max_tokens=most)), TEXTS, limits))
    assert answers == [(ids, chat.decode(ids)) for ids in wanted]
    assert len(set(wanted)) > 6


def test_a_row_of_ids_is_taken_as_it_is(running, tiny):
    """No BOS, no text in the answer; it comes token by token; a second request in a slot that was used."""
    ids = tiny[1].start("Hello.")
    wanted, stub = alone(tiny, ids), running()
    for _ in range(5):
        samples = ask(stub, ids=ids)
        assert told(samples) == (wanted, "")
    assert max(len(sample.token_ids) for sample in samples) == 1 and len(samples) > 8
    assert stub.HealthCheck(HealthCheckRequest()).is_live


def test_a_reply_ends_with_the_cache(running, tiny):
    length = tiny[0].length
    ids = (tiny[1].start("Hello, it is me. ") * length)[: length - 3]
    assert len(told(ask(running(), ids=ids, max_tokens=99))[0]) <= 3


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (dict(text="word " * 400), "INVALID_ARGUMENT"),
        (dict(ids=[]), "INVALID_ARGUMENT"),
        (dict(ids=[1, 10**6]), "INVALID_ARGUMENT"),
        (dict(ids=[-1]), "INVALID_ARGUMENT"),
        (dict(text="Hello.", max_tokens=-1), "INVALID_ARGUMENT"),
        (dict(text="Hello.", session_cache="a"), "INVALID_ARGUMENT"),
        (dict(text="Hello.", priority=1), "INVALID_ARGUMENT"),
        (dict(text="x" * 2000), "RESOURCE_EXHAUSTED"),
    ],
)
def test_what_cannot_be_answered_is_refused(running, options, code):
    """It is neither cut in silence nor the end of the server."""
    stub = running(limits=Limits(body_bytes=1000 if code == "RESOURCE_EXHAUSTED" else 2**20))
    with pytest.raises(grpc.RpcError) as caught:
        ask(stub, **options)
    assert caught.value.code().name == code
    assert told(ask(stub, "Hello."))[0]


def test_a_full_server_refuses(running):
    with pytest.raises(grpc.RpcError) as caught, ThreadPoolExecutor(12) as pool:
        stub = running(limits=Limits(waiting=0))
        list(pool.map(lambda text: ask(stub, text, max_tokens=200), TEXTS))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_key(running):
    stub = running(key="secret-1")

    def refused(metadata):
        with pytest.raises(grpc.RpcError) as caught:
            ask(stub, "Hello.", metadata=metadata)
        return caught.value.code()

    wrong, right = [("authorization", "Bearer secret-2")], [("authorization", "Bearer secret-1")]
    for metadata in (None, wrong):
        assert refused(metadata) is grpc.StatusCode.UNAUTHENTICATED
    assert ask(stub, "Hello.", metadata=right)
    for _ in range(WRONG_KEYS_PER_MINUTE):
        refused(wrong)
    assert refused(right) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_import_leaves_the_log_alone():
    """JetStream's sets the root logger to DEBUG and adds a handler."""
    code = (
        "import logging; import mapo_jax.serving.jetstream; root = logging.getLogger();"
        "print(root.level, root.handlers)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "30 []\n"


def test_the_command_and_its_end(model_folder):
    """A signal in the middle of a reply: it is sent to its end, and the status is 0."""
    command = [sys.executable, "-m", "mapo_jax.serve", "--model", str(model_folder), "--port", "0"]
    command += ["--protocol", "jetstream", "--streams", "2", "--max-tokens", "256"]
    refused = subprocess.run([*command, "--conversations", "x"], capture_output=True, text=True)
    assert refused.returncode == 2 and "--conversations has no effect" in refused.stderr
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        printed = ""
        while not (address := re.search(r"at (\S+:\d+)", printed)):
            line = process.stdout.readline()
            assert line, printed
            printed += line
        stub = OrchestratorStub(grpc.insecure_channel(address[1]))
        content = DecodeRequest.TextContent(text="Hello.")
        answers = stub.Decode(DecodeRequest(text_content=content, max_tokens=150), timeout=60)
        first = next(answers).stream_content.samples[0]
        process.send_signal(signal.SIGTERM)
        ids = [*first.token_ids, *(i for a in answers for i in a.stream_content.samples[0].token_ids)]
        assert len(ids) > 8 and process.wait(60) == 0
        assert "every reply under way was sent" in process.stdout.read()
    finally:
        process.kill()
