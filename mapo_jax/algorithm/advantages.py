"""Advantages of the turns: MAPO's turn-level and batch-level terms, their mix, and the baselines.

Every estimator of `ESTIMATORS` is a pure function

    f(rewards, valid, scored=None, *, its options) -> advantages

of arrays `[S, R, T]`: S scenarios, R rollouts of each from one start, T turns. `valid` marks the turns that
exist, `scored` those that have a reward (default: all valid ones). Unscored turns are imputed for the return
and are in no statistic. The advantages are 0 outside `scored`, and values outside the masks have no effect.
Estimators of returns accept them as `returns` (`returns.monte_carlo`, with the same discount), and compute
them otherwise. All tokens that the policy sampled in turn t of rollout (s, r) get `A[s, r, t]`.

Statistics are over the whole batch of a step: call these before it is cut into mini-batches. Standard
deviations are of the population. Each function raises ValueError for arrays that are not `[S, R, T]` and for
masks that are not boolean of that shape, and TypeError for an unknown option.

Source, where nothing else is named: MAPO (arXiv 2603.06194).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mapo_jax.algorithm import cells
from mapo_jax.algorithm.cells import Mask, Values
from mapo_jax.algorithm.returns import monte_carlo
from mapo_jax.algorithm.rewards import impute_missing
from mapo_jax.config import AlgorithmConfig

DISCOUNT = 0.85  # gamma of the published runs
TURN_WEIGHT = 1 / 3  # optimal according to the method's first text
EPSILON = 1e-6  # added to a standard deviation before dividing by it
RELATIVE_ZERO = 1e-5  # a deviation below this share of the values' size is rounding, not a difference

ROLLOUTS = (1,)  # axes of a cell: the rollouts of one scenario at one turn
BATCH_SCOPES = MappingProxyType({"batch": (0, 1, 2), "group": (1, 2)})


# --- The two steps of every estimator: centre, then (or not) divide by the deviation. ---


def centre(
    values: Values, mask: Mask, axes: tuple[int, ...], *, leave_one_out: bool = False, min_count: int = 1
) -> Values:
    """`x - mean(x)` over the masked values along `axes`.

    With `leave_one_out` the mean is that of the *other* values: `x_i - mean_{j != i} x_j`, which equals
    `(x_i - mean(x)) n/(n - 1)`. Only with it, and without division, is the centred return times the score
    function an unbiased estimate of the policy gradient: the baseline then does not depend on x_i.

    Returns:
      Centred values; 0 outside `mask` and where fewer than `min_count` values are along the axes
      (with `leave_one_out`, at least two).
    """
    values = cells.masked(values, mask)
    count = jnp.sum(mask, axis=axes, keepdims=True)
    centred = values - jnp.sum(values, axis=axes, keepdims=True) / jnp.maximum(count, 1)
    if leave_one_out:
        min_count = max(min_count, 2)
        centred = centred * count / jnp.maximum(count - 1, 1)
    return jnp.where(mask & (count >= min_count), centred, 0.0)


def z_score(
    values: Values, mask: Mask, axes: tuple[int, ...], *, leave_one_out: bool = False, min_count: int = 1
) -> Values:
    """`(x - mean(x)) / (std(x) + e)` over the masked values along `axes`, e = 1e-6.

    `leave_one_out` concerns the mean alone; the deviation is that of all values. Where it is rounding error,
    `std <= 1e-5 max(1, max|x|)`, the result is 0: in float32 equal values rarely have a deviation of exactly
    0, and their quotient could reach 1.

    Returns:
      Normalised values; 0 outside `mask` and where fewer than `min_count` values are along the axes.
    """
    values = cells.masked(values, mask)
    count = jnp.maximum(jnp.sum(mask, axis=axes, keepdims=True), 1)
    variance = jnp.sum(centre(values, mask, axes) ** 2, axis=axes, keepdims=True) / count
    largest = jnp.max(jnp.abs(values), axis=axes, keepdims=True)
    differs = variance > (RELATIVE_ZERO * jnp.maximum(1.0, largest)) ** 2
    # The square root sees 1 where there is no difference, so that its gradient exists there too.
    deviation = jnp.sqrt(jnp.where(differs, variance, 1.0))
    centred = centre(values, mask, axes, leave_one_out=leave_one_out, min_count=min_count)
    return jnp.where(differs, centred / (deviation + EPSILON), 0.0)


# --- MAPO. ---


def turn_level(returns: Values, scored: Mask, *, leave_one_out: bool = False, min_group: int = 2) -> Values:
    """`A_turn[s,r,t] = (G[s,r,t] - mean_r G[s,:,t]) / (std_r G[s,:,t] + e)` over the scored rollouts.

    Compares a turn with the same turn of the other rollouts from the same start. First the return, then the
    normalisation: normalising immediate rewards and accumulating afterwards loses the gradient wherever the
    policy influences when the dialogue ends.

    Args:
      returns: discounted returns.
      scored: the turns that have a score.
      leave_one_out: centre on the mean of the other rollouts.
      min_group: a (scenario, turn) cell with fewer scored rollouts has no statistics; its term is 0.
    """
    return z_score(returns, scored, ROLLOUTS, leave_one_out=leave_one_out, min_count=min_group)


def batch_level(rewards: Values, scored: Mask, *, batch_scope: str = "batch") -> Values:
    """`A_batch = (r - mean r) / (std r + e)`: the immediate reward against all scored turns.

    Args:
      rewards: immediate rewards.
      scored: the turns that have a score.
      batch_scope: "batch", statistics of the whole batch (first version of the paper); or "group", of the
        scenario's own rollouts and turns ("group level" in later versions).

    Raises:
      ValueError: also for an unknown scope.
    """
    if batch_scope not in BATCH_SCOPES:
        raise ValueError(f"batch_scope is {batch_scope!r}; it must be one of {', '.join(BATCH_SCOPES)}")
    return z_score(rewards, scored, BATCH_SCOPES[batch_scope])


def mapo(
    rewards: Values,
    valid: Mask,
    scored: Mask | None = None,
    *,
    returns: Values | None = None,
    discount: float = DISCOUNT,
    turn_weight: float = TURN_WEIGHT,
    batch_scope: str = "batch",
    leave_one_out: bool = False,
    min_group: int = 2,
) -> Values:
    """`A = w A_turn + (1 - w) A_batch`: the mixed advantage, w = `turn_weight`."""
    scored = cells.scored_cells(valid, scored)
    if returns is None:
        returns = monte_carlo(rewards, valid, scored, discount=discount)
    turn_term = turn_level(returns, scored, leave_one_out=leave_one_out, min_group=min_group)
    return turn_weight * turn_term + (1 - turn_weight) * batch_level(rewards, scored, batch_scope=batch_scope)


def turn(
    rewards: Values,
    valid: Mask,
    scored: Mask | None = None,
    *,
    returns: Values | None = None,
    discount: float = DISCOUNT,
    leave_one_out: bool = False,
    min_group: int = 2,
) -> Values:
    """`A_turn` of the discounted returns alone: `mapo` with w = 1."""
    scored = cells.scored_cells(valid, scored)
    if returns is None:
        returns = monte_carlo(rewards, valid, scored, discount=discount)
    return turn_level(returns, scored, leave_one_out=leave_one_out, min_group=min_group)


def batch(rewards: Values, valid: Mask, scored: Mask | None = None, *, batch_scope: str = "batch") -> Values:
    """`A_batch` of the immediate rewards alone: `mapo` with w = 0."""
    return batch_level(rewards, cells.scored_cells(valid, scored), batch_scope=batch_scope)


# --- Baselines. ---


def totals(rewards: Values, valid: Mask, scored: Mask) -> tuple[Float[Array, "S R 1"], Bool[Array, "S R 1"]]:
    """Undiscounted total reward of every rollout, imputed turns included, and which rollouts have a score."""
    total = jnp.sum(impute_missing(rewards, valid, scored), axis=-1, keepdims=True)
    return total, jnp.any(scored, axis=-1, keepdims=True)


def grpo(rewards: Values, valid: Mask, scored: Mask | None = None, *, min_group: int = 2) -> Values:
    """`(R - mean R) / (std R + e)`, R the rollout's total over its scenario's rollouts; one for all turns.

    Outcome credit alone. Source: GRPO (arXiv 2402.03300).
    """
    scored = cells.scored_cells(valid, scored)
    outcome = z_score(*totals(rewards, valid, scored), ROLLOUTS, min_count=min_group)
    return jnp.where(scored, outcome, 0.0)


def grpo_per_turn(rewards: Values, valid: Mask, scored: Mask | None = None, *, min_group: int = 2) -> Values:
    """`(r - mean_r r) / (std_r r + e)` per (scenario, turn): the immediate reward, no return."""
    return turn_level(rewards, cells.scored_cells(valid, scored), min_group=min_group)


def reinforce_plus_plus(
    rewards: Values,
    valid: Mask,
    scored: Mask | None = None,
    *,
    returns: Values | None = None,
    discount: float = DISCOUNT,
) -> Values:
    """`(G - mean G) / (std G + e)` over the whole batch. Source: REINFORCE++ (arXiv 2501.03262)."""
    scored = cells.scored_cells(valid, scored)
    if returns is None:
        returns = monte_carlo(rewards, valid, scored, discount=discount)
    return z_score(returns, scored, BATCH_SCOPES["batch"])


def rloo(rewards: Values, valid: Mask, scored: Mask | None = None, *, min_group: int = 2) -> Values:
    """`R_i - mean_{j != i} R_j`: the total minus that of the other rollouts. Source: arXiv 2402.14740."""
    scored = cells.scored_cells(valid, scored)
    outcome = centre(*totals(rewards, valid, scored), ROLLOUTS, leave_one_out=True, min_count=min_group)
    return jnp.where(scored, outcome, 0.0)


def dr_grpo(rewards: Values, valid: Mask, scored: Mask | None = None, *, min_group: int = 2) -> Values:
    """`R_i - mean R`: the total minus the group's mean, no division. Source: Dr. GRPO (arXiv 2503.20783)."""
    scored = cells.scored_cells(valid, scored)
    outcome = centre(*totals(rewards, valid, scored), ROLLOUTS, min_count=min_group)
    return jnp.where(scored, outcome, 0.0)


def mt_grpo(
    rewards: Values,
    valid: Mask,
    scored: Mask | None = None,
    *,
    outcome_weight: float = 1.0,
    min_group: int = 2,
) -> Values:
    """`A_t = A_grpo_per_turn + outcome_weight A_grpo`; in a rollout's last turn `A_grpo` alone.

    Source: MT-GRPO (arXiv 2505.11821).
    """
    scored = cells.scored_cells(valid, scored)
    outcome = grpo(rewards, valid, scored, min_group=min_group)
    immediate = grpo_per_turn(rewards, valid, scored, min_group=min_group)
    continues = jnp.pad(jnp.asarray(valid)[..., 1:], [(0, 0), (0, 0), (0, 1)])  # False in the last turn
    return jnp.where(continues, immediate + outcome_weight * outcome, outcome)


_ALL = (mapo, grpo, turn, batch, grpo_per_turn, reinforce_plus_plus, rloo, dr_grpo, mt_grpo)
ESTIMATORS: MappingProxyType[str, Callable[..., Array]] = MappingProxyType({f.__name__: f for f in _ALL})
"""Name in the configuration -> estimator."""


RETURN_ESTIMATORS = ("mapo", "turn", "reinforce_plus_plus")
"""Names of those that take `returns`."""


_TURN_OPTIONS = ("discount", "leave_one_out")
_OPTIONS = {  # keys of the configuration; the other estimators have none
    "mapo": (*_TURN_OPTIONS, "turn_weight", "batch_scope"),
    "turn": _TURN_OPTIONS,
    "batch": ("batch_scope",),
    "reinforce_plus_plus": ("discount",),
}


def estimator_options(config: AlgorithmConfig) -> dict[str, Any]:
    """The options of `ESTIMATORS[config.estimator]`, except `returns`."""
    return config.model_dump(include=set(_OPTIONS.get(config.estimator, ())))
