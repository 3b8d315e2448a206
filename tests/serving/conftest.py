"""A server on a thread of its own, over one tiny engine that all tests share."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn", reason="pip install -r requirements-serve.txt")

STREAMS, LENGTH = 4, 256


def make_engine(model_folder):
    import jax

    from mapo_jax.config import load_config, updated
    from mapo_jax.rollout.engine import Engine
    from mapo_jax.running.policy import load_policy

    rollout = updated(load_config().rollout, {"max_reply_tokens": 1, "max_tokens": 2})
    policy, params = load_policy(model_folder, rollout)
    # Weights large enough for distributions with a shape.
    params = jax.tree.map(lambda leaf: 12 * leaf if leaf.std() > 0 else leaf, params)
    engine = Engine(
        policy.config,
        slots=2 * STREAMS,
        resident=STREAMS,
        length=LENGTH,
        max_reply_tokens=LENGTH - 1,
        stop_ids=policy.chat.stop_ids,
        vocabulary_size=policy.chat.vocabulary_size,
        per_request=True,
        block=4,
    )
    engine.load(params, 0)
    engine.warm_up()
    return engine, policy.chat


@pytest.fixture(scope="session")
def tiny(model_folder):
    """(engine, chat format)."""
    return make_engine(model_folder)


@contextmanager
def running(service, hosts=(), **options):
    """Serves on a free port of this machine until the context ends."""
    import uvicorn

    from mapo_jax.serving.app import make_app

    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # so that a slow reader is felt
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(service, hosts=hosts), log_level="error", lifespan="off", **options)
    server = uvicorn.Server(config)
    server.capture_signals = None  # only the main thread has signals
    thread = threading.Thread(target=lambda: asyncio.run(server._serve([listening])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        yield SimpleNamespace(
            url=url, service=service, model=next(iter(service.models.values())), server=server
        )
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def serving(tiny):
    """`serving(**options of Service)`: a server with an empty engine, stopped when the test ends."""
    from contextlib import ExitStack

    from mapo_jax.serving.app import Service
    from mapo_jax.serving.served import ServedModel

    with ExitStack() as stack:

        def start(engine=tiny[0], hosts=(), reply_tokens=16, **options):
            engine.reset()
            model = ServedModel("tiny", engine, tiny[1], source="tests", reply_tokens=reply_tokens)
            return stack.enter_context(running(Service({"tiny": model}, **options), hosts))

        yield start


@pytest.fixture
def server(serving):
    """A server with default settings."""
    return serving()


@pytest.fixture
def client(server):
    """The real client of OpenAI."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def settled():
    """`settled(model)`: waits until no slot is in use."""

    def wait(model, seconds=20):
        end = time.monotonic() + seconds
        while model.running or model.waiting or model.users or len(model._free) < model.engine.slots:
            assert time.monotonic() < end, "slots are still in use"
            time.sleep(0.01)

    return wait
