"""From hidden states to logits and log-probabilities, in float32 and without ever holding [B, L, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    *,
    temperature: float = 1.0,
    vocabulary_size: int | None = None,
    chunk: int = 512,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Log-probability of each target, and the entropy of the distribution it comes from.

    The distribution is softmax(logits / temperature). Tokens are taken `chunk` at a time and the logits of a
    chunk are recomputed in the backward pass: memory is that of one [chunk, V] array.

    Returns:
      (log-probabilities, entropies), float32, in nats.
    """
    batch, length, width = hidden.shape
    count = batch * length
    padding = -count % chunk

    @jax.checkpoint
    def score(pair):
        states, ids = pair
        scores = logits(params, config, states, vocabulary_size=vocabulary_size) / temperature
        normaliser = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, ids[:, None], axis=-1)[:, 0]
        mean = jnp.sum(jnp.exp(scores - normaliser[:, None]) * scores, axis=-1)
        return chosen - normaliser, normaliser - mean

    states = jnp.pad(hidden.reshape(count, width), ((0, padding), (0, 0))).reshape(-1, chunk, width)
    ids = jnp.pad(targets.reshape(count), (0, padding)).reshape(-1, chunk)
    logprobs, entropy = jax.lax.map(score, (states, ids))
    return (
        logprobs.reshape(-1)[:count].reshape(batch, length),
        entropy.reshape(-1)[:count].reshape(batch, length),
    )
