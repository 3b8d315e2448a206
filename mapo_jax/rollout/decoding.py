"""The engine's compiled programs: pure functions over the cache of all resident slots.

The cache is cut over the mesh's row axes into `shards` equal parts of consecutive rows. A program's lines are
cut in the same way, so that a line only uses the cache on its own devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, UInt32

from mapo_jax.model.cache import Cache, LayerCache
from mapo_jax.model.head import logits
from mapo_jax.model.qwen import (
    CacheAttention,
    Params,
    QwenConfig,
    extend,
    for_decoding,
    init_cache,
    parameter_shapes,
)
from mapo_jax.model.sharding import activation_spec, constrain, decoding_shardings, platform, row_shards
from mapo_jax.rollout.sampling import (
    ALTERNATIVES,
    LaneSampling,
    Sampling,
    alternatives,
    count_tokens,
    penalise,
    penalise_each,
    sample,
    sample_each,
    uniforms,
)

# Operations on a few tokens are small: several cores are used only if independent ones run in parallel.
CPU_OPTIONS = {"xla_cpu_enable_concurrency_optimized_scheduler": True}


class PerRequest(NamedTuple):
    """What `generate` needs if every lane has a distribution of its own."""

    lanes: LaneSampling
    rows: Int[Array, "M C"]  # tokens so far; the vocabulary's size where there are none
    replies: Int[Array, " M"]  # where the reply begins in each row
    alternatives: Bool[Array, ""]  # whether any lane wants them


class EnginePrograms(NamedTuple):
    """Jitted; each compiles once for each cache length. All but `grow` and `park` donate their cache."""

    ready: Callable[[Params], Params]  # (params): the weights of `prefill` and `generate`
    create: Callable[[int], Cache]  # (length): an empty cache
    grow: Callable[..., Any]  # (cache of one layer, length)
    insert: Callable[..., Cache]  # (cache, source, target)
    prefill: Callable[..., Cache]  # (params, cache, places, tokens, positions)
    generate: Callable[..., Any]  # (params, cache, places, words, tokens, positions, limits[, seen[, each]])
    park: Callable[[Cache, int], Cache]  # (cache, place)
    restore: Callable[[Cache, int, Cache], Cache]  # (cache, place, parked entries)


def make_programs(
    config: QwenConfig,
    *,
    resident: int,
    lanes: int,
    block: int,
    stop_ids: tuple[int, ...],
    vocabulary_size: int,
    sampling: Sampling,
    per_request: bool,
    dtype,
    cache_dtype,
    attention: CacheAttention,
    mesh: Mesh | None,
) -> EnginePrograms:
    """The programs of one engine; sizes as of `Engine`."""
    cache_sharding = everywhere = weights_sharding = None
    if mesh is not None:
        weights_sharding = decoding_shardings(parameter_shapes(config), mesh)
        # Of keys, values and scales, which have no features.
        cache_sharding = NamedSharding(mesh, PartitionSpec(*activation_spec("cache")[:2]))
        everywhere = NamedSharding(mesh, PartitionSpec())
    on_cpu = platform(mesh) == "cpu"
    model = dict(config=config, dtype=dtype, mesh=mesh)
    options = CPU_OPTIONS if on_cpu else None
    to_cache = functools.partial(jax.jit, out_shardings=cache_sharding)
    ready = functools.partial(for_decoding, config=config, dtype=dtype)
    create = functools.partial(init_cache, config, resident, dtype=cache_dtype, by_feature=on_cpu)
    constants = dict(stop_ids=stop_ids, vocabulary_size=vocabulary_size, sampling=sampling, block=block)
    decode = functools.partial(
        generate, **model, attention=attention, in_place=lanes == resident, **constants
    )
    generated = None if mesh is None else (cache_sharding, *(everywhere,) * (7 if per_request else 4))
    return EnginePrograms(
        ready=jax.jit(ready, out_shardings=weights_sharding),
        create=to_cache(create, static_argnums=0),
        grow=to_cache(LayerCache.grown, static_argnums=1),
        insert=to_cache(functools.partial(insert, shards=row_shards(mesh)), donate_argnums=0),
        prefill=to_cache(functools.partial(prefill, **model), donate_argnums=1, compiler_options=options),
        generate=jax.jit(decode, donate_argnums=1, out_shardings=generated, compiler_options=options),
        park=jax.jit(park, out_shardings=everywhere),
        restore=to_cache(restore, donate_argnums=0),
    )


def prefill(
    params: Params,
    cache: Cache,
    places: Int[Array, " P"],
    tokens: Int[Array, "P N"],
    positions: Int[Array, "P N"],
    *,
    config: QwenConfig,
    dtype,
    mesh: Mesh | None,
) -> Cache:
    rows = _local_rows(places, len(cache[0].values), row_shards(mesh))
    work = jax.tree.map(lambda array: _take(array, rows), cache)
    _, work = extend(params, config, tokens, positions, work, dtype=dtype, mesh=mesh)
    return _write_back(cache, work, rows, positions)


def generate(
    params: Params,
    cache: Cache,
    places: Int[Array, " M"],
    words: UInt32[Array, "M 4"],
    tokens: Int[Array, " M"],
    positions: Int[Array, " M"],
    limits: Int[Array, " M"],
    seen: Bool[Array, "M V"] | None = None,
    each: PerRequest | None = None,
    *,
    config: QwenConfig,
    dtype,
    attention: CacheAttention,
    mesh: Mesh | None,
    in_place: bool,
    stop_ids: tuple[int, ...],
    vocabulary_size: int,
    sampling: Sampling,
    block: int,
) -> tuple[Any, ...]:
    """Samples up to `limits` tokens in each lane (0: none); stops when all are done.

    Args:
      places: the row of the cache for each lane.
      words: keys of the random numbers.
      tokens: the last token of each row, not in the cache yet.
      positions: its index in the row.
      seen: tokens in the row; only for the repetition penalty.
      each: replaces `sampling`.

    Returns:
      (cache, ids [M, N], log-probabilities [M, N], their number in each lane [M], decode steps []); N =
      `block`. With `each` also what `alternatives` returns for every token: [M, N], [M, N, A], [M, N, A];
      zeros where no lane wants them.
    """
    lanes, length = len(tokens), cache[0].length
    numbers = uniforms(words, positions[:, None] + 1 + jnp.arange(block))
    rows = _local_rows(places, len(cache[0].values), row_shards(mesh))
    work = cache if in_place else jax.tree.map(lambda array: _take(array, rows), cache)

    others = []
    if each is not None:
        penalises, size = each.lanes.penalises, config.vocab_size
        seen = jax.lax.cond(
            penalises,
            lambda: count_tokens(each.rows, each.replies, size),
            lambda: jnp.zeros((lanes, size), jnp.int32),
        )
        report = functools.partial(alternatives, count=min(ALTERNATIVES, vocabulary_size))
        shapes = jax.eval_shape(report, jax.ShapeDtypeStruct((lanes, size), jnp.float32), tokens)
        others = [jnp.zeros((lanes, block, *new.shape[1:]), new.dtype) for new in shapes]

    def report_nothing(*_):
        return tuple(jnp.zeros_like(array[:, 0]) for array in others)

    def going(state):
        step, *_, done = state
        return (step < block) & ~jnp.all(done)

    def advance(state):
        step, work, token, seen, ids, logprobs, others, counts, done = state
        position = jnp.where(done, length, positions + step)
        hidden, work = extend(
            params,
            config,
            token[:, None],
            position[:, None],
            work,
            dtype=dtype,
            attention=attention,
            mesh=mesh,
        )
        scores = logits(params, config, hidden[:, 0], vocabulary_size=vocabulary_size)
        scores = constrain(constrain(scores, "lane_logits", mesh), "sampled_logits", mesh)
        if each is not None:
            unpenalised = scores
            scores = jax.lax.cond(
                penalises, penalise_each, lambda scores, *_: scores, scores, seen, each.lanes
            )
            token, logprob = sample_each(scores, numbers[:, step], each.lanes)
            seen = seen.at[jnp.arange(lanes), token].add(1)
            found = jax.lax.cond(each.alternatives, report, report_nothing, unpenalised, token)
            others = [array.at[:, step].set(new) for array, new in zip(others, found, strict=True)]
        elif seen is not None:
            scores = penalise(scores, seen, sampling.repetition_penalty)
        if each is None:
            token, logprob = sample(scores, numbers[:, step], sampling)
        if each is None and seen is not None:
            seen = seen.at[jnp.arange(lanes), token].set(True)
        counts = counts + ~done
        ids = ids.at[:, step].set(token)  # tokens of a done lane are beyond its count
        logprobs = logprobs.at[:, step].set(logprob)
        stopped = functools.reduce(jnp.logical_or, [token == stop for stop in stop_ids], done)
        return step + 1, work, token, seen, ids, logprobs, others, counts, stopped | (counts >= limits)

    start = (
        jnp.int32(0),
        work,
        tokens,
        seen,
        jnp.zeros((lanes, block), jnp.int32),
        jnp.zeros((lanes, block), jnp.float32),
        others,
        jnp.zeros(lanes, jnp.int32),
        limits <= 0,
    )
    steps, work, _, _, ids, logprobs, others, counts, _ = jax.lax.while_loop(going, advance, start)
    if in_place:
        return work, ids, logprobs, counts, steps, *others
    written = positions[:, None] + jnp.arange(block)
    written = jnp.where(jnp.arange(block) < counts[:, None], written, length)
    return _write_back(cache, work, rows, written), ids, logprobs, counts, steps, *others


def insert(cache: Cache, source: Int[Array, " K"], target: Int[Array, " K"], *, shards: int) -> Cache:
    """Copies whole rows; `source` and `target` are places of one shard each, K where nothing is copied."""
    total = len(cache[0].values)
    sources, targets = (_local_rows(places, total, shards) for places in (source, target))

    def copy(array):
        parts = array.reshape(shards, -1, *array.shape[1:])
        copied = _take(array, sources).reshape(parts.shape)
        put = jax.vmap(lambda part, index, new: part.at[index].set(new, mode="drop"))
        return put(parts, targets, copied).reshape(array.shape)

    return jax.tree.map(copy, cache)


def park(cache: Cache, place: int) -> Cache:
    """One row of the cache, without its axis of rows."""
    # A gather, since for a dynamic slice the compiler would gather a sharded cache.
    return jax.tree.map(lambda array: array.at[place[None]].get(mode="clip")[0], cache)


def restore(cache: Cache, place: int, entries: Cache) -> Cache:
    """The cache with one row replaced."""
    return jax.tree.map(lambda array, row: array.at[place[None]].set(row[None], mode="drop"), cache, entries)


def _local_rows(places: Int[Array, " M"], total: int, shards: int) -> Int[Array, "D M/D"]:
    """Places as row indices within their shard; idle ones (`total`) stay out of range."""
    size = total // shards
    local = places.reshape(shards, -1) - size * jnp.arange(shards)[:, None]
    return jnp.where(places.reshape(shards, -1) < total, local, size)


def _take(array: Array, rows: Int[Array, "D M/D"]) -> Array:
    """Rows of a cache array, each from its own shard; idle rows have arbitrary values."""
    shards, count = rows.shape
    parts = array.reshape(shards, -1, *array.shape[1:])
    return jax.vmap(lambda part, index: part.at[index].get(mode="clip"))(parts, rows).reshape(
        shards * count, *array.shape[1:]
    )


def _write_back(cache: Cache, work: Cache, rows: Int[Array, "D M/D"], positions: Int[Array, "M N"]) -> Cache:
    """Copies the entries of `work` at the positions to rows of the cache; idle rows are dropped."""
    shards = len(rows)

    def cut(tree):
        return jax.tree.map(lambda array: array.reshape(shards, -1, *array.shape[1:]), tree)

    def write(entry: LayerCache, copied: LayerCache) -> LayerCache:
        new = cut((positions, *copied.read(positions)))
        written = jax.vmap(LayerCache.put)(cut(entry), rows, *new)
        return jax.tree.map(lambda array, old: array.reshape(old.shape), written, entry)

    return list(map(write, cache, work))
