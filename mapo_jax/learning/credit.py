"""The credit of every turn: from positions to rewards, returns and advantages, one compiled function each.

Training and the report both use them. Statistics are over all cells given: pass the whole batch of a step,
before it is cut into mini-batches.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mapo_jax.algorithm.advantages import ESTIMATORS, RETURN_ESTIMATORS, estimator_options
from mapo_jax.algorithm.cells import Mask, Values
from mapo_jax.algorithm.returns import monte_carlo
from mapo_jax.algorithm.rewards import REWARDS
from mapo_jax.config import AlgorithmConfig


@partial(jax.jit, static_argnames="algorithm")
def turn_rewards(
    positions: Float[np.ndarray, "S R T+1 3"], scored: Mask, *, algorithm: AlgorithmConfig
) -> Values:
    """The reward of every scored turn, 0 elsewhere; by default `r_t = D(P_{t-1}) - D(P_t)` (`rewards.py`)."""
    return jnp.where(scored, REWARDS[algorithm.reward](positions), 0.0)


@partial(jax.jit, static_argnames="algorithm")
def turn_returns(rewards: Values, valid: Mask, scored: Mask, *, algorithm: AlgorithmConfig) -> Values:
    """Monte Carlo returns `G_t = sum_{k >= t} discount^(k-t) r_k`, 0 outside `valid` (`returns.py`)."""
    return monte_carlo(rewards, valid, scored, discount=algorithm.discount)


@partial(jax.jit, static_argnames="algorithm")
def turn_advantages(
    rewards: Values, returns: Values, valid: Mask, scored: Mask, *, algorithm: AlgorithmConfig
) -> Values:
    """Advantages by the configured estimator (`advantages.py`; by default `mapo`), 0 outside `scored`."""
    options = estimator_options(algorithm)
    if algorithm.estimator in RETURN_ESTIMATORS:
        options |= {"returns": returns}
    return ESTIMATORS[algorithm.estimator](rewards, valid, scored, **options)
