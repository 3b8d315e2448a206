"""A server under many requests, some of them rude: nothing leaks, nothing mixes, nothing stays behind.

    python benchmarks/soak.py [--requests 10000] [--json FILE]

A tiny model on `python -m mapo_jax.serve` with 16 streams. Of the requests 5 % go away in the middle of their
reply, 5 % are malformed and 1 % read slowly. Every request carries one of 50 markers and a seed, so that its
reply is known: whatever else arrives is a token of another stream. At the end all slots must be free, and the
server's memory must not have grown by more than 10 % since the first fifth. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.model.huggingface import save_params, write_config
from mapo_jax.model.qwen import QwenConfig, init_params
from mapo_jax.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MARKERS, STREAMS, AT_ONCE, REPLY = 50, 16, 48, 24
DISCONNECTS, MALFORMED, SLOW = 0.05, 0.05, 0.01
GROWTH = 0.10  # of memory, allowed after the first fifth


def write_model(folder: Path) -> None:
    texts = [line for card in load_scenarios() for stage in card.story.stages for line in stage.line]
    write_tokenizer(folder, train_tokenizer(texts, 320, max_tokens=256))
    config = QwenConfig(
        vocab_size=len(load_tokenizer(folder)),
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )
    save_params(folder, init_params(config, seed=1), config, dtype="float32")
    write_config(folder, config)


def request(marker: int, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"My marker is {marker}."}]
    body = {"model": "m", "messages": messages, "seed": marker, "max_completion_tokens": REPLY}
    return body | {"stream": True} | options


def text_of(line: str) -> str:
    """What a line of a stream adds to the reply."""
    if not line.startswith("data: {"):
        return ""
    return "".join(choice["delta"].get("content", "") for choice in json.loads(line[6:])["choices"])


async def soak(url: str, pid: int, count: int, report: Any) -> dict[str, Any]:
    """Sends `count` requests; returns the figures and what failed."""
    rng = random.Random(0)
    problems: list[str] = []
    seconds: list[float] = []
    memory: list[int] = []
    done = 0
    turn = asyncio.Semaphore(AT_ONCE)

    async with httpx2.AsyncClient(
        base_url=url, timeout=120, limits=httpx2.Limits(max_connections=None)
    ) as client:

        async def reply(marker: int, pause: float = 0.0) -> str:
            text = ""
            async with client.stream("POST", "/v1/chat/completions", json=request(marker)) as answer:
                async for line in answer.aiter_lines():
                    text += text_of(line)
                    await asyncio.sleep(pause)
            return text

        known = [await reply(marker) for marker in range(MARKERS)]

        async def one(kind: float, marker: int, after: int) -> None:
            nonlocal done
            async with turn:
                started = time.perf_counter()
                if kind < DISCONNECTS:
                    async with client.stream("POST", "/v1/chat/completions", json=request(marker)) as answer:
                        lines = answer.aiter_lines()
                        for _ in range(after):
                            await anext(lines, None)
                elif kind < DISCONNECTS + MALFORMED:
                    wrong = [b"{", b'{"model": "m"}', json.dumps(request(marker, top_p=5)).encode()][
                        after % 3
                    ]
                    headers = {"content-type": "application/json"}
                    answer = await client.post("/v1/chat/completions", content=wrong, headers=headers)
                    if answer.status_code != 400 or "error" not in answer.json():
                        problems.append(f"a malformed request got {answer.status_code}")
                else:
                    slow = kind < DISCONNECTS + MALFORMED + SLOW
                    text = await reply(marker, 0.05 if slow else 0.0)
                    if text != known[marker]:
                        problems.append(f"marker {marker} got {text!r}, not {known[marker]!r}")
                    if not slow:
                        seconds.append(time.perf_counter() - started)
                done += 1
                if done % max(1, count // 20) == 0:
                    status = Path(f"/proc/{pid}/status").read_text()
                    memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))
                    report(f"{done} of {count}, {memory[-1] // 1024} MiB")

        await asyncio.gather(
            *(one(rng.random(), rng.randrange(MARKERS), rng.randrange(1, 6)) for _ in range(count))
        )
        for _ in range(200):
            metrics = (await client.get("/metrics")).text
            left = [
                re.search(rf"^{name} (\S+)", metrics, re.M)[1] for name in ("mapo_slots_in_use", "mapo_queue")
            ]
            if left == ["0.0", "0.0"]:
                break
            await asyncio.sleep(0.05)
        else:
            problems.append(f"slots in use and queue at the end: {left}")
    if len(set(known)) < MARKERS:
        problems.append("two markers have one reply; they cannot be told apart")
    early, late = memory[len(memory) // 5], memory[-1]
    if late > (1 + GROWTH) * early:
        problems.append(f"memory grew from {early} to {late} KiB")
    hundredths = statistics.quantiles(seconds, n=100)
    return {
        "requests": count,
        "problems": problems[:20],
        "memory_kib": {"early": early, "late": late},
        "seconds": {"median": statistics.median(seconds), "p99": hundredths[98], "most": max(seconds)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mapo_jax.") as folder:
        model, kept = Path(folder) / "m", Path(folder) / "kept"
        model.mkdir()
        write_model(model)
        command = [sys.executable, "-m", "mapo_jax.serve", "--model", str(model), "--port", "0"]
        command += ["--streams", str(STREAMS), "--max-tokens", "256", "--conversations", str(kept)]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            printed = ""
            while not (url := re.search(r"(http://\S+)/ \(API", printed)):
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"the server did not start: {printed}")
                printed += line
            result = asyncio.run(soak(url[1], process.pid, options.requests, print))
        finally:
            process.terminate()
            status = process.wait(60)
        lines = [line for file in kept.iterdir() for line in file.read_bytes().splitlines()]
        for line in lines:
            json.loads(line)
        result |= {"kept_lines": len(lines), "status": status}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["problems"] or status else 0


if __name__ == "__main__":
    raise SystemExit(main())
