"""Multi-turn rollout: our engine against transformers and Tunix, and against its own lock-step batch.

    python benchmarks/rollout.py [--rounds 3] [--peers transformers tunix] [--json FILE]
    python benchmarks/rollout.py --sizes    the ragged work alone, with other lanes and blocks

Reference work: a Qwen3 of 4.2 M random parameters (hidden 256, 4 layers, 8/4 heads of 32, MLP 768,
vocabulary 4,096), float32; 32 dialogues of 6 turns, a first prompt of 64 tokens, user turns of 24, replies
of exactly 32 tokens, sampled at temperature 1 by all.

Ragged work: 64 dialogues of 2 to 8 turns with replies of 8 to 32 tokens, whose users answer at once or after
200 ms. Ours decodes 32 at a time; and again with room for 16 caches on the device, a quarter of the
dialogues, the others parked. In lock step, our own engine takes all 64 dialogues at once, every turn as long
as its longest reply, or four times 16, each until its longest dialogue has ended; the faster one counts.

All that is compared runs in turn, round after round, in one run of this program, on all cores, so that a busy
machine slows all of it down; what counts are the ratios. A peer that cannot be had is left out by name.

transformers runs with torch on the CPU (`pip install torch`), with its cache kept from turn to turn and
starting over at every turn; Tunix, which always starts over, is installed into an environment of its own.
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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # nothing need be installed

from mapo_jax.commands import prepare_jax
from mapo_jax.model.huggingface import save_params, write_config
from mapo_jax.model.qwen import QwenConfig, init_params, parameter_count
from mapo_jax.rollout.dispatch import Dispatcher
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request
from mapo_jax.running.metrics import CompileCounter

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
RAGGED, LANES, RESIDENT, LATENCY = 64, 32, 16, 0.2
LENGTH = FIRST + TURNS * REPLY + (TURNS - 1) * USER
PEERS = ("transformers_cached", "transformers_reprefill", "tunix")
PEER_SECONDS = 600  # longest wait for one answer of a peer's process


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
    """Sampled tokens of our engine; a turn prefills its new tokens and nothing else."""
    engine.reset()
    before = engine.counts.prefilled
    for turn in range(TURNS):
        engine.reply(
            [
                Request(d, tokens(100 * d + turn, USER if turn else FIRST), (1, 1, d), turn, start=turn == 0)
                for d in range(DIALOGUES)
            ]
        )
    # A prompt's last token is the first input of decoding; a reply's last one is prefilled in the next turn.
    assert engine.counts.prefilled - before == DIALOGUES * (FIRST - 1 + (TURNS - 1) * USER)
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
                row = model.generate(row, attention_mask=torch.ones_like(row), cache=cache, **options)
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
    }
    script = Path(__file__).parent / "peers" / "tunix_rollout.py"
    process = subprocess.Popen(
        [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    atexit.register(process.kill)

    def say(line: str) -> str:
        limit = threading.Timer(PEER_SECONDS, process.kill)
        limit.start()
        try:
            process.stdin.write(line + "\n")
            answer = process.stdout.readline().strip()
        finally:
            limit.cancel()
        if not answer:
            raise RuntimeError(f"its process has ended, or took more than {PEER_SECONDS} seconds")
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


def ragged_request(slot: int, dialogue: int, turn: int, sizes: tuple[int, int]) -> Request:
    ids = tokens(10_000 + 100 * dialogue + turn, sizes[0])
    return Request(slot, ids, (2, 1, dialogue), turn, limit=sizes[1], start=turn == 0)


def lockstep(engine: Engine, latency: float) -> int:
    """As many dialogues as the engine has slots take their turns together, and all wait for the slowest reply
    and the slowest user; then the next ones."""
    engine.reset()
    dialogues, sampled = ragged_dialogues(), 0
    for first in range(0, RAGGED, engine.slots):
        batch = range(first, first + engine.slots)
        for turn in range(max(len(dialogues[d]) for d in batch)):
            going = [d for d in batch if turn < len(dialogues[d])]
            replies = engine.reply([ragged_request(d - first, d, turn, dialogues[d][turn]) for d in going])
            sampled += sum(len(reply.ids) for reply in replies)
            time.sleep(latency)
    return sampled


def continuous(engine: Engine, latency: float) -> int:
    """Every dialogue goes on as soon as its user has answered."""
    engine.reset()
    dialogues = ragged_dialogues()

    async def hold(desk: Dispatcher, d: int) -> int:
        sampled = 0
        for turn, sizes in enumerate(dialogues[d]):
            sampled += len((await desk.reply(ragged_request(d, d, turn, sizes))).ids)
            if latency:
                await asyncio.sleep(latency)
        return sampled

    async def run() -> int:
        desk = Dispatcher(engine)
        serving = asyncio.ensure_future(desk.serve())
        sampled = await asyncio.gather(*(hold(desk, d) for d in range(RAGGED)))
        serving.cancel()
        return sum(sampled)

    return asyncio.run(run())


def sizes(params, length: int, rounds: int, console: Console) -> None:
    """The ragged work with other lanes and blocks, and where its time goes."""
    lines = [(lanes, block, continuous) for lanes in (16, 24, 32, 48, 64) for block in (4, 8, 16)]
    lines.append((RAGGED, REPLY, lockstep))
    engines = [
        make_engine(params, slots=RAGGED, lanes=lanes, block=block, length=length)
        for lanes, block, _ in lines
    ]
    found: list[list[tuple[float, ...]]] = [[] for _ in lines]
    for number in range(rounds + 1):
        for engine, (lanes, _, work), values in zip(engines, lines, found, strict=True):
            before, decoding = replace(engine.counts), Stopwatch()
            with decoding.around(engine, "_decode"):
                started = time.perf_counter()
                sampled = work(engine, 0)
                seconds = time.perf_counter() - started
            steps = engine.counts.since(before).steps
            busy, share = sampled / (steps * lanes), decoding.seconds / seconds
            if number:
                step = 1e3 * decoding.seconds / steps
                values.append((sampled / seconds, steps, 100 * busy, step, 100 * share))
    shown = Table(title="the ragged work", title_justify="left")
    for heading in ("lanes", "block", "tokens/s", "decode steps", "lanes busy", "ms a step", "decoding"):
        shown.add_column(heading, justify="right")
    for (lanes, block, work), values in zip(lines, found, strict=True):
        speed, steps, busy, step, share = map(statistics.median, zip(*values, strict=True))
        name = "lock step" if work is lockstep else str(block)
        cells = (f"{speed:,.0f}", f"{steps:.0f}", f"{busy:.0f} %", f"{step:.1f}", f"{share:.0f} %")
        shown.add_row(str(lanes), name, *cells)
    console.print(shown)


class Stopwatch:
    """Time spent in a method."""

    def __init__(self):
        self.seconds = 0.0

    @contextmanager
    def around(self, owner, name: str) -> Iterator[None]:
        method = getattr(owner, name)

        def timed(*arguments):
            started = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)
        yield
        delattr(owner, name)


# --- The run. ---


def measure(
    work: dict[str, Callable[[], int]], rounds: int, say: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Tokens per second of each piece of work, in turn, `rounds` times after one that warms up; and what
    failed, with the reason."""
    speeds: dict[str, list[float]] = {name: [] for name in work}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):
        for name in [name for name in work if name not in failed]:
            started = time.perf_counter()
            try:
                speed = work[name]() / (time.perf_counter() - started)
            except Exception as error:
                if name not in PEERS:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            if number:
                speeds[name].append(speed)
        say(f"round {number} of {rounds}" + (" done" if number else ": warmed up"))
    return {name: values for name, values in speeds.items() if name not in failed}, failed


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Of each round, so that what slows the machine down for a while does not count."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> Table:
    made = Table(title=title, title_justify="left")
    for heading in columns:
        made.add_column(heading, justify="right" if heading != columns[0] else "left")
    for name, cells in rows.items():
        made.add_row(name, *cells)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--peers", nargs="*", default=["transformers", "tunix"], help="which to compare with")
    parser.add_argument("--json", type=Path, help="file for the ratios")
    parser.add_argument("--sizes", action="store_true", help="the ragged work with other lanes and blocks")
    options = parser.parse_args()
    prepare_jax()  # as the commands do; transformers shares it
    console = Console(highlight=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    console.print(f"Qwen3 of {parameter_count(SHAPE):,} parameters on {jax.devices()[0]}, {cores} cores")
    params = init_params(SHAPE, seed=0)
    longest = max(sum(map(sum, dialogue)) for dialogue in ragged_dialogues())
    if options.sizes:
        sizes(params, longest, options.rounds, console)
        return 0
    work: dict[str, Callable[[], int]] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, CompileCounter() as compiled:
        engine = make_engine(params, slots=DIALOGUES)
        programs = compiled.count
        work["reference"] = lambda: reference(engine)
        save_params(folder, params, SHAPE, dtype="float32")
        write_config(folder, SHAPE)
        for name, peer in (("transformers", transformers_peer), ("tunix", tunix_peer)):
            try:
                if name not in options.peers:
                    raise RuntimeError("not asked for")
                work |= peer(Path(folder))
            except Exception as error:
                left_out[name] = f"{type(error).__name__}: {error}"
        ours = make_engine(params, slots=RAGGED, lanes=LANES, length=longest)
        narrow = make_engine(params, slots=RAGGED, resident=RESIDENT, length=longest)
        together = make_engine(params, slots=RAGGED, block=REPLY, length=longest)
        batches = make_engine(params, slots=RESIDENT, block=REPLY, length=longest)
        for suffix, latency in (("", 0), (", users of 200 ms", LATENCY)):
            work["ragged" + suffix] = lambda latency=latency: continuous(ours, latency)
            work["ragged, 16 caches" + suffix] = lambda latency=latency: continuous(narrow, latency)
            work["64 in lock step" + suffix] = lambda latency=latency: lockstep(together, latency)
            work["4 x 16 in lock step" + suffix] = lambda latency=latency: lockstep(batches, latency)
        with compiled.steady("the work after warm-up"):
            speeds, failed = measure(work, options.rounds, console.print)
    left_out |= failed
    compared = {name: ratios(speeds["reference"], speeds[name]) for name in PEERS if name in speeds}
    slow, fast = "ragged, 16 caches, users of 200 ms", "ragged, 16 caches"
    for name, suffix in (("lockstep_ragged", ""), ("lockstep_latency", ", users of 200 ms")):
        rivals = [speeds[f"{batch} in lock step{suffix}"] for batch in ("64", "4 x 16")]
        compared[name] = ratios(speeds["ragged" + suffix], max(rivals, key=statistics.median))
    compared["latency"] = ratios(speeds[slow], speeds[fast])

    three = (statistics.median, min, max)
    columns = ["median", "least", "most"]
    rows = {name: [f"{f(values):,.0f}" for f in three] for name, values in speeds.items()}
    console.print(table("sampled tokens per second", ["work", *columns], rows))
    rows = {name: [f"{f(values):.2f}" for f in three] for name, values in compared.items()}
    console.print(table("ours / theirs", ["", *columns], rows))
    for name, reason in left_out.items():
        console.print(f"left out: {name} ({reason})", markup=False)
    console.print(
        f"reference work: {programs} programs for the cache lengths {engine.lengths}, none after warm-up"
    )
    if options.json:
        result = {
            "ratio": {name: statistics.median(values) for name, values in compared.items()},
            "spread": {name: [min(values), max(values)] for name, values in compared.items()},
            "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
            "left_out": left_out,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
