"""The objective: clipped surrogate with dual clip, KL, entropy; aggregated so that micro-batches add up.

Arrays are `[B, L]`: B rows of L tokens. `mask` marks the loss tokens (sampled by the policy, in a scored
turn); values elsewhere, NaN included, have no effect. All log-probabilities are of the distribution that was
sampled from. Losses are to be minimised.

A mini-batch may be computed in micro-batches: every sum is divided by the *mini-batch's* `Denominator`, so
that the losses, gradients and metrics of its micro-batches add up to those of the whole, whatever the cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mapo_jax.config import AlgorithmConfig

Tokens = Float[Array, "B L"]
Mask = Bool[Array, "B L"]

LARGEST_LOG_RATIO = 20.0  # exp(20) = 5e8 is past every clip; beyond it float32 would only overflow


class Denominator(NamedTuple):
    """The divisors of a mini-batch's sums."""

    loss: Float[Array, ""]  # follows from the aggregation
    tokens: Float[Array, ""]  # loss tokens: for the metrics, which are means over tokens


# --- Per token. ---


def importance_ratio(logprobs: Tokens, old_logprobs: Tokens) -> Tokens:
    """`rho = pi(token)/pi_old(token) = exp(logprobs - old_logprobs)`, the exponent kept within +-20."""
    return jnp.exp(jnp.clip(logprobs - old_logprobs, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))


class Surrogate(NamedTuple):
    """The clipped surrogate of every token, and where it is clipped (there the gradient is 0)."""

    loss: Tokens
    clipped: Mask  # by clip_low or clip_high
    dual_clipped: Mask  # by dual_clip


def clipped_surrogate(
    ratio: Tokens, advantages: Tokens, *, clip_low: float, clip_high: float, dual_clip: float
) -> Surrogate:
    """PPO's surrogate with separate clips and a bound for negative advantages.

      loss = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)              for A >= 0
      loss = -max(min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), c A)    for A < 0, c = dual_clip

    For A >= 0 the upper clip binds, for A < 0 the lower one and c; a ratio exactly on a bound is not
    clipped. Sources: PPO (arXiv 1707.06347), DAPO (arXiv 2503.14476) for the two clips, dual clip
    (arXiv 1912.09729).
    """
    positive = advantages >= 0
    bound = jnp.where(positive, 1.0 + clip_high, 1.0 - clip_low)
    clipped = jnp.where(positive, ratio > bound, ratio < bound)
    dual_clipped = ~positive & (ratio > dual_clip)
    effective = jnp.where(clipped, bound, jnp.where(dual_clipped, dual_clip, ratio))
    return Surrogate(-effective * advantages, clipped, dual_clipped)


def kl_divergence(logprobs: Tokens, reference_logprobs: Tokens, estimator: str) -> Tokens:
    """Estimates `KL(pi || reference)` from the sampled tokens; x = log pi - log reference.

      k1 = x                  unbiased; as a loss, its gradient is 0 in expectation: for monitoring
      k2 = x^2 / 2            biased; as a loss, its gradient is that of KL(pi || reference), on-policy
      k3 = exp(-x) - 1 + x    unbiased, never negative; its gradient is that of KL(reference || pi)

    Source: J. Schulman, "Approximating KL divergence" (2020); k3 in GRPO (arXiv 2402.03300).

    Raises:
      ValueError: an unknown estimator.
    """
    x = logprobs - reference_logprobs
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * x**2
    if estimator == "k3":
        return importance_ratio(reference_logprobs, logprobs) - 1.0 + x
    raise ValueError(f"the KL estimator is {estimator!r}; it must be one of k1, k2, k3")


def truncated_importance_weights(
    trainer_logprobs: Tokens, sampler_logprobs: Tokens, mask: Mask, cap: float
) -> Tokens:
    """`min(pi_trainer(token)/pi_sampler(token), cap)`: corrects the difference of sampler and trainer.

    Both are of the same weights, before the first update of the step. Constant under differentiation; 1
    outside the mask. Source: F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training" (2025).
    """
    trainer_logprobs, sampler_logprobs = _masked(mask, trainer_logprobs, sampler_logprobs)
    weights = jnp.minimum(importance_ratio(trainer_logprobs, sampler_logprobs), cap)
    return jax.lax.stop_gradient(jnp.where(mask, weights, 1.0))


# --- Aggregation. ---


def loss_denominator(
    mask: Mask, *, aggregation: str = "token-mean", constant_length: int | None = None
) -> Denominator:
    """The denominators of a whole mini-batch, from its loss mask; pass them with each of its micro-batches.

    Args:
      mask: loss tokens of the whole mini-batch.
      aggregation: what `Denominator.loss` counts:
        "token-mean": the loss tokens; every token weighs the same.
        "sequence-mean": the rows that have loss tokens; every row weighs the same, through its own mean.
        "constant-length": those rows times `constant_length`: sums over the tokens that are not normalised
          by any actual length (Dr. GRPO, arXiv 2503.20783).
      constant_length: "constant-length" only: a fixed length, the most loss tokens that a row can have.

    Raises:
      ValueError: an unknown aggregation, or "constant-length" without a length.
    """
    tokens = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    rows = jnp.maximum(jnp.sum(jnp.any(mask, axis=-1), dtype=jnp.float32), 1.0)
    if aggregation == "token-mean":
        return Denominator(tokens, tokens)
    if aggregation == "sequence-mean":
        return Denominator(rows, tokens)
    if aggregation == "constant-length":
        if constant_length is None:
            raise ValueError("the aggregation constant-length needs a constant_length")
        return Denominator(rows * constant_length, tokens)
    raise ValueError(f"the aggregation is {aggregation!r}, not token-mean, sequence-mean or constant-length")


def aggregate(
    values: Tokens, mask: Mask, total: Float[Array, ""] | float, *, aggregation: str = "token-mean"
) -> Float[Array, ""]:
    """Sum of the masked values (for "sequence-mean", of the rows' masked means), divided by `total`.

    Args:
      values: one number per token; anything outside the mask.
      mask: loss tokens of these rows.
      total: `Denominator.loss` of the whole mini-batch.
      aggregation: as in `loss_denominator`.
    """
    (values,) = _masked(mask, values)
    sums = jnp.sum(values, axis=-1)
    if aggregation == "sequence-mean":
        sums = sums / jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return jnp.sum(sums) / total


# --- The loss. ---


def policy_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    aggregation: str = "token-mean",
    constant_length: int | None = None,
    weights: Tokens | None = None,
    reference_logprobs: Tokens | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tokens | None = None,
    entropy_coefficient: float = 0.0,
    denominator: Denominator | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`mean(weights * surrogate) + kl_coefficient mean(KL) - entropy_coefficient mean(entropy)`.

    The mean is that of `aggregation`. The gradient flows through `logprobs` and `entropy` alone.

    Args:
      logprobs: of the policy that is being trained.
      old_logprobs: denominator of the ratio: the sampler's, or the trainer's before the first update.
      advantages: of the token's turn.
      mask: loss tokens.
      clip_low, clip_high, dual_clip: as in `clipped_surrogate`.
      aggregation, constant_length: as in `loss_denominator`.
      weights: `truncated_importance_weights`, if the ratio's denominator is not the sampler's.
      reference_logprobs: of the frozen reference; needed for the KL term.
      kl_coefficient, kl_estimator: as in `kl_divergence`.
      entropy: of the policy at every loss token; needed for the bonus, reported whenever given.
      entropy_coefficient: weight of the entropy bonus.
      denominator: of the whole mini-batch, if these rows are a micro-batch; default: of these rows.

    Returns:
      The loss, and metrics: `pg_loss` (the surrogate's part of the loss); the means over tokens
      `clip_fraction`, `dual_clip_fraction`, `approx_kl` (`rho - 1 - log rho`, an estimate of KL(old || new)),
      `ratio_mean`, and where given `entropy`, `kl` (to the reference), `weight_mean`; and `ratio_max`. Those
      of micro-batches combine by `combine_metrics`.

    Raises:
      ValueError: an unknown name; a coefficient above 0 without what it weighs; arrays of other shapes.
    """
    if kl_coefficient and reference_logprobs is None:
        raise ValueError("a KL coefficient above 0 needs reference_logprobs")
    if entropy_coefficient and entropy is None:
        raise ValueError("an entropy coefficient above 0 needs the entropy")
    if denominator is None:
        denominator = loss_denominator(mask, aggregation=aggregation, constant_length=constant_length)
    old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
    logprobs, old_logprobs, advantages = _masked(mask, logprobs, old_logprobs, advantages)

    def loss_mean(values: Tokens) -> Float[Array, ""]:
        return aggregate(values, mask, denominator.loss, aggregation=aggregation)

    def token_mean(values: Tokens) -> Float[Array, ""]:
        return aggregate(values, mask, denominator.tokens)

    ratio = importance_ratio(logprobs, old_logprobs)
    terms = clipped_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    token_loss = terms.loss
    metrics = {
        "clip_fraction": token_mean(terms.clipped),
        "dual_clip_fraction": token_mean(terms.dual_clipped),
        "approx_kl": token_mean(ratio - 1.0 - (logprobs - old_logprobs)),
        "ratio_mean": token_mean(ratio),
        "ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
    }
    if weights is not None:
        (weights,) = _masked(mask, jax.lax.stop_gradient(weights))
        token_loss = weights * token_loss
        metrics["weight_mean"] = token_mean(weights)
    loss = metrics["pg_loss"] = loss_mean(token_loss)
    if reference_logprobs is not None:
        (reference_logprobs,) = _masked(mask, jax.lax.stop_gradient(reference_logprobs))
        kl = kl_divergence(logprobs, reference_logprobs, kl_estimator)
        loss = loss + kl_coefficient * loss_mean(kl)
        metrics["kl"] = token_mean(kl)
    if entropy is not None:
        loss = loss - entropy_coefficient * loss_mean(entropy)
        metrics["entropy"] = token_mean(entropy)
    return loss, jax.lax.stop_gradient(metrics)


def combine_metrics(metrics: Mapping[str, Float[Array, " micro"]]) -> dict[str, Float[Array, ""]]:
    """Metrics of a mini-batch from those of its micro-batches, stacked: sums, of `..._max` the largest."""
    return {name: jnp.max(x) if name.endswith("_max") else jnp.sum(x) for name, x in metrics.items()}


def objective_options(config: AlgorithmConfig) -> dict[str, Any]:
    """The options of `policy_loss` that are configured."""
    names = {"clip_low", "clip_high", "dual_clip", "aggregation", "kl_coefficient", "kl_estimator"}
    return config.model_dump(include=names | {"entropy_coefficient"})


def _masked(mask: Mask, *arrays: Tokens) -> tuple[Tokens, ...]:
    if mask.dtype != bool or mask.ndim != 2:
        raise ValueError(f"the loss mask must be boolean [rows, tokens], not {mask.dtype} {mask.shape}")
    for array in arrays:
        if array.shape != mask.shape:
            raise ValueError(f"an array of shape {array.shape} does not fit the loss mask's {mask.shape}")
    return tuple(jnp.where(mask, jnp.asarray(array, jnp.float32), 0.0) for array in arrays)
