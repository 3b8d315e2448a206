"""MFU of the update relative to the measured speed of a matrix product, and the memory of each attention.

    python benchmarks/update.py [--shape 0.6b 1.7b 4b] [--length 4096 16384] [--json FILE]

    MFU = FLOPs that the mathematics of an update needs / (seconds x measured FLOP/s of a matrix product)

The FLOPs are those of `running/utilization.py`: 6 for each weight and token, attention, and the head for
half of the tokens; recomputation by `remat` does not count. The rate is that of a bfloat16 product of two
square matrices, the best of ten runs. The timed program is that of a run, `make_programs(...).update`: two
rows of full length, one per micro-batch, with gradient, clipping and AdamW. Weights and moments are random
bfloat16 numbers in Qwen3's shapes, so that 4B fits a GPU of 80 GB; a run keeps them in float32.

Needs an accelerator; `--shape tiny` runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from decode import SHAPES, random_params

from mapo_jax.config import Config, load_config
from mapo_jax.errors import UserError
from mapo_jax.learning.batch import Batch
from mapo_jax.learning.programs import make_programs
from mapo_jax.learning.train_state import create_state
from mapo_jax.learning.update import place
from mapo_jax.model.qwen import QwenConfig, parameter_shapes
from mapo_jax.model.sharding import make_mesh, param_shardings
from mapo_jax.rollout.requests import Counts
from mapo_jax.running.utilization import step_work

ROWS, TURNS = 2, 8


def matrix_rate(size: int) -> float:
    """FLOP/s of a product of two bfloat16 matrices, `size` x `size`; the best of ten runs."""
    matrix = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(multiply(matrix, matrix))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def settings(length: int, attention: str) -> Config:
    """Two rows of `length` tokens, half of them loss tokens, one row per micro-batch."""
    return load_config(
        None,
        [
            f"rollout.max_tokens={length}",
            f"rollout.max_turns={TURNS}",
            f"rollout.max_reply_tokens={length // 2 // TURNS}",
            "rollout.scenarios=1",
            f"rollout.rollouts={ROWS}",
            "training.minibatch_scenarios=1",
            f"training.microbatch_tokens={length}",
            "model.dtype=bfloat16",
            "model.remat=block",
            f"model.attention={attention}",
        ],
    )


def random_rows(model: QwenConfig, length: int) -> Batch:
    """Rows in which every second segment of tokens is a reply."""
    numbers = np.random.default_rng(0)
    shape, reply = (ROWS, length), length // 2 // TURNS
    mask = np.broadcast_to(np.arange(length) // reply % 2 == 1, shape)
    logprobs = np.where(mask, -numbers.exponential(size=shape), 0).astype(np.float32)
    return Batch(
        tokens=numbers.integers(0, model.vocab_size, shape, np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        mask=mask,
        sampler_logprobs=logprobs,
        old_logprobs=logprobs,
        advantages=np.where(mask, numbers.normal(size=shape), 0).astype(np.float32),
    )


def measure(model: QwenConfig, length: int, attention: str, updates: int) -> dict[str, float]:
    """Seconds and FLOPs of an update, and the bytes of its program as reported by the compiler."""
    config = settings(length, attention)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    programs, shardings = (
        make_programs(config, model, model.vocab_size, mesh),
        param_shardings(parameter_shapes(model), mesh),
    )
    params = jax.device_put(random_params(model), shardings)
    state = create_state(params, programs.optimizer, shardings=shardings)
    rows = place(random_rows(model, length), mesh)
    memory = programs.update.lower(state, rows).compile().memory_analysis()
    state, metrics = programs.update(state, rows)
    jax.block_until_ready(metrics)
    started = time.perf_counter()
    for _ in range(updates):
        state, metrics = programs.update(state, rows)
    jax.block_until_ready(metrics)
    work = step_work(model, config, [length] * ROWS, ROWS * length // 2, Counts())
    return {
        "seconds": (time.perf_counter() - started) / updates,
        "flops": 1e12 * work["perf/update_tflop"],
        "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def run(
    shapes: list[str],
    lengths: list[int],
    attentions: list[str],
    updates: int,
    size: int,
    report: Callable[[str], None],
) -> dict:
    """All measurements; see the module's docstring."""
    rate = matrix_rate(size)
    report(f"{jax.devices()[0].device_kind}: {rate / 1e12:,.2f} TFLOP/s in a product of {size} x {size}")
    rows, left_out = [], []
    for name in shapes:
        for length in lengths:
            for attention in attentions:
                case = {"shape": name, "length": length, "attention": attention}
                try:
                    row = measure(SHAPES[name], length, attention, updates)
                except (UserError, jax.errors.JaxRuntimeError) as error:  # unavailable, or out of memory
                    left_out.append(case | {"reason": " ".join(str(error).split())[:200]})
                    continue
                rows.append(case | row | {"mfu": row["flops"] / row["seconds"] / rate})
    return {
        "device": jax.devices()[0].device_kind,
        "flops_per_second": rate,
        "rows": rows,
        "left_out": left_out,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.6b", "1.7b", "4b"], help="models")
    parser.add_argument("--length", type=int, nargs="+", default=[4096, 16_384], help="tokens of a row")
    parser.add_argument("--attention", nargs="+", default=["xla", "cudnn"], help="implementations to compare")
    parser.add_argument("--updates", type=int, default=5, help="timed updates, after one warm-up")
    parser.add_argument("--matrix", type=int, default=8192, help="size of the matrices for the rate")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    console = Console(highlight=False)
    result = run(
        options.shape, options.length, options.attention, options.updates, options.matrix, console.print
    )
    table = Table(title=f"an update of {ROWS} rows", title_justify="left")
    for heading in ("shape", "tokens a row", "attention", "ms", "TFLOP/s", "MFU", "GiB"):
        table.add_column(heading, justify="left" if heading in ("shape", "attention") else "right")
    for row in result["rows"]:
        table.add_row(
            row["shape"],
            f"{row['length']:,}",
            row["attention"],
            f"{1e3 * row['seconds']:,.0f}",
            f"{row['flops'] / row['seconds'] / 1e12:,.2f}",
            f"{row['mfu']:.0%}",
            f"{row['bytes'] / 2**30:.2f}",
        )
    console.print(table)
    for case in result["left_out"]:
        console.print(
            f"left out: {case['shape']}, {case['length']:,} tokens, {case['attention']} ({case['reason']})",
            markup=False,
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
