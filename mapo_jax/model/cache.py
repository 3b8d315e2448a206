"""KV cache: keys and values of earlier tokens, by position.

Each decode step reads the whole cache, so its layout depends on the platform. Heads come before positions, so
that each head's keys are one contiguous block. On accelerators positions come before features, [K, G, C, E],
and a token is written as one run of bytes. On a CPU attention with keys as [K, G, E, C] is about 1.5 times as
fast (`benchmarks/lanes.py`): its inner loop runs along the positions. Values are [K, G, C, E] everywhere.

A cache in 8 bits holds whole numbers from -127 to 127, and for each token and head a scale that they are
multiples of: the largest magnitude of the token's key or value, divided by 127.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Entries = Float[Array, "M N G E"]  # keys or values of N tokens of each of M rows
LARGEST = 127  # magnitude of a number in 8 bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values of K rows with room for C tokens each."""

    keys: Array  # [K, G, C, E], or [K, G, E, C] with `by_feature`
    values: Array  # [K, G, C, E]
    by_feature: bool = field(default=False, metadata=dict(static=True))
    key_scales: Float[Array, "K G C"] | None = None  # of a cache in 8 bits
    value_scales: Float[Array, "K G C"] | None = None

    @property
    def length(self) -> int:
        """C, the tokens that each row has room for."""
        return self.values.shape[-2]

    def write(
        self, rows: Int[Array, " M"], positions: Int[Array, "M N"], keys: Entries, values: Entries
    ) -> LayerCache:
        """Writes N tokens into each of M rows; rows and positions that do not exist are dropped."""
        if self.key_scales is None:
            return self.put(rows, positions, keys.astype(self.keys.dtype), values.astype(self.values.dtype))
        (keys, key_scales), (values, value_scales) = in_8_bits(keys), in_8_bits(values)
        return self.put(rows, positions, keys, values, key_scales, value_scales)

    def put(self, rows: Int[Array, " M"], positions: Int[Array, "M N"], *stored: Array) -> LayerCache:
        """`write` of what `read` returns."""
        # With features last, every axis but the last is indexed. With a slice among them a TPU would write to
        # a cache with heads after positions: a second cache, and two transpositions of it per block of steps.
        places = (rows[:, None, None], jnp.arange(self.values.shape[1]), positions[:, :, None])
        key_places = (*places[:2], slice(None), places[2]) if self.by_feature else places
        keys, values, *scales = stored
        return LayerCache(
            self.keys.at[key_places].set(keys, mode="drop"),
            self.values.at[places].set(values, mode="drop"),
            self.by_feature,
            *(
                old.at[places].set(new, mode="drop")
                for old, new in zip((self.key_scales, self.value_scales), scales, strict=False)
            ),
        )

    def read(self, positions: Int[Array, "K N"]) -> tuple[Array, ...]:
        """Keys and values of N tokens of each row [K, N, G, E] as they are stored, and with 8 bits their
        scales [K, N, G]; arbitrary for positions beyond the cache."""
        rows = jnp.arange(positions.shape[0])[:, None]
        keys = self.keys.at[rows, :, :, positions] if self.by_feature else self.keys.at[rows, :, positions]
        others = [array for array in (self.values, self.key_scales, self.value_scales) if array is not None]
        places = [keys, *(array.at[rows, :, positions] for array in others)]
        return tuple(place.get(mode="clip") for place in places)

    def grown(self, length: int, numpy=jnp) -> LayerCache:
        """The same with room for `length` tokens; `numpy` is the module that pads (numpy or jax.numpy)."""
        more = (0, length - self.length)
        key_padding = ((0, 0), more) if self.by_feature else (more, (0, 0))
        outer = ((0, 0),) * (self.values.ndim - 2)
        keys = numpy.pad(self.keys, (*outer, *key_padding))
        values = numpy.pad(self.values, (*outer, more, (0, 0)))
        if self.key_scales is None:
            return LayerCache(keys, values, self.by_feature)
        scales = (numpy.pad(array, (*outer, more)) for array in (self.key_scales, self.value_scales))
        return LayerCache(keys, values, self.by_feature, *scales)


def in_8_bits(entries: Entries) -> tuple[Int[Array, "M N G E"], Float[Array, "M N G"]]:
    """The nearest multiples of a scale for each token and head, and the scales in float32."""
    entries = entries.astype(jnp.float32)
    scales = jnp.abs(entries).max(axis=-1) / LARGEST
    multiples = jnp.round(entries / jnp.where(scales > 0, scales, 1)[..., None])
    return multiples.astype(jnp.int8), scales


Cache = list[LayerCache]  # by layer: a list, not a stack, so that with donation each is updated in place
