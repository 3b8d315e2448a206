"""Shared by tests: third-party data where it is present, a scripted server, and a tiny model."""

import asyncio
import contextlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile more than they compute. Without LLVM's expensive passes they take a third less time, and with
# the older emitters of fused loops half of what is left. Every process that a test starts inherits this.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false",
)
# XLA's threads: a program of a test uses one core, so that the workers share them.
os.environ.setdefault("NPROC", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads a model

# Files that take a minute or more, the longest first. Each is one worker's work: begun last, it would keep a
# core waiting.
LONG_FILES = (
    "test_live_train.py",
    "test_hosts.py",
    "test_train.py",
    "test_scale.py",
    "test_engine.py",
    "test_benchmarks.py",
    "test_smollm2.py",
    "test_lab.py",
    "test_ahead.py",
    "test_estimators.py",
    "test_strategy_world.py",
)


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: some tests wait, for servers or processes that they have started."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """Long files first; the order within a file stays (pyproject.toml keeps xdist from reordering files)."""
    rank = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Third-party test data that is not part of the project; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MAPO_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"third-party test data not found at {folder} (set MAPO_SHARED_DATA)")
    return folder


@dataclass(frozen=True)
class Device:
    """What a mesh and a forecast ask of a device."""

    id: int = 0
    process_index: int = 0
    platform: str = "cpu"


@pytest.fixture(scope="session")
def absent_device() -> type[Device]:
    """Makes devices that are not here: (id, process_index, platform)."""
    return Device


# --- A server with every fault that a network has. ---

LEVELS = ("C_progress", "C_harm", "A_progress", "A_harm", "P_progress", "P_harm")
START = ("C1", "C2", "C3", "A1", "A2", "A3", "P1", "P2", "P3")


def judgement(*levels):
    """A well-formed judgement as text."""
    return json.dumps(
        {
            name: {"evidence": "words of the reply", "reason": "because", "level": level}
            for name, level in zip(LEVELS, levels, strict=True)
        }
    )


def completion(text, *, role="assistant", finish="stop", usage=True):
    """A chat completion as the protocol has it."""
    body = {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": role, "content": text}, "finish_reason": finish}],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return body


class ScriptedServer:
    """Answers POST /v1/chat/completions on a thread of its own.

    `answer(request, number)` returns what to do with the number-th request: text (a completion with it), a
    mapping (a body), or one of

        ("status", 429, {"retry-after": "0"})   an HTTP error
        ("close",)                               the connection is closed without an answer
        ("silence",)                             nothing at all, for a minute
        ("cut",)                                 half a body, announced whole
        ("json",)                                a body that is no JSON
        ("body", bytes, {"content-encoding": "gzip"})   a body as it is
        ("stall", seconds)                       headers at once, then silence, then the connection closes
    """

    def __init__(self, answer, *, latency=0.0):
        self.answer, self.latency = answer, latency
        self.requests, self.headers, self.faults = [], [], Counter()
        self.keep_requests = True
        self.count, self.under_way, self.most = 0, 0, 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _serve(self):
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())

    async def _main(self):
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()

    async def _talk(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._exchange(reader, writer):
                pass
        writer.close()

    async def _exchange(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        headers = dict(
            line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:] if ": " in line
        )
        body = await reader.readexactly(int(headers["content-length"]))
        request = json.loads(body)
        self.count += 1
        number = self.count
        if self.keep_requests:
            self.requests.append(request)
            self.headers.append(head.decode())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if self.latency:
                await asyncio.sleep(self.latency)
            return await self._respond(writer, self.answer(request, number))
        finally:
            self.under_way -= 1

    async def _respond(self, writer, what):
        if isinstance(what, str):
            what = completion(what)
        if isinstance(what, dict):
            await self._send(writer, 200, json.dumps(what).encode())
            return True
        self.faults[what[0] if what[0] != "status" else what[1]] += 1
        if what[0] == "status":
            text = what[3] if len(what) > 3 else "scripted"
            await self._send(writer, what[1], json.dumps({"error": {"message": text}}).encode(), what[2])
            return True
        if what[0] == "json":
            await self._send(writer, 200, b'{"id": "c1", "choi')
            return True
        if what[0] == "body":
            await self._send(writer, 200, what[1], what[2])
            return True
        if what[0] == "silence":
            await asyncio.sleep(60)
        if what[0] == "cut":
            whole = json.dumps(completion("x" * 400)).encode()
            await self._send(writer, 200, whole[:200], length=len(whole))
        if what[0] == "stall":
            await self._send(writer, 200, b"", length=100)
            await asyncio.sleep(what[1])
        return False

    async def _send(self, writer, status, body, extra=None, length=None):
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json"]
        lines += [f"content-length: {len(body) if length is None else length}"]
        lines += [f"{name}: {value}" for name, value in (extra or {}).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()


@pytest.fixture
def serve():
    """`serve(answer, latency=0)`: a scripted server that is stopped when the test ends."""
    servers = []

    def start(answer, **options):
        servers.append(ScriptedServer(answer, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def well_formed():
    """`well_formed(request)`: what a server would say that plays every role well, by the prompt's schema."""

    def answer(request, number=0):
        schema = (request.get("response_format") or {}).get("json_schema", {}).get("schema", {})
        names = set(schema.get("properties", ()))
        if "C_progress" in names:
            return judgement(1, 0, 1, 0, 0, 0)
        if "function" in names:
            return json.dumps(
                {"reason": "It goes on.", "function": "continue", "target": None, "guidance": "Go on."}
            )
        if "C1" in names:
            return json.dumps({n: {"evidence": "e", "reason": "r", "level": 2} for n in START})
        return f"I keep thinking about it, for the {number}th time. {time.monotonic_ns()}"

    return answer


@pytest.fixture(scope="session")
def judged():
    """`judged(*levels)`: a well-formed judgement as text."""
    return judgement


# --- A model that plays a role. ---


def write_speaking_model(folder, lines, texts):
    """A Qwen3 that answers every chat with one of its lines, at random, and nothing else.

    Its blocks add nothing, so the next token follows from the last one alone: behind the prompt's last token
    comes one of the lines, each of which is one token of the vocabulary, and behind a line <|im_end|>.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from mapo_jax.rollout.rows import ChatFormat
    from mapo_jax.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer

    tokenizer = train_tokenizer(texts, 2000, max_tokens=8192)
    tokenizer.add_tokens(list(lines))
    write_tokenizer(folder, tokenizer)
    chat = ChatFormat(load_tokenizer(folder))
    last = chat.prompt([{"role": "user", "content": "Hello."}])[-1]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        eos_token_id=chat.end_of_turn[0],
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = torch.nn.functional.normalize(torch.randn(config.vocab_size, 64), dim=1)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.zero_()
        for line in lines:
            token = tokenizer.convert_tokens_to_ids(line)
            model.lm_head.weight[token] = 8 * embedding[last]
            model.lm_head.weight[chat.end_of_turn[0]] += 8 * embedding[token]
    # Without this a server takes the likeliest token, whatever temperature it is asked for.
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def speaking_models(tmp_path_factory):
    """Folders of three small Qwen3 models that play user, judge and director, well-formed."""
    from mapo_jax.environment.live.judge import judge_messages
    from mapo_jax.environment.live.user import user_messages
    from mapo_jax.environment.scenario import load_scenarios

    cards = load_scenarios()[:4]
    texts = [m["content"] for card in cards for m in judge_messages(card, (), "Hm.", "Well.")]
    texts += [m["content"] for card in cards for m in user_messages(card, ())]
    lines = {
        "user": ["I lie awake at four.", "They never asked me.", "It is the quiet that gets me.",
                 "I counted the stairs again.", "My coffee goes cold.", "Nobody rings in the evening.",
                 "The letter is still closed.", "I wore the grey coat.", "It rained on the yard.",
                 "He took the old chair.", "I said it was fine.", "The lamp is still on."],
        "judge": [judgement(1, 0, 2, 0, 0, -1), judgement(0, -1, 1, 0, 2, 0)],
        "director": [json.dumps({"reason": "r", "function": "observe", "target": None, "guidance": "Wait."})],
    }  # fmt: skip
    return {
        role: write_speaking_model(tmp_path_factory.mktemp(role), said, texts) for role, said in lines.items()
    }


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny untrained Qwen3 with its tokenizer; eight devices can shard its width."""
    from mapo_jax.environment.scenario import load_scenarios
    from mapo_jax.model.huggingface import save_params, write_config
    from mapo_jax.model.qwen import QwenConfig, init_params
    from mapo_jax.tokenizer import train_tokenizer, write_tokenizer

    folder = tmp_path_factory.mktemp("model")
    texts = [line for card in load_scenarios() for stage in card.story.stages for line in stage.line]
    tokenizer = train_tokenizer(texts, 320, max_tokens=512)
    write_tokenizer(folder, tokenizer)
    config = QwenConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
    save_params(folder, init_params(config, seed=3), config, dtype="float32")
    write_config(folder, config)
    return folder


# --- A browser. ---

BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium; tests that need it skip where there is none."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        yield browser
        browser.close()
