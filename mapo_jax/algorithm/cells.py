"""Checks of arrays `[S, R, T]` and their masks, and zeros for the cells outside a mask.

A cell is one turn of one rollout. `valid` says that the turn exists (a prefix of every rollout), `scored`
that it has a reward (a subset of `valid`; every valid turn by default). A cell outside its mask may hold
anything, NaN included: it is set to 0 before any arithmetic, so that it affects neither values nor gradients.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Values = Float[Array, "S R T"]
Mask = Bool[Array, "S R T"]


def masked(values: Values, mask: Mask) -> Values:
    """`values` in float32, with 0 outside `mask`.

    Raises:
      ValueError: `values` is not `[S, R, T]`, or `mask` is not boolean of the same shape.
    """
    values, mask = jnp.asarray(values, jnp.float32), jnp.asarray(mask)
    if values.ndim != 3:
        raise ValueError(f"expected an array [scenarios, rollouts, turns], got one of shape {values.shape}")
    check_mask(mask, values.shape)
    return jnp.where(mask, values, 0.0)


def check_mask(mask: Bool[Array, "*shape"], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `mask` is boolean and of this shape."""
    if mask.dtype != bool:
        raise ValueError(f"a mask must be boolean, not {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"a mask of shape {mask.shape} does not fit values of shape {shape}")


def scored_cells(valid: Mask, scored: Mask | None) -> Mask:
    """`scored & valid`, or `valid` if `scored` is None.

    Raises:
      ValueError: the masks are not boolean or differ in shape.
    """
    valid = jnp.asarray(valid)
    check_mask(valid, valid.shape)
    if scored is None:
        return valid
    scored = jnp.asarray(scored)
    check_mask(scored, valid.shape)
    return scored & valid
