"""Rewards of the turns, from the positions of the user's latent state (MAPO, arXiv 2603.06194).

Positions `P_0 .. P_T` are points (C, A, P) on the last axis, T + 1 of them on the axis before it: negative
numbers are support that is still lacking, the origin is equilibrium. Every function takes any leading axes,
usually `[S, R]`, and no mask: the caller masks the turns that do not exist. JAX arrays are computed with JAX,
in their dtype; anything else with numpy, in float64. So training, evaluation and reports share one formula.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType, ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mapo_jax.algorithm import cells
from mapo_jax.algorithm.cells import Mask, Values

MARGIN = 1.0  # eps of the distance
POTENTIAL_SCALE = 9.0  # a of the potential
POTENTIAL_DISCOUNT = 0.99  # g of the potential's shaping term


def distance(positions: Float[Array, "*cells 3"]) -> Float[Array, "*cells"]:
    """Half-space distance `D(P) = sqrt(sum_i max(0, -eps - P_i)^2)`, eps = 1.

    An axis that lacks at most eps counts as 0, so overshoot earns nothing. Source: EMPA's published code.

    Raises:
      ValueError: the last axis is not (C, A, P).
    """
    xp, points = _points(positions)
    return _norm(xp, xp.maximum(0.0, -MARGIN - points))


def incremental(distances: Float[Array, "*rollouts T+1"]) -> Float[Array, "*rollouts T"]:
    """Incremental distance reward, `r_t = D(P_{t-1}) - D(P_t)`: the progress of this turn. The default."""
    return distances[..., :-1] - distances[..., 1:]


def absolute(distances: Float[Array, "*rollouts T+1"]) -> Float[Array, "*rollouts T"]:
    """Absolute distance reward, `r_t = -D(P_t)`: the paper's baseline, which includes earlier progress."""
    return -distances[..., 1:]


def increment_sum(positions: Float[Array, "*rollouts T+1 3"]) -> Float[Array, "*rollouts T"]:
    """`r_t = sum_i (P_t - P_{t-1})_i`: the three increments, added (published code).

    Raises:
      ValueError: the last axis is not (C, A, P).
    """
    xp, points = _points(positions)
    return xp.sum(xp.diff(points, axis=-2), axis=-1)


def potential(positions: Float[Array, "*rollouts T+1 3"]) -> Float[Array, "*rollouts T"]:
    """`r_t = g Phi(P_t) - Phi(P_{t-1})` with `Phi(P) = a/(a + |P|)`, a = 9, g = 0.99 (published code).

    Raises:
      ValueError: the last axis is not (C, A, P).
    """
    phi = POTENTIAL_SCALE / (POTENTIAL_SCALE + _norm(*_points(positions)))
    return POTENTIAL_DISCOUNT * phi[..., 1:] - phi[..., :-1]


REWARDS: MappingProxyType[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "incremental": lambda positions: incremental(distance(positions)),
        "absolute": lambda positions: absolute(distance(positions)),
        "sum": increment_sum,
        "potential": potential,
    }
)
"""Name in the configuration -> function from positions `[..., T+1, 3]` to rewards `[..., T]`."""


def impute_missing(rewards: Values, valid: Mask, scored: Mask | None = None) -> Values:
    """Gives an unscored turn the mean of its rollout's scored rewards.

    `r[s,r,t] = mean over scored t' of r[s,r,t']` where valid and not scored: earlier turns keep a defined
    return, and the unscored turn still counts as one discount step (published code). A rollout without any
    scored turn gets 0; it is in no statistic either way.

    Returns:
      Rewards, unchanged where scored, 0 outside `valid`.

    Raises:
      ValueError: arrays that are not `[S, R, T]`, or masks that are not boolean of that shape.
    """
    scored = cells.scored_cells(valid, scored)
    rewards = cells.masked(rewards, scored)
    count = jnp.maximum(jnp.sum(scored, axis=-1, keepdims=True), 1)
    mean = jnp.sum(rewards, axis=-1, keepdims=True) / count
    return jnp.where(scored, rewards, jnp.where(valid, mean, 0.0))


def _points(positions: Float[Array, "*cells 3"]) -> tuple[ModuleType, Float[Array, "*cells 3"]]:
    """The module that computes with these positions, and the positions as its array."""
    xp, points = (jnp, positions) if isinstance(positions, jax.Array) else (np, np.asarray(positions, float))
    if points.ndim == 0 or points.shape[-1] != 3:
        raise ValueError(f"positions have the axes C, A, P last, not shape {points.shape}")
    return xp, points


def _norm(xp: ModuleType, vectors: Float[Array, "*cells 3"]) -> Float[Array, "*cells"]:
    return xp.sqrt(xp.sum(vectors * vectors, axis=-1))
