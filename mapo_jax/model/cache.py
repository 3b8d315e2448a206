"""KV cache: keys and values of earlier tokens, by position.

Each decode step reads the whole cache, so its layout depends on the platform. Heads come before positions, so
that each head's keys are one contiguous block. On accelerators positions come before features, [K, G, C, E],
and a token is written as one run of bytes. On a CPU attention with keys as [K, G, E, C] is about 1.5 times as
fast (`benchmarks/lanes.py`): its inner loop runs along the positions. Values are [K, G, C, E] everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Entries = Float[Array, "M N G E"]  # keys or values of N tokens of each of M rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values of K rows with room for C tokens each."""

    keys: Array  # [K, G, C, E], or [K, G, E, C] with `by_feature`
    values: Array  # [K, G, C, E]
    by_feature: bool = field(default=False, metadata=dict(static=True))

    @property
    def length(self) -> int:
        """C, the tokens that each row has room for."""
        return self.values.shape[-2]

    def write(
        self, rows: Int[Array, " M"], positions: Int[Array, "M N"], keys: Entries, values: Entries
    ) -> LayerCache:
        """Writes N tokens into each of M rows; rows and positions that do not exist are dropped."""
        # With features last, every axis but the last is indexed. With a slice among them a TPU would write to
        # a cache with heads after positions: a second cache, and two transpositions of it per block of steps.
        places = (rows[:, None, None], jnp.arange(self.values.shape[1]), positions[:, :, None])
        key_places = (*places[:2], slice(None), places[2]) if self.by_feature else places
        keys = self.keys.at[key_places].set(keys.astype(self.keys.dtype), mode="drop")
        values = self.values.at[places].set(values.astype(self.values.dtype), mode="drop")
        return LayerCache(keys, values, self.by_feature)

    def read(self, positions: Int[Array, "K N"]) -> tuple[Entries, Entries]:
        """Keys and values of N tokens of each row; arbitrary for positions beyond the cache."""
        rows = jnp.arange(positions.shape[0])[:, None]
        keys = self.keys.at[rows, :, :, positions] if self.by_feature else self.keys.at[rows, :, positions]
        return keys.get(mode="clip"), self.values.at[rows, :, positions].get(mode="clip")

    def grown(self, length: int, numpy=jnp) -> LayerCache:
        """The same with room for `length` tokens; `numpy` is the module that pads (numpy or jax.numpy)."""
        more = (0, length - self.length)
        key_padding = ((0, 0), more) if self.by_feature else (more, (0, 0))
        outer = ((0, 0),) * (self.values.ndim - 2)
        keys = numpy.pad(self.keys, (*outer, *key_padding))
        return LayerCache(keys, numpy.pad(self.values, (*outer, more, (0, 0))), self.by_feature)


Cache = list[LayerCache]  # by layer: a list, not a stack, so that with donation each is updated in place
