"""Cost of decoding some of the caches, while the other dialogues wait for their user.

    python benchmarks/lanes.py [--slots 64] [--speaking 16] [--rounds 10]

The model is that of the reference work (benchmarks/rollout.py). `--slots` dialogues have caches, and
`--speaking` of them are decoded. Ways to decode a block of 8 steps:

    all decoded           every cache in place, those of waiting dialogues too copied for a block    as in
    the engine if it has fewer lanes than resident caches gathered every step   like pages without a special
    kernel: each step looks its caches up by index parked                only the decoded caches are on the
    device; includes parking and restoring one of them

Layouts of the cache: keys by feature, [K, G, E, C], with values [K, G, C, E] (ours on a CPU); both with
positions before features, [K, G, C, E] (ours elsewhere); both with positions before heads, [K, C, G, E]. The
first layout is also measured with two variants of attention. One computes PART tokens at a time with a
running maximum, and skips parts that no dialogue has reached. The other computes scores as an explicit sum
over features instead of matrix products, which XLA's CPU backend computes one by one on one core. All
variants run in turn, round after round, and the table has the medians. The last lines give the number of
busy cores during one layer's attention.
"""

from __future__ import annotations

import argparse
import functools
import statistics
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

from rollout import SHAPE

from mapo_jax.model.qwen import init_cache, init_params
from mapo_jax.rollout.decoding import generate, park, restore
from mapo_jax.rollout.sampling import Sampling

BLOCK, LENGTHS, PART = 8, (256, 384), 128
OURS, EXPLICIT_SUM = "layer, keys [K, G, E, C]", "layer, first layout, scores as an explicit sum"
BY_FEATURE = jax.devices()[0].platform == "cpu"  # as the engine does
OPTIONS = dict(
    config=SHAPE,
    dtype=jnp.float32,
    mesh=None,
    stop_ids=(),
    vocabulary_size=SHAPE.vocab_size,
    sampling=Sampling(),
)


def ways(slots: int, speaking: int, length: int) -> dict[str, Callable[[], None]]:
    """A function per way to decode a block, each with its own caches."""
    params = init_params(SHAPE, seed=0)

    def inputs(lanes: int, places) -> list[np.ndarray]:
        tokens = np.zeros(lanes, np.int32)
        words = np.zeros((lanes, 4), np.uint32)
        positions = np.full(lanes, length - BLOCK - 1, np.int32)
        limits = np.where(np.arange(lanes) < speaking, BLOCK, 0).astype(np.int32)
        return [np.asarray(places, np.int32), words, tokens, positions, limits]

    def repeated(step, caches: int, *arguments) -> Callable[[], None]:
        compiled = jax.jit(step, donate_argnums=1)
        state = [init_cache(SHAPE, caches, length, by_feature=BY_FEATURE)]

        def block() -> None:
            state[0] = jax.block_until_ready(compiled(params, state[0], *arguments))

        return block

    def whole(in_place: bool):
        return lambda params, cache, *rest: generate(
            params, cache, *rest, **OPTIONS, in_place=in_place, block=BLOCK
        )[0]

    def step_by_step(params, cache, places, words, tokens, positions, limits):
        def step(carry, offset):
            cache, tokens = carry
            cache, ids, *_ = generate(
                params, cache, places, words, tokens, positions + offset, limits,
                **OPTIONS, in_place=False, block=1,
            )  # fmt: skip
            return (cache, ids[:, 0]), None

        return jax.lax.scan(step, (cache, tokens), jnp.arange(BLOCK))[0][0]

    some = np.random.default_rng(0).permutation(slots)[:speaking]
    resident = repeated(whole(True), speaking, *inputs(speaking, range(speaking)))
    out, back = jax.jit(park), jax.jit(restore, donate_argnums=0)
    other = [init_cache(SHAPE, speaking, length, by_feature=BY_FEATURE)]

    def parked() -> None:
        moved = jax.tree.map(np.asarray, out(other[0], np.int32(0)))
        other[0] = back(other[0], np.int32(0), moved)
        resident()

    return {
        "all decoded": repeated(whole(True), slots, *inputs(slots, range(slots))),
        "copied for a block": repeated(whole(False), slots, *inputs(speaking, some)),
        "gathered every step": repeated(step_by_step, slots, *inputs(speaking, some)),
        "parked": parked,
    }


def layouts(lanes: int, length: int) -> dict[str, Callable[[], None]]:
    """For each layout, BLOCK steps of one layer's attention, including the write of the new entries."""
    heads, groups, size = SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim
    rows, share = jnp.arange(lanes), heads // groups
    allowed = jnp.arange(length) <= length - BLOCK

    def attend(cache, query, scores: str | None, values: str):
        keys, entries = cache
        query = query.reshape(lanes, groups, share, size)
        if scores is None:
            logits = sum(query[..., e, None] * keys[:, :, None, e] for e in range(size))
        else:
            logits = jnp.einsum(scores, query, keys)
        weights = jax.nn.softmax(jnp.where(allowed, logits, -1e30), axis=-1)
        return jnp.einsum(values, weights, entries).reshape(lanes, heads, size)

    def by_feature(cache, query, position, scores="kgse,kgec->kgsc"):
        keys, values = cache
        keys = keys.at[rows, :, :, position].set(query[:, :groups])
        values = values.at[rows, :, position].set(query[:, :groups])
        return (keys, values), attend((keys, values), query, scores, "kgsc,kgce->kgse")

    def inner(cache, query, position):
        cache = tuple(array.at[rows, :, position].set(query[:, :groups]) for array in cache)
        return cache, attend(cache, query, "kgse,kgce->kgsc", "kgsc,kgce->kgse")

    def outer(cache, query, position):
        cache = tuple(array.at[rows, position].set(query[:, :groups]) for array in cache)
        return cache, attend(cache, query, "kgse,kcge->kgsc", "kgsc,kcge->kgse")

    def in_parts(cache, query, position):
        keys, values = cache
        keys = keys.at[rows, :, :, position].set(query[:, :groups])
        values = values.at[rows, :, position].set(query[:, :groups])
        grouped = query.reshape(lanes, groups, share, size)

        def add(number, state):
            highest, total, output = state
            part, start = jnp.arange(PART), number * PART
            scores = jnp.einsum(
                "kgse,kgec->kgsc", grouped, jax.lax.dynamic_slice_in_dim(keys, start, PART, 3)
            )
            scores = jnp.where(start + part <= position, scores, -1e30)
            new = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights, kept = jnp.exp(scores - new), jnp.exp(highest - new)
            entries = jax.lax.dynamic_slice_in_dim(values, start, PART, 2)
            output = output * kept + jnp.einsum("kgsc,kgce->kgse", weights, entries)
            return new, total * kept + weights.sum(axis=-1, keepdims=True), output

        nothing = jnp.zeros((lanes, groups, share, 1))
        start = (nothing - 1e30, nothing, jnp.zeros((lanes, groups, share, size)))
        _, total, output = jax.lax.fori_loop(0, position // PART + 1, add, start)
        return (keys, values), (output / total).reshape(lanes, heads, size)

    def block(step, keys, values, used=length):
        @functools.partial(jax.jit, donate_argnums=0)
        def compiled(cache, query, first):
            return jax.lax.fori_loop(0, BLOCK, lambda i, state: step(*state, first + i), (cache, query))

        state = [((jnp.zeros(keys), jnp.zeros(values)), jnp.ones((lanes, heads, size)))]

        def run() -> None:
            state[0] = jax.block_until_ready(compiled(*state[0], used - BLOCK))

        return run

    inside, outside = (lanes, groups, length, size), (lanes, length, groups, size)
    return {
        OURS: block(by_feature, (lanes, groups, size, length), inside),
        "layer, [K, G, C, E]": block(inner, inside, inside),
        "layer, [K, C, G, E]": block(outer, outside, outside),
        EXPLICIT_SUM: block(
            functools.partial(by_feature, scores=None), (lanes, groups, size, length), inside
        ),
        "layer, first layout, in parts": block(in_parts, (lanes, groups, size, length), inside),
        "layer, first layout, one part in use": block(in_parts, (lanes, groups, size, length), inside, PART),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=64, help="dialogues with a cache")
    parser.add_argument("--speaking", type=int, default=16, help="dialogues of them that are decoded")
    parser.add_argument("--rounds", type=int, default=10, help="number of measured rounds")
    options = parser.parse_args()
    table = Table(title=f"milliseconds for {BLOCK} steps", title_justify="left")
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for length in LENGTHS:
        table.add_column(f"{length} tokens", justify="right")
        blocks = ways(options.slots, options.speaking, length) | layouts(options.speaking, length)
        times: dict[str, list[float]] = {name: [] for name in blocks}
        for number in range(options.rounds + 1):
            for name, block in blocks.items():
                started = time.perf_counter()
                block()
                if number:
                    times[name].append(time.perf_counter() - started)
        for name, values in times.items():
            rows.setdefault(name, []).append(f"{1e3 * statistics.median(values):.1f}")
        for name in (OURS, EXPLICIT_SUM):
            started, worked = time.perf_counter(), time.process_time()
            for _ in range(10 * options.rounds):
                blocks[name]()
            cores = (time.process_time() - worked) / (time.perf_counter() - started)
            rows.setdefault(f"busy cores: {name}", []).append(f"{cores:.1f}")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(highlight=False).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
