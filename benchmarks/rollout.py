"""Multi-turn rollout: our engine against transformers and Tunix, and against its own lock-step batch.

    python benchmarks/rollout.py [--rounds 3] [--peers transformers tunix] [--json FILE]

Reference work: a Qwen3 of 4.2 M random parameters (hidden 256, 4 layers, 8/4 heads of 32, MLP 768,
vocabulary 4,096), float32; 32 dialogues of 6 turns, a first prompt of 64 tokens, user turns of 24, replies of
exactly 32 sampled tokens. Ragged work: 64 dialogues of 2 to 8 turns with replies of 8 to 32 tokens, whose
users answer at once or after 200 ms. All that is compared runs in turn, round after round, in one run of this
program, so that a busy machine slows all of it down; what counts are the ratios. A peer that cannot be had is
left out by name.

transformers runs with torch on the CPU (`pip install torch`), with its cache kept from turn to turn and
starting over at every turn; Tunix is installed into an environment of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mapo_jax.model.huggingface import save_params, write_config
from mapo_jax.model.qwen import QwenConfig, init_params, parameter_count
from mapo_jax.rollout.desk import Desk
from mapo_jax.rollout.engine import Engine, Request

SHAPE = QwenConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    max_position_embeddings=1024,
)
DIALOGUES, TURNS, FIRST, USER, REPLY = 32, 6, 64, 24, 32
RAGGED, LANES, LATENCY = 64, 16, 0.2
LENGTH = FIRST + TURNS * REPLY + (TURNS - 1) * USER


def tokens(seed: int, size: int) -> list[int]:
    return np.random.default_rng(seed).integers(8, SHAPE.vocab_size, size).tolist()


def make_engine(params, **options) -> Engine:
    """Without stop ids, so that every reply has its full length; compiled."""
    settings = dict(length=LENGTH, max_reply_tokens=REPLY, stop_ids=(), vocabulary_size=SHAPE.vocab_size)
    engine = Engine(SHAPE, **(settings | options))
    engine.load(params, 0)
    engine.warm_up()
    return engine


# --- The reference work. ---


def reference(engine: Engine) -> int:
    """Sampled tokens of our engine."""
    engine.reset()
    for turn in range(TURNS):
        engine.reply(
            [
                Request(d, tokens(100 * d + turn, USER if turn else FIRST), (1, 1, d), turn, start=turn == 0)
                for d in range(DIALOGUES)
            ]
        )
    return DIALOGUES * TURNS * REPLY


def transformers_peer(folder: Path) -> dict[str, Callable[[], int]]:
    """transformers + torch, with its cache kept between turns and without."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = dict(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=REPLY,
        min_new_tokens=REPLY,
        eos_token_id=None,
        pad_token_id=0,
    )

    def run(keep: bool) -> int:
        cache, row = DynamicCache() if keep else None, torch.zeros((DIALOGUES, 0), dtype=torch.long)
        for turn in range(TURNS):
            new = [tokens(100 * d + turn, USER if turn else FIRST) for d in range(DIALOGUES)]
            row = torch.cat([row, torch.tensor(new)], dim=1)
            with torch.inference_mode():
                row = model.generate(
                    row, attention_mask=torch.ones_like(row), past_key_values=cache, **options
                )
        assert row.shape[1] == LENGTH
        return DIALOGUES * TURNS * REPLY

    return {"transformers_cached": lambda: run(True), "transformers_reprefill": lambda: run(False)}


def tunix_peer(folder: Path) -> dict[str, Callable[[], int]]:
    """Tunix's sampler, in a process and an environment of its own (kept in the cache folder)."""
    environment = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mapo_jax" / "peers" / "tunix"
    )
    python = environment / "bin" / "python"
    if (
        subprocess.run([python, "-c", "import tunix"], capture_output=True).returncode
        if python.exists()
        else 1
    ):
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "google-tunix"], check=True, timeout=900)
    users = [
        [tokens(100 * d + turn, USER if turn else FIRST) for d in range(DIALOGUES)] for turn in range(TURNS)
    ]
    work = {
        "shape": asdict(SHAPE),
        "dialogues": DIALOGUES,
        "turns": TURNS,
        "reply": REPLY,
        "length": LENGTH,
        "users": users,
        "ends": [FIRST + (turn + 1) * REPLY + turn * USER for turn in range(TURNS)],
    }
    script = Path(__file__).parent / "peers" / "tunix_rollout.py"
    process = subprocess.Popen(
        [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    atexit.register(process.kill)

    def say(line: str) -> str:
        process.stdin.write(line + "\n")
        answer = process.stdout.readline().strip()
        if not answer:
            raise RuntimeError("its process has ended")
        return answer

    say(json.dumps(work))
    say("run")  # compiles, and shows whether it works at all
    return {"tunix": lambda: int(say("run"))}


# --- The ragged work. ---


def ragged_dialogues() -> list[list[tuple[int, int]]]:
    """For each dialogue (tokens of the user, tokens of the reply) of each turn."""
    numbers = np.random.default_rng(0)
    dialogues = []
    for _ in range(RAGGED):
        turns = int(numbers.integers(2, 9))
        dialogues.append(
            [
                (int(numbers.integers(16, USER + 9)) if t else FIRST, int(numbers.integers(8, 33)))
                for t in range(turns)
            ]
        )
    return dialogues


def ragged_request(dialogue: int, turn: int, sizes: tuple[int, int]) -> Request:
    ids = tokens(10_000 + 100 * dialogue + turn, sizes[0])
    return Request(dialogue, ids, (2, 1, dialogue), turn, limit=sizes[1], start=turn == 0)


def lockstep(engine: Engine, latency: float) -> int:
    """All dialogues take their turns together, and all wait for the slowest reply and the slowest user."""
    engine.reset()
    dialogues, sampled = ragged_dialogues(), 0
    for turn in range(max(map(len, dialogues))):
        going = [d for d in range(RAGGED) if turn < len(dialogues[d])]
        replies = engine.reply([ragged_request(d, turn, dialogues[d][turn]) for d in going])
        sampled += sum(len(reply.ids) for reply in replies)
        time.sleep(latency)
    return sampled


def continuous(engine: Engine, latency: float) -> int:
    """Every dialogue goes on as soon as its user has answered."""
    engine.reset()
    dialogues = ragged_dialogues()

    async def hold(desk: Desk, d: int) -> int:
        sampled = 0
        for turn, sizes in enumerate(dialogues[d]):
            sampled += len((await desk.reply(ragged_request(d, turn, sizes))).ids)
            if latency:
                await asyncio.sleep(latency)
        return sampled

    async def run() -> int:
        desk = Desk(engine)
        serving = asyncio.ensure_future(desk.serve())
        sampled = await asyncio.gather(*(hold(desk, d) for d in range(RAGGED)))
        serving.cancel()
        return sum(sampled)

    return asyncio.run(run())


# --- The run. ---


def measure(work: dict[str, Callable[[], int]], rounds: int, console: Console) -> dict[str, list[float]]:
    """Tokens per second of each piece of work, in turn, `rounds` times after one that warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            started = time.perf_counter()
            speed = run() / (time.perf_counter() - started)
            if number:
                speeds[name].append(speed)
        console.print(f"round {number} of {rounds}" + (" done" if number else ": warmed up"))
    return speeds


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Of each round, so that what slows the machine down for a while does not count."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--peers", nargs="*", default=["transformers", "tunix"], help="which to compare with")
    parser.add_argument("--json", type=Path, help="file for the ratios")
    options = parser.parse_args()
    console = Console(highlight=False)
    console.print(f"Qwen3 of {parameter_count(SHAPE):,} parameters on {jax.devices()[0].device_kind}")
    params = init_params(SHAPE, seed=0)
    work: dict[str, Callable[[], int]] = {}
    engine = make_engine(params, slots=DIALOGUES, block=REPLY)
    work["reference"] = lambda: reference(engine)
    with tempfile.TemporaryDirectory() as folder:
        save_params(folder, params, SHAPE, dtype="float32")
        write_config(folder, SHAPE)
        for name, peer in (("transformers", transformers_peer), ("tunix", tunix_peer)):
            if name not in options.peers:
                continue
            try:
                work |= peer(Path(folder))
            except Exception as error:
                console.print(f"left out: {name} ({type(error).__name__}: {error})", markup=False)
        wide = make_engine(params, slots=RAGGED, block=REPLY)
        lanes = make_engine(params, slots=RAGGED, lanes=LANES)
        work["lockstep_ragged"] = lambda: lockstep(wide, 0)
        work["ragged"] = lambda: continuous(lanes, 0)
        work["ragged_latency"] = lambda: continuous(lanes, LATENCY)
        work["lockstep_latency"] = lambda: lockstep(wide, LATENCY)
        speeds = measure(work, options.rounds, console)

    table = Table(title="sampled tokens per second", title_justify="left")
    for heading in ("work", "median", "least", "most"):
        table.add_column(heading, justify="left" if heading == "work" else "right")
    for name, values in speeds.items():
        table.add_row(name, *(f"{f(values):,.0f}" for f in (statistics.median, min, max)))
    console.print(table)
    compared = {
        name: ratios(speeds["reference"], speeds[name])
        for name in ("transformers_cached", "transformers_reprefill", "tunix")
        if name in speeds
    }
    compared["lockstep_ragged"] = ratios(speeds["ragged"], speeds["lockstep_ragged"])
    compared["latency"] = ratios(speeds["ragged_latency"], speeds["ragged"])
    compared["lockstep_latency"] = ratios(speeds["ragged_latency"], speeds["lockstep_latency"])
    table = Table(title="ours / theirs", title_justify="left")
    for heading in ("", "median", "least", "most"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in compared.items():
        table.add_row(name, *(f"{f(values):.2f}" for f in (statistics.median, min, max)))
    console.print(table)
    if options.json:
        result = {
            "ratio": {name: statistics.median(values) for name, values in compared.items()},
            "spread": {name: [min(values), max(values)] for name, values in compared.items()},
            "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
