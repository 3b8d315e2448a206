"""Multi-turn rollout: our engine compared with transformers, with Tunix, and with lock-step batches.

    python benchmarks/rollout.py [--rounds 3] [--peers transformers tunix] [--json FILE]
    python benchmarks/rollout.py --reference   only the reference work
    python benchmarks/rollout.py --sizes       only the ragged work, with other lanes and block sizes

Reference work: a Qwen3 of 4.2 M random parameters (hidden 256, 4 layers, 8/4 heads of 32, MLP 768,
vocabulary 4,096), float32; 32 dialogues of 6 turns, a first prompt of 64 tokens, user turns of 24, replies
of exactly 32 tokens, all sampled at temperature 1.

Ragged work: 64 dialogues of 2 to 8 turns with replies of 8 to 32 tokens, whose users answer at once or after
200 ms. Our engine decodes 32 at a time, with all caches on the device, and with room for 16 caches (a quarter
of the dialogues; the others are parked). In lock step, our engine takes all 64 dialogues at once, every turn
lasting as long as its longest reply, or four batches of 16, each until its longest dialogue has ended; the
faster of the two counts.

All variants run in turn, round after round, in one process on all cores, so that other load slows all of
them; only the ratios count. A peer that is not available is listed with the reason.

transformers runs with torch (`pip install torch`), on the GPU if jax does, with its cache kept between turns,
and without.
Tunix always starts from the beginning; it is installed into a separate environment.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

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
PEER_SECONDS = 600  # time limit for one answer of a peer's process


def tokens(seed: int, size: int) -> list[int]:
    return np.random.default_rng(seed).integers(8, SHAPE.vocab_size, size).tolist()


def make_engine(params, **options) -> Engine:
    """A compiled engine without stop ids, so that every reply has its full length."""
    settings = dict(length=LENGTH, max_reply_tokens=REPLY, stop_ids=(), vocabulary_size=SHAPE.vocab_size)
    engine = Engine(SHAPE, **(settings | options))
    engine.load(params, 0)
    engine.warm_up()
    return engine


# --- The reference work. ---


def reference(engine: Engine) -> int:
    """Runs our engine; returns the sampled tokens. Asserts that a turn prefills only its new tokens."""
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
    """transformers with torch, with and without its cache kept between turns."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
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
        cache, row = (
            DynamicCache() if keep else None,
            torch.zeros((DIALOGUES, 0), dtype=torch.long, device=device),
        )
        for turn in range(TURNS):
            new = [tokens(100 * d + turn, USER if turn else FIRST) for d in range(DIALOGUES)]
            row = torch.cat([row, torch.tensor(new, device=device)], dim=1)
            with torch.inference_mode():
                row = model.generate(row, attention_mask=torch.ones_like(row), cache=cache, **options)
        assert row.shape[1] == LENGTH
        return DIALOGUES * TURNS * REPLY

    return {"transformers_cached": lambda: run(True), "transformers_reprefill": lambda: run(False)}


def tunix_peer(folder: Path) -> dict[str, Callable[[], int]]:
    """Tunix's sampler, in a separate process and environment (kept in the cache folder)."""
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

    def request(line: str) -> str:
        limit = threading.Timer(PEER_SECONDS, process.kill)
        limit.start()
        try:
            process.stdin.write(line + "\n")
            answer = process.stdout.readline().strip()
        finally:
            limit.cancel()
        if not answer:
            raise RuntimeError(f"the process ended, or took more than {PEER_SECONDS} seconds")
        return answer

    request(json.dumps(work))
    request("run")  # compiles, and fails if Tunix does not work
    return {"tunix": lambda: int(request("run"))}


# --- The ragged work. ---


def ragged_dialogues() -> list[list[tuple[int, int]]]:
    """For each dialogue, the (user tokens, reply tokens) of each turn."""
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
    """Batches with one dialogue per slot; at every turn all wait for the slowest reply and user."""
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
    """Every dialogue continues as soon as its user has answered."""
    engine.reset()
    dialogues = ragged_dialogues()

    async def converse(dispatcher: Dispatcher, d: int) -> int:
        sampled = 0
        for turn, sizes in enumerate(dialogues[d]):
            sampled += len((await dispatcher.reply(ragged_request(d, d, turn, sizes))).ids)
            if latency:
                await asyncio.sleep(latency)
        return sampled

    async def run() -> int:
        dispatcher = Dispatcher(engine)
        serving = asyncio.ensure_future(dispatcher.serve())
        sampled = await asyncio.gather(*(converse(dispatcher, d) for d in range(RAGGED)))
        serving.cancel()
        return sum(sampled)

    return asyncio.run(run())


def sizes(params, length: int, rounds: int, console: Console) -> None:
    """The ragged work with other numbers of lanes and block sizes, with the share of time spent decoding."""
    lines = [(lanes, block, continuous) for lanes in (16, 24, 32, 48, 64) for block in (4, 8, 16)]
    lines.append((RAGGED, REPLY, lockstep))
    engines = [
        make_engine(params, slots=RAGGED, lanes=lanes, block=block, length=length)
        for lanes, block, _ in lines
    ]
    measured: list[list[tuple[float, ...]]] = [[] for _ in lines]
    for number in range(rounds + 1):
        for engine, (lanes, _, work), values in zip(engines, lines, measured, strict=True):
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
    for (lanes, block, work), values in zip(lines, measured, strict=True):
        speed, steps, busy, step, share = map(statistics.median, zip(*values, strict=True))
        name = "lock step" if work is lockstep else str(block)
        cells = (f"{speed:,.0f}", f"{steps:.0f}", f"{busy:.0f} %", f"{step:.1f}", f"{share:.0f} %")
        shown.add_row(str(lanes), name, *cells)
    console.print(shown)


class Stopwatch:
    """Measures the time spent in a method."""

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
    work: dict[str, Callable[[], int]], rounds: int, report: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Tokens per second of each work, run in turn for `rounds` rounds after a warm-up; and errors by name."""
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
        report(f"round {number} of {rounds}" + (" done" if number else ": warmed up"))
    return {name: values for name, values in speeds.items() if name not in failed}, failed


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """The ratio of each round, so that a temporary load on the machine does not count."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def longest_dialogue() -> int:
    """Tokens of the longest ragged dialogue."""
    return max(sum(map(sum, dialogue)) for dialogue in ragged_dialogues())


def ragged_work(params: dict) -> dict[str, Callable[[], int]]:
    """The ways to do the ragged work, with users who answer at once and with slow ones."""
    longest = longest_dialogue()
    ours = make_engine(params, slots=RAGGED, lanes=LANES, length=longest)
    narrow = make_engine(params, slots=RAGGED, resident=RESIDENT, length=longest)
    together = make_engine(params, slots=RAGGED, block=REPLY, length=longest)
    batches = make_engine(params, slots=RESIDENT, block=REPLY, length=longest)
    work: dict[str, Callable[[], int]] = {}
    for suffix, latency in (("", 0), (", users of 200 ms", LATENCY)):
        work["ragged" + suffix] = lambda latency=latency: continuous(ours, latency)
        work["ragged, 16 caches" + suffix] = lambda latency=latency: continuous(narrow, latency)
        work["64 in lock step" + suffix] = lambda latency=latency: lockstep(together, latency)
        work["4 x 16 in lock step" + suffix] = lambda latency=latency: lockstep(batches, latency)
    return work


def ragged_ratios(speeds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Ours against the faster lock step, and with slow users against users who answer at once."""
    compared = {}
    for name, suffix in (("lockstep_ragged", ""), ("lockstep_latency", ", users of 200 ms")):
        rivals = [speeds[f"{batch} in lock step{suffix}"] for batch in ("64", "4 x 16")]
        compared[name] = ratios(speeds["ragged" + suffix], max(rivals, key=statistics.median))
    slow, fast = "ragged, 16 caches, users of 200 ms", "ragged, 16 caches"
    return compared | {"latency": ratios(speeds[slow], speeds[fast])}


def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> Table:
    result = Table(title=title, title_justify="left")
    for heading in columns:
        result.add_column(heading, justify="right" if heading != columns[0] else "left")
    for name, cells in rows.items():
        result.add_row(name, *cells)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of measured rounds")
    parser.add_argument("--peers", nargs="*", default=["transformers", "tunix"], help="peers to compare with")
    parser.add_argument("--json", type=Path, help="file for the ratios")
    parser.add_argument("--reference", action="store_true", help="only the reference work")
    parser.add_argument(
        "--sizes", action="store_true", help="only the ragged work, with other lanes and blocks"
    )
    options = parser.parse_args()
    prepare_jax()  # as in the commands; also affects transformers
    console = Console(highlight=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    console.print(f"Qwen3 of {parameter_count(SHAPE):,} parameters on {jax.devices()[0]}, {cores} cores")
    params = init_params(SHAPE, seed=0)
    if options.sizes:
        sizes(params, longest_dialogue(), options.rounds, console)
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
                    raise RuntimeError("not in --peers")
                work |= peer(Path(folder))
            except Exception as error:
                left_out[name] = f"{type(error).__name__}: {error}"
        if not options.reference:
            work |= ragged_work(params)
        with compiled.steady("the work after warm-up"):
            speeds, failed = measure(work, options.rounds, console.print)
    left_out |= failed
    compared = {name: ratios(speeds["reference"], speeds[name]) for name in PEERS if name in speeds}
    if not options.reference:
        compared |= ragged_ratios(speeds)

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
