"""Decoding speed of the engine, compared with the bound by memory bandwidth.

    python benchmarks/decode.py [--shape 0.6b 4b] [--batch 64] [--context 1024 4096]
        [--cache exact int8 paged] [--json FILE]

A decode step has to read every weight and every cached key and value once, so its time is at least
(parameter + cache bytes) / bandwidth. The bandwidth is measured here, by adding 1 to a large array. The
weights are random bfloat16 numbers in Qwen3's shapes. Dialogues fill their context except for the timed
tokens. The timed function is `Engine.advance`, including sampling and the transfers between host and device.

Needs an accelerator (4B needs 40 GiB with the default batch and contexts); `--shape tiny` runs anywhere.
"""

from __future__ import annotations

import argparse
import functools
import itertools
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

from mapo_jax.model.backends import decode_attention, stored_dtype
from mapo_jax.model.qwen import INIT_SCALE, Params, QwenConfig, parameter_shapes
from mapo_jax.rollout.capacity import cache_bytes
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request
from tpu.shapes import SHAPES as PUBLISHED

SHAPES = {name: PUBLISHED[f"Qwen3-{name.upper()}"] for name in ("0.6b", "1.7b", "4b")} | {
    "tiny": QwenConfig(
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=512,
        max_position_embeddings=4096,
    ),
}
DTYPE = jnp.bfloat16


def random_params(config: QwenConfig) -> Params:
    """Random weights in the model's shapes, created on the device in bfloat16."""
    leaves, tree = jax.tree.flatten(parameter_shapes(config))

    @functools.partial(jax.jit, static_argnums=1)
    def make(key, shape):
        return INIT_SCALE * jax.random.normal(key, shape, DTYPE)

    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [make(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


def bytes_per_step(config: QwenConfig, batch: int, tokens: float, cache: str) -> float:
    """Bytes that a decode step has to read: all weights (the head is the embedding), all keys and values."""
    weights = sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(config)))
    of_a_token = cache_bytes(config, batch, batch, 1, stored_dtype(cache, "bfloat16"))
    return weights * jnp.dtype(DTYPE).itemsize + of_a_token * tokens


def bandwidth(gibibytes: float) -> float:
    """Bytes per second of reading one array and writing another; the best of ten runs."""
    array = jnp.zeros(int(gibibytes * 2**30) // 4, jnp.float32)
    add = jax.jit(lambda array: array + 1, donate_argnums=0)
    array, best = jax.block_until_ready(add(array)), float("inf")
    for _ in range(10):
        started = time.perf_counter()
        array = jax.block_until_ready(add(array))
        best = min(best, time.perf_counter() - started)
    return 2 * array.nbytes / best


def measure(
    config: QwenConfig, params: Params, batch: int, context: int, cache: str, blocks: int, block: int
) -> dict:
    """Tokens per second of `blocks` blocks of decode steps at the end of a context of `context` tokens."""
    timed = blocks * block
    if context <= timed + block:
        raise SystemExit(f"a context of {context} tokens has no room for {timed + block} decoded ones")
    engine = Engine(
        config,
        slots=batch,
        length=context,
        max_reply_tokens=timed + block,
        stop_ids=(),
        vocabulary_size=config.vocab_size,
        chunk=min(512, context),
        block=block,
        dtype=DTYPE,
        cache_dtype=stored_dtype(cache, "bfloat16"),
        attention=decode_attention(cache, None, config, "bfloat16"),
    )
    engine.load(params, 0)
    engine.warm_up()
    numbers = np.random.default_rng(0)
    for slot in range(batch):
        ids = numbers.integers(0, config.vocab_size, context - timed - block).tolist()
        engine.submit(Request(slot, ids, (0, 0, slot), 0, start=True))
    engine.advance()  # prefills, and decodes a first block
    before, started = engine.counts.sampled, time.perf_counter()
    while engine.busy:
        engine.advance()
    seconds = time.perf_counter() - started
    sampled = engine.counts.sampled - before
    assert sampled == batch * timed
    return {
        "tokens_per_second": sampled / seconds,
        "milliseconds_per_step": 1e3 * seconds / timed,
        "bytes_per_step": bytes_per_step(config, batch, context - timed / 2, cache),
    }


def run(
    shapes: list[str], batch: int, contexts: list[int], caches: list[str], blocks: int, block: int,
    gibibytes: float, report: Callable[[str], None],
) -> dict:  # fmt: skip
    """All measurements; see the module's docstring."""
    speed = bandwidth(gibibytes)
    report(f"{jax.devices()[0].device_kind}: {speed / 1e9:,.0f} GB/s")
    rows = []
    for name in shapes:
        params = random_params(SHAPES[name])
        for context, cache in itertools.product(contexts, caches):
            row = measure(SHAPES[name], params, batch, context, cache, blocks, block)
            bound = batch * speed / row["bytes_per_step"]
            rows.append(
                {"shape": name, "batch": batch, "context": context, "cache": cache, **row}
                | {"bound": bound, "share": row["tokens_per_second"] / bound}
            )
    return {"device": jax.devices()[0].device_kind, "bytes_per_second": speed, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.6b", "4b"], help="models")
    parser.add_argument("--batch", type=int, default=64, help="dialogues in a batch")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096], help="tokens of a dialogue")
    caches = ["exact", "int8", "paged"]
    parser.add_argument("--cache", nargs="+", choices=caches, default=caches[:1], help="as `rollout.cache`")
    parser.add_argument("--blocks", type=int, default=8, help="number of timed blocks")
    parser.add_argument("--block", type=int, default=16, help="decode steps per block")
    parser.add_argument(
        "--copy-gib", type=float, default=1.0, help="size of the array for the bandwidth measurement"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    console = Console(highlight=False)
    result = run(
        options.shape, options.batch, options.context, options.cache, options.blocks, options.block,
        options.copy_gib, console.print,
    )  # fmt: skip
    table = Table(title=f"decoding, {options.batch} dialogues", title_justify="left")
    for heading in ("shape", "context", "cache", "ms a step", "tokens/s", "bound", "share"):
        table.add_column(heading, justify="left" if heading == "shape" else "right")
    for row in result["rows"]:
        table.add_row(
            row["shape"],
            f"{row['context']:,}",
            row["cache"],
            f"{row['milliseconds_per_step']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['bound']:,.0f}",
            f"{row['share']:.0%}",
        )
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
