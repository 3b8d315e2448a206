"""Low-rank adapters (LoRA, arXiv:2106.09685): small trained matrices beside frozen ones.

A linear map W gets a low-rank addition, `x W + (alpha / rank) (x A) B`. A starts random and B at zero, so
that training begins with the frozen model. Training and sampling both compute it so, in one forward graph:
weights merged for the sampler would be a second copy of the model, and in bfloat16 they would lose most of a
small change. `W + (alpha / rank) A B` is only computed where a model leaves its run (`merge`).

In a tree of parameters the adapters are beside their kernel, as `lora_a` and `lora_b`; `split` separates them
and `join` reverses that, without computation or copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

ADAPTERS = ("lora_a", "lora_b")
# Our module -> Hugging Face's, in the order of a forward pass.
TARGETS = {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@dataclass(frozen=True)
class LoRA:
    """Shape of a model's adapters. Hashable: compiled programs are keyed by it."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # of TARGETS: which maps of every layer have adapters

    @property
    def scale(self) -> float:
        """Factor of the low-rank term."""
        return self.alpha / self.rank


class AdaptedLinear(nnx.LinearGeneral):
    """A linear map with its adapters: A `[in..., rank]`, B `[rank, out...]`."""

    def __init__(self, in_features, out_features, *, lora: LoRA, rngs: nnx.Rngs, **options):
        super().__init__(in_features, out_features, rngs=rngs, **options)
        width = math.prod(self.in_features)
        # Uniform in +-1/sqrt(fan-in), as in PEFT.
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        start = uniform(rngs.params(), (width, lora.rank), jnp.float32)
        self.lora_a = nnx.Param(start.reshape(*self.in_features, lora.rank))
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, *self.out_features)))
        self.scale = lora.scale

    def __call__(self, x: Array) -> Array:
        """`x W + (alpha / rank) (x A) B`, in the compute dtype."""
        down, up = (matrix[...].astype(x.dtype) for matrix in (self.lora_a, self.lora_b))
        axes = tuple(axis % x.ndim for axis in self.axis)
        low = jax.lax.dot_general(x, down, ((axes, tuple(range(len(axes)))), ((), ())))
        addition = jax.lax.dot_general(low, up, (((low.ndim - 1,), (0,)), ((), ())))
        return super().__call__(x) + self.scale * addition


def split(params: Any) -> tuple[Any, Any]:
    """(adapters, everything else) of a tree of parameters, of shapes or of shardings."""
    adapters, base = {}, {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner, rest = split(value)
            if inner:
                adapters[name] = inner
            if rest:
                base[name] = rest
        else:
            (adapters if name in ADAPTERS else base)[name] = value
    return adapters, base


def join(base: Any, adapters: Any) -> Any:
    """The whole tree of `split`'s two results."""
    whole = dict(base)
    for name, value in adapters.items():
        whole[name] = join(whole.get(name, {}), value) if isinstance(value, dict) else value
    return whole


def low_rank(
    a: Float[Array, "*N rank"], b: Float[Array, " rank *M"], lora: LoRA, shape: tuple[int, ...]
) -> Float[Array, "*N *M"]:
    """`(alpha / rank) A B` of one layer in the shape of its kernel. Arrays of numpy give one of numpy."""
    return lora.scale * (a.reshape(-1, lora.rank) @ b.reshape(lora.rank, -1)).reshape(shape)


def merge(params: Any, lora: LoRA) -> Any:
    """Plain weights, float32: every adapter is added to its kernel. To be jitted."""
    merged = {}
    for name, value in params.items():
        if isinstance(value, dict):
            merged[name] = merge(value, lora)
        elif name == "kernel" and "lora_a" in params:
            add = jax.vmap(lambda w, a, b: w.astype(jnp.float32) + low_rank(a, b, lora, w.shape))
            merged[name] = add(value, params["lora_a"], params["lora_b"])
        elif name not in ADAPTERS:
            merged[name] = value.astype(jnp.float32)
    return merged
