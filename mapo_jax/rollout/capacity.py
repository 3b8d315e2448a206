"""Sizes of an engine: the lengths of its cache, and checks before anything is allocated."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mapo_jax.errors import UserError
from mapo_jax.model.qwen import QwenConfig
from mapo_jax.model.sharding import RULES, platform

ONE_LENGTH = 512  # tokens of a cache that does not grow
LONG = 4096  # tokens of a cache whose programs take long to compile


def cache_lengths(length: int) -> tuple[int, ...]:
    """Lengths that the cache grows through: `length`, and below it two significant bits (256, 384, 512, ...).

    A decode step reads whole caches (unless by pages), so one that is too long costs time; each length costs
    a set of compiled programs. Beyond LONG there are five, each twice the one before.

    Up to ONE_LENGTH there is only one length. On a CPU the order of sums over the cache can depend on its
    length (a difference in the last bits), and the length depends on the other dialogues: with one length a
    dialogue is the same bit for bit whatever the others do.
    """

    def rounded_up(size: int) -> int:
        return -(-size // 64) * 64

    if length <= ONE_LENGTH:
        return (rounded_up(length),)
    if length > LONG:
        return tuple(rounded_up(-(-length // 2**halvings)) for halvings in (4, 3, 2, 1, 0))
    lengths, size = {rounded_up(length)}, 256
    while size < length:
        lengths |= {size, size + size // 2} if size + size // 2 < length else {size}
        size *= 2
    return tuple(sorted(lengths))


def copies_weights(setting: bool | None, mesh: Mesh | None) -> bool:
    """Whether the sampler copies the weights: `rollout.copy_weights`; if that is None, on a CPU only.

    Models on a CPU are small, and without a copy XLA would slice each layer from the stack at every step.
    """
    return platform(mesh) == "cpu" if setting is None else setting


def check_sizes(
    config: QwenConfig,
    shards: int,
    length: int,
    max_reply_tokens: int,
    stop_ids: tuple[int, ...],
    vocabulary_size: int,
    **sizes: int,
) -> None:
    for name, value in {**sizes, "length": length, "max_reply_tokens": max_reply_tokens}.items():
        if value < 1:
            raise UserError(f"the engine's `{name}` is {value}; it must be at least 1")
    for fewer, more in (("resident", "slots"), ("lanes", "resident")):
        if sizes[fewer] > sizes[more]:
            raise UserError(
                f"{sizes[fewer]} {fewer} are more than the {sizes[more]} {more}; lower the former"
            )
    if sizes["resident"] < sizes["slots"] and jax.process_count() > 1:
        raise UserError(
            f"{sizes['resident']} resident caches for {sizes['slots']} slots: several processes cannot park "
            "caches in their memory; leave `rollout.slots` empty"
        )
    if not 0 < vocabulary_size <= config.vocab_size:
        raise UserError(
            f"a vocabulary of {vocabulary_size} tokens does not fit the model's {config.vocab_size}; "
            "give the model its own tokenizer"
        )
    for stop in stop_ids:
        if not 0 <= stop < vocabulary_size:
            raise UserError(
                f"stop id {stop} is outside the vocabulary of {vocabulary_size} tokens; "
                "no reply would ever end with it"
            )
    if length > config.max_position_embeddings:
        raise UserError(
            f"dialogues of {length} tokens exceed the model's {config.max_position_embeddings} "
            "positions; lower `rollout.max_tokens`"
        )
    if max_reply_tokens >= length:
        raise UserError(
            f"replies of {max_reply_tokens} tokens leave no room for a prompt in {length} tokens; "
            "lower `rollout.max_reply_tokens` or raise `rollout.max_tokens`"
        )
    for name in ("slots", "resident", "lanes", "prefill_rows"):
        if sizes[name] % shards:
            raise UserError(
                f"{sizes[name]} {name} cannot be cut over the {shards} devices of the mesh's axes "
                f"{' and '.join(RULES['rows'])}; choose a multiple of {shards}, or use more of mesh.tensor"
            )


def cache_bytes(config: QwenConfig, resident: int, lanes: int, length: int, dtype) -> int:
    """Bytes of all resident caches, and of the lanes' copies where there are fewer lanes than caches.

    `dtype` is that of the cache; with int8 each token and head has two float32 scales.
    """
    head = config.head_dim * jnp.dtype(dtype).itemsize + (4 if jnp.dtype(dtype) == jnp.int8 else 0)
    token = config.num_layers * 2 * config.num_kv_heads * head
    return token * length * (resident + (lanes if lanes < resident else 0))


def check_memory(config, resident, lanes, length, dtype, mesh: Mesh | None) -> None:
    """Raises UserError if the caches exceed the free memory of the devices."""
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    needed = cache_bytes(config, resident, lanes, length, dtype) / len(devices)
    try:
        stats = devices[0].memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # a device that exists for compilation only
        return
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    if not stats.get("bytes_limit"):
        if devices[0].platform != "cpu":
            return
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    if needed > free:
        raise UserError(
            f"the caches of {resident} dialogues of {length} tokens need {needed / 2**30:.1f} GiB on each "
            f"device, which has {free / 2**30:.1f} GiB; lower `rollout.slots`, or begin a new run with a "
            "lower `rollout.max_tokens`"
        )
