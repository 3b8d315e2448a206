"""From hidden states to logits and log-probabilities, in float32 and without ever holding [B, L, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mapo_jax.model.attention import MASKED
from mapo_jax.model.qwen import Params, QwenConfig


def logits(
    params: Params, config: QwenConfig, hidden: Float[Array, "... D"], *, vocabulary_size: int | None = None
) -> Float[Array, "... V"]:
    """Float32 logits.

    Args:
      vocabulary_size: ids from here on are no tokens (the embedding has more rows than the tokenizer has
        ids); their logits are -1e30, so that they have probability 0 and are never sampled.
    """
    if config.tie_word_embeddings:
        kernel, axis = params["embed"]["embedding"], 1
    else:
        kernel, axis = params["head"]["kernel"], 0
    scores = jax.lax.dot_general(
        hidden,
        kernel.astype(hidden.dtype),
        (((hidden.ndim - 1,), (axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if vocabulary_size is None or vocabulary_size >= config.vocab_size:
        return scores
    return jnp.where(jnp.arange(config.vocab_size) < vocabulary_size, scores, MASKED)


def token_logprobs(
    params: Params,
    config: QwenConfig,
    hidden: Float[Array, "B L D"],
    targets: Int[Array, "B L"],
    wanted: Bool[Array, "B L"] | None = None,
    *,
    temperature: float = 1.0,
    vocabulary_size: int | None = None,
    chunk: int = 256,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Log-probability of each target, and the entropy of the distribution it comes from.

    The distribution is softmax(logits / temperature). About `chunk` tokens are taken at a time, the same
    columns of every row, and their logits are recomputed in the backward pass: memory is that of one
    [chunk, V] array.

    Args:
      wanted: columns in which no row wants anything are mostly skipped, a chunk at a time, and give 0; so
        it pays to have what is wanted in the first columns.

    Returns:
      (log-probabilities, entropies), float32, in nats.
    """
    batch, length, _ = hidden.shape
    width = max(1, min(length, chunk // batch))

    @jax.checkpoint
    def score(states, ids):
        scores = logits(params, config, states, vocabulary_size=vocabulary_size) / temperature
        normaliser = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, ids[..., None], axis=-1)[..., 0]
        mean = jnp.sum(jnp.exp(scores - normaliser[..., None]) * scores, axis=-1)
        return chosen - normaliser, normaliser - mean

    def skip(states, ids):
        nothing = jnp.zeros(ids.shape, jnp.float32)
        return nothing, nothing

    def columns(array):
        padded = jnp.pad(array, ((0, 0), (0, -length % width), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, -1, width, *array.shape[2:]), 1, 0)

    if wanted is None:
        wanted = jnp.ones(targets.shape, bool)
    chunks = (columns(hidden), columns(targets), columns(wanted))
    found = jax.lax.map(lambda part: jax.lax.cond(jnp.any(part[2]), score, skip, *part[:2]), chunks)
    return tuple(jnp.moveaxis(part, 0, 1).reshape(batch, -1)[:, :length] for part in found)
