"""Serving: our server against its engine alone, and against `transformers serve` on the same folder.

    python benchmarks/serve.py [--rounds 3] [--json FILE] [--no-transformers] [--quick]

A Qwen3 of random parameters (hidden 256, 4 layers, 8/4 heads of 32, MLP 768, vocabulary 4,096), float32.
Throughput: 48 chats of one user message of about 50 tokens and a reply of up to 64 sampled tokens, 16 at
once, streamed over HTTP by one client; the engine alone gets the same rows, 16 at once. Time to first token:
1, 16 and 64 chats that are sent together.

The servers run in processes of their own, the client and the engine alone in this one, in turn, round after
round, so that other load slows all of them; a server that is not asked does nothing. Only ratios count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from mapo_jax.commands import prepare_jax
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.model.huggingface import save_params, write_config
from mapo_jax.model.qwen import QwenConfig, init_params
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Work:
    """What is measured."""

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 4096
    chats: int = 48
    streams: int = 16
    reply: int = 64  # tokens
    length: int = 512  # of the cache
    together: tuple[int, ...] = (1, 16, 64)


QUICK = Work(32, 2, 512, 8, 4, 8, 256, (1, 4))


def write_model(folder: Path, work: Work) -> None:
    """A folder that both servers read."""
    cards = load_scenarios()
    texts = [line for card in cards for stage in card.story.stages for line in (stage.telling, *stage.line)]
    texts += [card.situation for card in cards]
    write_tokenizer(folder, train_tokenizer(texts, work.vocabulary, max_tokens=work.length))
    config = QwenConfig(
        vocab_size=len(load_tokenizer(folder)),
        hidden_size=work.hidden,
        intermediate_size=3 * work.hidden,
        num_layers=work.layers,
        num_heads=work.hidden // 32,
        num_kv_heads=max(1, work.hidden // 64),
        head_dim=32,
        max_position_embeddings=work.length,
    )
    save_params(folder, init_params(config, seed=0), config, dtype="float32")
    write_config(folder, config)


def message(index: int) -> str:
    """The user's message of a chat; no two begin alike."""
    cards = load_scenarios()
    stages = cards[index % len(cards)].story.stages
    return " ".join(line for stage in stages[:2] for line in stage.line)


# --- The engine alone. ---


def engine_alone(folder: Path, work: Work) -> Callable[[], float]:
    """Tokens per second of the same rows on an engine of the server's settings, without a server."""
    from mapo_jax.config import load_config, updated
    from mapo_jax.running.policy import load_policy

    rollout = updated(load_config().rollout, {"max_reply_tokens": 1, "max_tokens": 2})
    policy, params = load_policy(folder, rollout)
    chat = ChatFormat(policy.tokenizer)
    engine = Engine(
        policy.config,
        slots=4 * work.streams,
        resident=work.streams,
        length=work.length,
        max_reply_tokens=work.length - 1,
        stop_ids=chat.stop_ids,
        vocabulary_size=chat.vocabulary_size,
        per_request=True,
        block=8,
    )
    engine.load(params, 0)
    engine.warm_up()
    rows = [chat.start(message(index)) for index in range(work.chats)]

    def run() -> float:
        engine.reset()
        started, sampled = time.perf_counter(), 0
        waiting, free = list(enumerate(rows)), list(range(work.streams))
        while waiting or engine.busy:
            while waiting and free:
                index, ids = waiting.pop(0)
                request = Request(free.pop(), ids, (index, 0, 0), 0, limit=work.reply, start=True)
                engine.submit(request)
            for slot, reply in engine.advance().items():
                sampled += len(reply.ids)
                free.append(slot)
        return sampled / (time.perf_counter() - started)

    return run


# --- Servers. ---


@contextmanager
def our_server(folder: Path, work: Work) -> Iterator[tuple[str, str]]:
    """(URL, model's name)."""
    options = ["--port", "0", "--streams", str(work.streams), "--max-tokens", str(work.length), "--name", "m"]
    command = [sys.executable, "-m", "mapo_jax.serve", "--model", str(folder), *options]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        printed = ""
        while not (url := re.search(r"API: (\S+)\)", printed)):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start: {printed}")
            printed += line
        yield url[1], "m"
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def transformers_server(folder: Path) -> Iterator[tuple[str, str]]:
    """(URL, model's name) of `transformers serve`."""
    command = shutil.which("transformers", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if command is None:
        raise RuntimeError("the command `transformers` is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [command, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(120):
            try:
                openai.OpenAI(base_url=url, api_key="none", max_retries=0).models.list()
                break
            except openai.OpenAIError:
                if process.poll() is not None:
                    raise RuntimeError("`transformers serve` did not start") from None
                time.sleep(1)
        yield url, str(folder)
    finally:
        process.terminate()
        process.wait(30)


async def chats(
    server: tuple[str, str], count: int, at_once: int, reply: int, offset: int = 0
) -> tuple[float, list[float]]:
    """Tokens per second, and the seconds to the first token of each chat."""
    url, name = server
    turn, firsts, sampled = asyncio.Semaphore(at_once), [], 0
    # Events are searched, not parsed: a client that takes much of the machine would be what is measured.
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(index: int) -> None:
            nonlocal sampled
            body = {
                "model": name,
                "messages": [{"role": "user", "content": message(offset + index)}],
                "max_tokens": reply,
                "temperature": 1.0,
                "seed": index,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            async with turn:
                started, first, events = time.perf_counter(), None, b""
                async with client.stream("POST", "/chat/completions", json=body) as answer:
                    answer.raise_for_status()
                    async for piece in answer.aiter_bytes():
                        events += piece
                        if first is None and re.search(rb'"content": ?"[^"]', events):
                            first = time.perf_counter() - started
                tokens = re.search(rb'"completion_tokens": ?(\d+)', events)
                sampled += int(tokens[1]) if tokens else reply
                firsts.append(time.perf_counter() - started if first is None else first)

        started = time.perf_counter()
        await asyncio.gather(*map(one, range(count)))
        return sampled / (time.perf_counter() - started), firsts


def measure(folder: Path, work: Work, rounds: int, transformers: bool, report: Callable[[str], None]) -> dict:
    """Runs everything in turn; returns what `--json` holds."""
    alone = engine_alone(folder, work)
    speeds: dict[str, list[float]] = {"server": [], "engine": [], "transformers": []}
    firsts: dict[str, dict[str, list[float]]] = {"server": {}, "transformers": {}}
    left_out = {} if transformers else {"transformers": "not asked for"}
    with our_server(folder, work) as ours:
        servers = {"server": ours}
        theirs = transformers_server(folder) if transformers else None
        try:
            if theirs is not None:
                servers["transformers"] = theirs.__enter__()
        except RuntimeError as error:
            left_out["transformers"], theirs = str(error), None
        try:
            for number in range(rounds + 1):  # the first only warms up
                speed = alone()
                if number:
                    speeds["engine"].append(speed)
                for name, server in servers.items():
                    speed, _ = asyncio.run(chats(server, work.chats, work.streams, work.reply))
                    if number:
                        speeds[name].append(speed)
                    for count in work.together:
                        offset = 1000 * number + 10 * count  # other messages, so that no start is known
                        _, seconds = asyncio.run(chats(server, count, count, work.reply // 4, offset))
                        if number:
                            firsts[name].setdefault(str(count), []).extend(seconds)
                report(f"round {number} of {rounds}" + ("" if number else ": warmed up"))
        finally:
            if theirs is not None:
                theirs.__exit__(None, None, None)
    ratio = {
        name: [mine / other for mine, other in zip(speeds["server"], values, strict=True)]
        for name, values in speeds.items()
        if values and name != "server"
    }
    return {
        "ratio": {name: statistics.median(values) for name, values in ratio.items()},
        "spread": {name: [min(values), max(values)] for name, values in ratio.items()},
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items() if values},
        "first_token_seconds": {
            name: {count: {"median": statistics.median(s), "most": max(s)} for count, s in values.items()}
            for name, values in firsts.items()
            if values
        },
        "left_out": left_out,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of measured rounds")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--no-transformers", action="store_true", help="without the other server")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few chats, to see that it runs"
    )
    options = parser.parse_args()
    prepare_jax()
    work = replace(QUICK) if options.quick else Work()
    with tempfile.TemporaryDirectory(prefix="mapo_jax.") as folder:
        write_model(Path(folder), work)
        result = measure(Path(folder), work, options.rounds, not options.no_transformers, print)
    for name, speed in result["tokens_per_second"].items():
        print(f"{name}: {speed:,.0f} tokens/s")
    for name, value in result["ratio"].items():
        low, high = result["spread"][name]
        print(f"server / {name}: {value:.2f} ({low:.2f} to {high:.2f})")
    for name, counts in result["first_token_seconds"].items():
        for count, seconds in counts.items():
            median, most = seconds["median"], seconds["most"]
            print(f"{name}, {count} together: first token after {median:.3f} s (most {most:.3f})")
    for name, reason in result["left_out"].items():
        print(f"left out: {name} ({reason})")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
