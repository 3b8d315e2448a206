"""The training state: trained parameters, moments, counts, and frozen weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mapo_jax.learning.optimizer import Optimizer
from mapo_jax.model.lora import join, split
from mapo_jax.model.qwen import Params, in_precision
from mapo_jax.model.sharding import with_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What an update changes, and the frozen weights that it may read."""

    params: Params  # trained: all weights, or the adapters
    opt_state: optax.OptState
    step: Int[Array, ""]  # updates applied so far
    reference: Params | None = None  # weights of the KL term; never updated
    base: Params | None = None  # the weights beside the adapters, in the compute dtype; never updated

    @property
    def weights(self) -> Params:
        """The whole policy; nothing is copied."""
        return self.params if self.base is None else join(self.base, self.params)


def create_state(
    params: Params, optimizer: Optimizer, *, shardings: Any = None, reference: bool = False
) -> TrainState:
    """A state before its first update.

    Args:
      params: start weights; they are donated with the state, so the caller must not use them afterwards. If
        there are adapters among them, only these are trained.
      shardings: `model.sharding.param_shardings`, if there is a mesh; the moments are cut like the weights.
      reference: the KL term needs the start weights: keep a frozen copy, unless they are frozen anyway.
    """
    placed = state_shardings(optimizer, params, shardings, reference)
    trained, base = trained_and_frozen(params)
    initial = jax.jit(optimizer.transform.init, out_shardings=placed and placed.opt_state)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=placed and placed.params)
    step = jnp.zeros((), jnp.int32)
    if placed is not None:  # from numpy: jax 0.10.2 puts a jax array wrongly where a process has one device
        step = jax.device_put(np.zeros((), np.int32), placed.step)
    reference = reference and base is None
    return TrainState(trained, initial(trained), step, copy(trained) if reference else None, base)


def abstract_state(params: Any, optimizer: Optimizer, *, shardings, reference: bool = False) -> TrainState:
    """The shapes, types and shardings of `create_state`'s result, without arrays; the target of a restore.

    Args:
      params: the weights' tree, arrays or `jax.ShapeDtypeStruct`s.
      shardings, reference: as of `create_state`.
    """
    shapes = jax.eval_shape(lambda weights: create_state(weights, optimizer, reference=reference), params)
    return with_shardings(shapes, state_shardings(optimizer, params, shardings, reference))


def weights_copy(dtype: str) -> jax.stages.Wrapped:
    """A program that copies weights in the precision in which they sample; updates donate the originals."""

    def copy(params: Params) -> Params:
        return jax.tree.map(jnp.copy, in_precision(params, dtype))

    return jax.jit(copy)


def trained_and_frozen(params: Any) -> tuple[Any, Any]:
    """(trained, frozen or None) of a tree of weights, shapes or shardings."""
    adapters, base = split(params)
    return (adapters, base) if adapters else (params, None)


def state_shardings(optimizer: Optimizer, params: Params, shardings, reference: bool) -> TrainState | None:
    """A TrainState of shardings: the moments are cut like the weights, the counts are replicated."""
    if shardings is None:
        return None
    everywhere = NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
    trained, base = trained_and_frozen(shardings)
    shapes = jax.eval_shape(optimizer.transform.init, trained_and_frozen(params)[0])
    moments = optax.tree_utils.tree_map_params(
        optimizer.transform,
        lambda moment, sharding: moment if _absent(moment) else sharding,
        shapes,
        trained,
        transform_non_params=lambda _: everywhere,
        is_leaf=_absent,
    )
    return TrainState(trained, moments, everywhere, trained if reference and base is None else None, base)


def _absent(moment: Any) -> bool:
    """Whether this part of an optimizer has no moment of the parameter: another part updates it."""
    return isinstance(moment, optax.MaskedNode)
