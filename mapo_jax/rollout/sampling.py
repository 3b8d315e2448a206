"""Sampling tokens: keyed random numbers, and inversion of the cumulative distribution.

The random number of a token follows from (seed, step, dialogue, turn, position) alone, so that a dialogue's
tokens depend neither on its slot, nor on other dialogues, nor on the order in which users answer.

One uniform number and two short cumulative sums choose the token; Gumbel noise would draw a random number
for every entry of the vocabulary (measured on a CPU, 64 rows of 1,024: 0.08 ms against 1.25 ms).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from mapo_jax.errors import UserError

KEY_WORDS = 4  # seed, step, dialogue, turn
ALTERNATIVES = 20  # most probable tokens that are reported


@dataclass(frozen=True)
class Sampling:
    """The distribution that is sampled from, given the logits. The steps apply in the order of the fields."""

    repetition_penalty: float = 1.0  # see `penalise`; 1: none
    temperature: float = 1.0  # logits are divided by it; 0: always the most probable token
    top_k: int = 0  # only the k most probable tokens (more if the k-th is tied); 0: all
    top_p: float = 1.0  # only the fewest most probable tokens that hold this probability; 1: all
    min_p: float = 0.0  # only tokens at least this many times as probable as the most probable; 0: all

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        for name, valid in (
            ("repetition_penalty", self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)),
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature)),
            ("top_k", self.top_k >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("min_p", 0 <= self.min_p <= 1),
        ):
            if not valid:
                raise UserError(f"sampling: `{name}` is {getattr(self, name)!r}, which is out of range")


@dataclass(frozen=True)
class RequestSampling(Sampling):
    """The distribution of one reply. The two penalties act before the temperature."""

    presence_penalty: float = 0.0  # subtracted from the logit of every token that is in the reply already
    frequency_penalty: float = 0.0  # the same, as often as the token is in the reply

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        super().__post_init__()
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"sampling: `{name}` is {getattr(self, name)!r}, which is out of range")

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens matter: there is a penalty."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class LaneSampling(NamedTuple):
    """The distributions of all lanes, as arrays [K]; fields as of RequestSampling."""

    repetition_penalty: Array
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    presence_penalty: Array
    frequency_penalty: Array

    @classmethod
    def of(cls, lanes: Sequence[RequestSampling]) -> LaneSampling:
        """The lanes' settings as numpy arrays."""
        kinds = {"top_k": np.int32}
        return cls(
            *(np.array([getattr(lane, f) for lane in lanes], kinds.get(f, np.float32)) for f in cls._fields)
        )

    @property
    def penalises(self) -> Bool[Array, ""]:
        """Whether any lane has a penalty."""
        neutral = (
            (self.repetition_penalty == 1) & (self.presence_penalty == 0) & (self.frequency_penalty == 0)
        )
        return ~jnp.all(neutral)


def uniforms(words: UInt32[Array, "K 4"], positions: Int[Array, "K N"]) -> Float[Array, "K N"]:
    """One number in [0, 1) for each position of each dialogue.

    Args:
      words: (seed, step, dialogue, turn) of each row.
      positions: index of the token in its row.
    """

    def row(words, positions):
        key = jax.random.key(words[0])
        for word in words[1:]:
            key = jax.random.fold_in(key, word)
        return jax.vmap(lambda position: jax.random.uniform(jax.random.fold_in(key, position)))(positions)

    return jax.vmap(row)(words, positions)


def penalise(logits: Float[Array, "K V"], seen: Bool[Array, "K V"], penalty: float) -> Float[Array, "K V"]:
    """Makes tokens that are already in the row less probable: positive logits / penalty, others x penalty.

    Keskar et al. 2019, arXiv:1909.05858, as transformers applies it: prompt and reply alike, before the
    temperature.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


IN_PROMPT = 2**20  # added to the count of a token that is in the prompt; no reply is that long


def count_tokens(tokens: Int[Array, "K N"], replies: Int[Array, " K"], size: int) -> Int[Array, "K V"]:
    """How often each token is in each reply so far, plus IN_PROMPT if it is in the prompt.

    Args:
      tokens: the rows; entries from `size` on are padding.
      replies: where the reply begins in each row.
      size: V.
    """
    lanes = jnp.arange(len(tokens))[:, None]
    in_reply = jnp.arange(tokens.shape[1]) >= replies[:, None]
    counts = jnp.zeros((len(tokens), size), jnp.int32)
    counts = counts.at[lanes, jnp.where(in_reply, size, tokens)].max(IN_PROMPT, mode="drop")
    return counts.at[lanes, jnp.where(in_reply, tokens, size)].add(1, mode="drop")


def penalise_each(
    logits: Float[Array, "K V"], counts: Int[Array, "K V"], lanes: LaneSampling
) -> Float[Array, "K V"]:
    """`penalise` with each lane's penalty, then the presence and frequency penalties of OpenAI's protocol.

    Args:
      counts: of `count_tokens`.
    """
    logits = penalise(logits, counts > 0, lanes.repetition_penalty[:, None])
    replied = counts % IN_PROMPT
    logits = logits - jnp.where(replied > 0, lanes.presence_penalty[:, None], 0)
    return logits - replied * lanes.frequency_penalty[:, None]


def shape_each(logits: Float[Array, "K V"], lanes: LaneSampling) -> Float[Array, "K V"]:
    """`shape` with each lane's settings; a lane of temperature 0 is left as at temperature 1."""
    logits = logits.astype(jnp.float32) / jnp.where(lanes.temperature > 0, lanes.temperature, 1)[:, None]
    size = logits.shape[-1]

    def filtered(logits):
        descending = jnp.sort(logits, axis=-1, descending=True)
        top_k = jnp.where(lanes.top_k > 0, jnp.minimum(lanes.top_k, size), size)[:, None]
        allowed = descending >= jnp.take_along_axis(descending, top_k - 1, axis=-1)
        probabilities = jax.nn.softmax(jnp.where(allowed, descending, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the more probable tokens
        top_p = lanes.top_p[:, None]
        kept = jnp.sum(allowed & ((before < top_p) | (top_p >= 1)), axis=-1, keepdims=True)
        return jnp.where(logits >= jnp.take_along_axis(descending, kept - 1, axis=-1), logits, -jnp.inf)

    needed = jnp.any((lanes.top_k > 0) | (lanes.top_p < 1))  # sorting a vocabulary takes long
    logits = jax.lax.cond(needed, filtered, lambda logits: logits, logits)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    lowest = jnp.where(lanes.min_p > 0, highest[:, 0] + jnp.log(lanes.min_p), -jnp.inf)
    return jnp.where(logits >= lowest[:, None], logits, -jnp.inf)


def sample_each(
    logits: Float[Array, "K V"], uniform: Float[Array, " K"], lanes: LaneSampling
) -> tuple[Int[Array, " K"], Float[Array, " K"]]:
    """`sample` with each lane's settings."""
    drawn, logprobs = draw(shape_each(logits, lanes), uniform)
    greedy = lanes.temperature == 0
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(greedy, likeliest, drawn), jnp.where(greedy, 0.0, logprobs)


def alternatives(
    logits: Float[Array, "K V"], chosen: Int[Array, " K"], count: int
) -> tuple[Float[Array, " K"], Int[Array, "K A"], Float[Array, "K A"]]:
    """Log-probability of the chosen tokens, and the `count` most probable ones with theirs."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    top, ids = jax.lax.top_k(logprobs, count)
    return jnp.take_along_axis(logprobs, chosen[:, None], axis=-1)[:, 0], ids.astype(jnp.int32), top


def shape(logits: Float[Array, "K V"], sampling: Sampling) -> Float[Array, "K V"]:
    """Logits of the distribution that is sampled from (temperature above 0): tempered, then filtered."""
    logits = logits.astype(jnp.float32) / sampling.temperature
    size = logits.shape[-1]
    if 0 < sampling.top_k < size:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the more probable tokens
        kept = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True)
        logits = jnp.where(logits >= jnp.take_along_axis(descending, kept - 1, axis=-1), logits, -jnp.inf)
    if sampling.min_p > 0:
        highest = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits >= highest + math.log(sampling.min_p), logits, -jnp.inf)
    return logits


def sample(
    logits: Float[Array, "K V"], uniform: Float[Array, " K"], sampling: Sampling
) -> tuple[Int[Array, " K"], Float[Array, " K"]]:
    """Draws a token for each row.

    Args:
      logits: entries of -1e30 or less have probability 0; a row must have one that is more.
      uniform: a number in [0, 1) for each row.

    Returns:
      (ids, log-probabilities of the ids in the distribution sampled from, float32). With temperature 0 that
      distribution is a point: the log-probability is 0.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0], jnp.float32)
    return draw(shape(logits, sampling), uniform)


def draw(
    logits: Float[Array, "K V"], uniform: Float[Array, " K"]
) -> tuple[Int[Array, " K"], Float[Array, " K"]]:
    """Draws from the softmax of logits; arguments and results as of `sample`.

    The vocabulary is cut into about sqrt(V) blocks; the number first picks a block by the blocks' masses,
    then a token within it. A token of probability 0 is never picked, whatever the rounding; a float32 number
    has 2^23 values, so probabilities are exact to about 1e-7.
    """
    rows, size = logits.shape
    width = max(1, math.isqrt(size))
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    blocks = jnp.pad(weights, ((0, 0), (0, -size % width))).reshape(rows, -1, width)
    masses = jnp.sum(blocks, axis=-1)
    totals = jnp.cumsum(masses, axis=-1)
    target = uniform * totals[:, -1]
    block = _first_above(totals, masses, target)[:, None]
    inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    reached = jnp.take_along_axis(totals - masses, block, axis=1)[:, 0]
    offset = _first_above(jnp.cumsum(inside, axis=-1), inside, target - reached)
    ids = block[:, 0] * width + offset
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return ids.astype(jnp.int32), chosen - highest[:, 0] - jnp.log(totals[:, -1])


def _first_above(
    totals: Float[Array, "K N"], weights: Float[Array, "K N"], target: Float[Array, " K"]
) -> Int[Array, " K"]:
    """The first entry whose running total exceeds the target and whose weight is not 0; else the heaviest."""
    fits = (totals > target[:, None]) & (weights > 0)
    return jnp.where(jnp.any(fits, axis=-1), jnp.argmax(fits, axis=-1), jnp.argmax(weights, axis=-1))
