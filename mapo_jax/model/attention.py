"""Rotary position embedding, and attention over whole rows and over a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mapo_jax.model.cache import LayerCache

Heads = Float[Array, "B L H E"]
Groups = Float[Array, "B L G E"]  # of the key/value heads

MASKED = -1e30  # finite, so that a row of masked scores gives a (meaningless) average instead of NaN
MAX_QUERY_BLOCKS = 8
MIN_QUERY_BLOCK = 64


def rotary_angles(
    positions: Int[Array, "B L"], head_dim: int, theta: float
) -> tuple[Float[Array, "B L 1 E/2"], Float[Array, "B L 1 E/2"]]:
    """Cosines and sines of the rotary embedding (Su et al. 2021, arXiv:2104.09864), in float32.

    Pair i of the E/2 pairs is rotated by position * theta^(-2i/E).
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Heads, rotary: tuple[Array, Array]) -> Heads:
    """Rotates each pair (x[i], x[i + E/2]) by its angle: the half-split convention of Hugging Face's Qwen."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def causal_attention(
    query: Heads, key: Groups, value: Groups, segments: Int[Array, "B L"] | None = None
) -> Heads:
    """Attention of every token to itself and the tokens before it in its row; softmax in float32.

    Args:
      query, key, value: H query heads share G key/value heads, H/G neighbours each.
      segments: a token attends to tokens of its segment only (rows packed with several texts).

    The queries are cut into a few blocks, and each block attends to the keys up to its end: most of the upper
    half of the score matrix is never computed. Scores are recomputed in the backward pass, so that no
    [B, H, L, L] array outlives its block.
    """
    length = query.shape[1]
    size = query_block(length)
    block = jax.checkpoint(_causal_block, static_argnums=(4,))
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        segment_pair = None if segments is None else (segments[:, start:end], segments[:, :end])
        outputs.append(block(query[:, start:end], key[:, :end], value[:, :end], segment_pair, start))
    return jnp.concatenate(outputs, axis=1)


def query_block(length: int) -> int:
    """Queries of a row whose scores are in memory at once."""
    return min(length, max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS)))


def _causal_block(query, key, value, segment_pair, start):
    rows, columns = query.shape[1], key.shape[1]
    allowed = (jnp.arange(columns) <= start + jnp.arange(rows)[:, None])[None]
    if segment_pair is not None:
        of_query, of_key = segment_pair
        allowed = allowed & (of_query[:, :, None] == of_key[:, None, :])
    return _attend(query, key.swapaxes(1, 2), value.swapaxes(1, 2), allowed)


def cached_attention(
    query: Float[Array, "K N H E"], cache: LayerCache, positions: Int[Array, "K N"]
) -> Float[Array, "K N H E"]:
    """Attention of new tokens to the cache entries at or before their own position; softmax in float32.

    The numbers of a cache in 8 bits are exact in every compute dtype; their scales are factors of a column of
    scores or weights.
    """
    allowed = jnp.arange(cache.length) <= positions[:, :, None]
    keys, values = (array.astype(query.dtype) for array in (cache.keys, cache.values))
    scales, axes = (cache.key_scales, cache.value_scales), "bgec" if cache.by_feature else "bgce"
    return _attend(query, keys, values, allowed, axes, *scales)


def _attend(
    query: Heads,
    key: Array,
    value: Float[Array, "B G C E"],
    allowed: Array,
    keys: str = "bgce",
    key_scales: Float[Array, "B G C"] | None = None,
    value_scales: Float[Array, "B G C"] | None = None,
) -> Heads:
    """`keys` names the axes of `key` in their order."""
    batch, length, heads, size = query.shape
    groups, share = value.shape[1], heads // value.shape[1]
    # The query heads of a group become rows of one matrix product per key/value head.
    query = (query * size**-0.5).reshape(batch, length, groups, share, size)
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, groups, share * length, size)
    scores = jnp.einsum(f"bgqe,{keys}->bgqc", query, key, preferred_element_type=jnp.float32)
    if key_scales is not None:
        scores *= key_scales[:, :, None]
    scores = scores.reshape(batch, groups, share, length, -1)
    scores = jnp.where(allowed[:, None, None], scores, MASKED)
    # Softmax whose division comes after the product with the values: one pass over [L, C] less, and a
    # shorter backward pass. The maximum cancels, so no gradient goes through it.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1).reshape(batch, groups, share * length, 1)
    weights = weights.reshape(batch, groups, share * length, -1)
    if value_scales is not None:
        weights *= value_scales[:, :, None]
    weights = weights.astype(value.dtype)
    output = jnp.einsum("bgqc,bgce->bgqe", weights, value, preferred_element_type=jnp.float32) / total
    output = output.reshape(batch, groups, share, length, size).transpose(0, 3, 1, 2, 4)
    return output.reshape(batch, length, heads, size).astype(value.dtype)
