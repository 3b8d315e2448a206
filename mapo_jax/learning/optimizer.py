"""AdamW and Muon with gradient clipping by global norm, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mapo_jax.config import OptimizerConfig
from mapo_jax.model.qwen import Params

B1 = 0.9  # decay of AdamW's first moment
_ADAM_RMS = 0.2  # of a step of AdamW at learning rate 1, about (arXiv 2502.16982)
_UNDECAYED = ("scale", "bias")  # last name of a parameter's path: norms and biases


class Optimizer(NamedTuple):
    """A gradient transformation, and the learning rate of its i-th update."""

    transform: optax.GradientTransformation
    schedule: Callable[[Int[Array, ""]], Float[Array, ""]]


def learning_rate_schedule(
    peak: float, total_updates: int, *, warmup: float, schedule: str
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """Linear warm-up over the first `warmup` share of the updates, then cosine to 0, or constant.

    With w warm-up updates of N: `peak (i + 1)/w` for update i < w; then
    `peak (1 + cos(pi (i - w)/(N - w)))/2`, or `peak`. No update of the run has rate 0.

    Raises:
      ValueError: an unknown schedule.
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"the schedule is {schedule!r}; it must be cosine or constant")
    rising = min(round(warmup * total_updates), total_updates)

    def rate(update: Int[Array, ""]) -> Float[Array, ""]:
        update = jnp.asarray(update, jnp.float32)
        ramp = jnp.minimum((update + 1) / max(rising, 1), 1.0)
        if schedule == "constant":
            return peak * ramp
        progress = jnp.clip((update - rising) / max(total_updates - rising, 1), 0.0, 1.0)
        return peak * ramp * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return rate


def make_optimizer(config: OptimizerConfig, total_updates: int, *, b2: float = 0.999) -> Optimizer:
    """AdamW (arXiv 1711.05101) after clipping by the gradient's global norm.

    Decay is decoupled and does not apply to norms and biases. A `gradient_clip` of 0 does not clip.

    Args:
      total_updates: N of the schedule, for the whole run.
      b2: decay of the second moment.
    """
    adamw = partial(optax.adamw, b1=B1, b2=b2, weight_decay=config.weight_decay, mask=_decayed)
    return _scheduled(adamw, config, total_updates)


def make_muon(config: OptimizerConfig, total_updates: int, *, b2: float = 0.999) -> Optimizer:
    """Muon for the layers' kernels, AdamW for the rest; for weights that are trained from the start.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes the momentum of each kernel
    nearly orthogonal. Its steps are scaled as in arXiv 2502.16982, so that one learning rate does for both.
    Both have Nesterov's momentum. Clipping and decay as in `make_optimizer`, but the embedding does not
    decay, either.

    Args:
      total_updates: N of the schedule, for the whole run.
      b2: decay of AdamW's second moment.
    """
    muon = partial(
        optax.contrib.muon,
        weight_decay=config.weight_decay,
        adam_b1=B1,
        adam_b2=b2,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=_ADAM_RMS,
    )
    return _scheduled(muon, config, total_updates)


def _scheduled(
    make: Callable[[optax.Schedule], optax.GradientTransformation],
    config: OptimizerConfig,
    total_updates: int,
) -> Optimizer:
    """The transformation at the configured learning rate, after clipping."""
    rate = learning_rate_schedule(
        config.learning_rate, total_updates, warmup=config.warmup, schedule=config.schedule
    )
    if config.gradient_clip == 0:
        return Optimizer(make(rate), rate)
    return Optimizer(optax.chain(optax.clip_by_global_norm(config.gradient_clip), make(rate)), rate)


def _decayed(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in _UNDECAYED, params)


def _matrices(params: Params) -> Any:
    """For each stack of kernels: which axes of a kernel are its inputs and which its outputs."""

    def axes(path, kernel) -> optax.contrib.MuonDimensionNumbers | None:
        names = [key.key for key in path]
        if names[0] != "layers" or names[-1] != "kernel":
            return None
        axis = tuple(range(1, kernel.ndim))  # axis 0: the layers
        inputs = 2 if names[-2] == "o" else 1
        return optax.contrib.MuonDimensionNumbers(axis[:inputs], axis[inputs:])

    return jax.tree_util.tree_map_with_path(axes, params)
