"""Monte Carlo returns with one discount per turn (MAPO, arXiv 2603.06194)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mapo_jax.algorithm import cells
from mapo_jax.algorithm.cells import Mask, Values
from mapo_jax.algorithm.rewards import impute_missing


def discounted_returns(rewards: Values, valid: Mask, discount: float) -> Values:
    """`G_t = sum_{k >= t} discount^(k-t) r_k` over the valid turns: a turn is credited with later effects.

    The discount is per turn, never per token. Turns without a score must be imputed first
    (`rewards.impute_missing`).

    Args:
      rewards: reward of every valid turn; anything elsewhere.
      valid: which turns exist: a prefix of every rollout.
      discount: gamma per turn, in [0, 1]; 1 gives undiscounted sums.

    Returns:
      The returns, 0 outside `valid`.

    Raises:
      ValueError: `rewards` is not `[S, R, T]`, or `valid` not boolean of that shape.
    """
    rewards = cells.masked(rewards, valid)

    def backwards(later: Float[Array, "S R"], reward: Float[Array, "S R"]):
        current = reward + discount * later
        return current, current

    last = jnp.zeros_like(rewards[..., 0])
    _, returns = jax.lax.scan(backwards, last, jnp.moveaxis(rewards, -1, 0), reverse=True)
    return jnp.where(valid, jnp.moveaxis(returns, 0, -1), 0.0)


def monte_carlo(rewards: Values, valid: Mask, scored: Mask | None = None, *, discount: float) -> Values:
    """`discounted_returns` of the rewards with unscored turns imputed (`rewards.impute_missing`).

    Args and errors as of these two.
    """
    return discounted_returns(impute_missing(rewards, valid, scored), valid, discount)
