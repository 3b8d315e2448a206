"""Dense Qwen2.5 and Qwen3 decoders: one block, used for training, prefill and decode alike.

The architecture is an NNX module; the forward passes are pure functions of `Params`, the plain nested dict
that `nnx.split` returns, with the layers stacked on axis 0. Qwen2.5 (arXiv:2412.15115) has biases on
queries, keys and values; Qwen3 (arXiv:2505.09388) has none, but an RMSNorm on every query and key head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mapo_jax.errors import UserError
from mapo_jax.model.attention import cached_attention, causal_attention, rotary_angles, rotate
from mapo_jax.model.cache import Cache, LayerCache
from mapo_jax.model.lora import ADAPTERS, AdaptedLinear, LoRA, split
from mapo_jax.model.sharding import constrain, cut_rows, gather_rows, param_shardings

Params = dict[str, Any]  # nested dict of arrays, layers stacked on axis 0; trained arrays are float32

INIT_SCALE = 0.02  # standard deviation of fresh weights, Qwen's own `initializer_range`
# Up to this many layers are trained without a loop. A loop copies its stacked residuals in every iteration,
# a quarter of a small model's step on a CPU; but unrolling more layers would take too long to compile.
MAX_UNROLLED_LAYERS = 4


# Name -> what `jax.checkpoint` may keep of a layer. A product with weights is one without batch axes.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclass(frozen=True)
class QwenConfig:
    """Shape and constants of one model. Hashable: compiled programs are keyed by it."""

    vocab_size: int  # rows of the embedding (may exceed the tokenizer's vocabulary)
    hidden_size: int  # D
    intermediate_size: int  # width of the gated MLP
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # G, a divisor of H
    head_dim: int  # E, not necessarily D / H
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True  # the head is the embedding's transpose
    qkv_bias: bool = False  # Qwen2.5
    qk_norm: bool = True  # Qwen3
    max_position_embeddings: int = 32_768
    family: str = "qwen3"  # qwen2 or qwen3
    lora: LoRA | None = None  # adapters beside the kernels

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"the model's {name} is {value!r}; it must be a whole number of at least 1")
        if self.head_dim % 2:
            raise UserError(f"the model's head_dim is {self.head_dim}; rotary embedding needs an even one")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UserError(
                f"the model's num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}"
            )
        expected = {"qwen2": (True, False), "qwen3": (False, True)}
        if expected.get(self.family) != (self.qkv_bias, self.qk_norm):
            raise UserError(
                f"a model of family {self.family!r} with qkv_bias={self.qkv_bias} and qk_norm={self.qk_norm} "
                "does not exist; qwen2 has qkv_bias only, qwen3 has qk_norm only"
            )


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32 (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * scale).astype(x.dtype)


def _linear(config: QwenConfig, name: str, *sizes, **options) -> nnx.LinearGeneral:
    """The linear map `name` of a layer, with adapters if the model has them there."""
    if config.lora is None or name not in config.lora.targets:
        return nnx.LinearGeneral(*sizes, kernel_init=_normal, **options)
    return AdaptedLinear(*sizes, lora=config.lora, kernel_init=_normal, **options)


class RMSNorm(nnx.Module):
    """`rms_norm` with its scale."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.scale[...], self.epsilon)


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: QwenConfig, dtype, *, rngs: nnx.Rngs):
        linear = functools.partial(_linear, config, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate = linear("gate", config.hidden_size, config.intermediate_size)
        self.up = linear("up", config.hidden_size, config.intermediate_size)
        self.down = linear("down", config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B L D"], place: Place) -> Float[Array, "B L D"]:
        tokens = place(x, "tokens")
        gate, up = (place(linear(tokens), "mlp") for linear in (self.gate, self.up))
        return self.down(jax.nn.silu(gate) * up).reshape(x.shape)


class Attention(nnx.Module):
    """Grouped-query attention; `attend` supplies the keys and values."""

    def __init__(self, config: QwenConfig, dtype, *, rngs: nnx.Rngs):
        width, heads, groups = config.hidden_size, config.num_heads, config.num_kv_heads
        size = config.head_dim
        linear = functools.partial(_linear, config, dtype=dtype, rngs=rngs)
        self.q = linear("q", width, (heads, size), use_bias=config.qkv_bias)
        self.k = linear("k", width, (groups, size), use_bias=config.qkv_bias)
        self.v = linear("v", width, (groups, size), use_bias=config.qkv_bias)
        self.o = linear("o", (heads, size), width, axis=(-2, -1), use_bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.rms_norm_eps)
            self.k_norm = RMSNorm(size, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def __call__(self, x: Float[Array, "B L D"], rotary, attend: Attend):
        query, key, value = self.q(x), self.k(x), self.v(x)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        output, carried = attend(rotate(query, rotary), rotate(key, rotary), value)
        return self.o(output), carried


class Block(nnx.Module):
    """One transformer layer, pre-norm."""

    def __init__(self, config: QwenConfig, dtype, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], rotary, attend: Attend, place: Place):
        attended, carried = self.attention(place(self.attention_norm(x), "hidden"), rotary, attend)
        x = x + place(attended, "residual")
        return x + place(self.mlp(place(self.mlp_norm(x), "hidden"), place), "residual"), carried


class Qwen(nnx.Module):
    """The whole model as a tree of parameters; `hidden_states` and `extend` are its forward passes."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        width, size = config.hidden_size, config.vocab_size
        self.embed = nnx.Embed(size, width, embedding_init=_normal, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, jnp.float32, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = nnx.Linear(width, size, use_bias=False, kernel_init=_normal, rngs=rngs)


# (query, key, value), rotated -> (output of the heads, the layer's new cache entry or None)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

# (array, "hidden", "residual", "tokens" or "mlp") -> the array, placed as `sharding.ACTIVATION_AXES` says
Place = Callable[[Array, str], Array]

# (query, key, value, segments) -> output of the heads, for whole rows: as `causal_attention`
RowAttention = Callable[[Array, Array, Array, Array | None], Array]

# (query [K, 1, H, E], cache, positions [K, 1]) -> output of the heads, as `cached_attention`
CacheAttention = Callable[[Array, LayerCache, Array], Array]

_normal = nnx.initializers.normal(INIT_SCALE)


@functools.lru_cache(maxsize=64)
def _block_graphdef(config: QwenConfig, dtype: jnp.dtype) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Block(config, dtype, rngs=nnx.Rngs(0))))[0]


def on_one_device(array: Array, name: str) -> Array:
    """As `Place`: an MLP's tokens on one axis; on a CPU products over two (weights' gradients) are slow."""
    return array.reshape(-1, array.shape[-1]) if name == "tokens" else array


def run_block(config, dtype, layer: Params, x, rotary, attend: Attend, place: Place = on_one_device):
    """One layer: (new hidden states, second result of `attend`).

    Args:
      place: of whole rows on a mesh: "hidden" before products with weights, "residual" after them.
    """
    return nnx.merge(_block_graphdef(config, jnp.dtype(dtype)), layer)(x, rotary, attend, place)


def _create(config: QwenConfig, key: Array) -> Params:
    return nnx.to_pure_dict(nnx.split(Qwen(config, rngs=nnx.Rngs(params=key)))[1])


@functools.lru_cache(maxsize=64)
def parameter_shapes(config: QwenConfig, base_dtype: str = "float32") -> Params:
    """The tree of `Params`, adapters included, as `jax.ShapeDtypeStruct`s; nothing is allocated.

    Args:
      base_dtype: of the frozen weights, if there are adapters; norms and trained arrays are float32.
    """
    shapes = jax.eval_shape(lambda: _create(config, jax.random.key(0)))
    return shapes if config.lora is None else in_precision(shapes, base_dtype)


def in_precision(params: Params, dtype: str, kept: Sequence[str] = ("scale", *ADAPTERS)) -> Params:
    """Weights, or their shapes, in the compute dtype; `kept` (by default norms and adapters) stay float32."""

    def cast(path, leaf):
        if path[-1].key in kept:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)
        return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def parameter_count(config: QwenConfig) -> int:
    """Number of weights, adapters included; a tied head is counted once."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(config)))


def init_params(config: QwenConfig, seed: int, mesh: Mesh | None = None) -> Params:
    """Fresh float32 weights: normal with deviation 0.02, norms 1, biases 0.

    Args:
      mesh: creates every weight sharded (`sharding.param_shardings`); no device ever holds the whole model.
        The values do not depend on the mesh.
    """
    shardings = None if mesh is None else param_shardings(parameter_shapes(config), mesh)
    create = jax.jit(functools.partial(_create, config), out_shardings=shardings)
    return create(jax.random.key(seed))


def init_adapters(config: QwenConfig, seed: int, mesh: Mesh | None = None) -> Params:
    """Fresh float32 adapters, whose product is 0; `mesh` as of `init_params`."""
    shardings = None if mesh is None else split(param_shardings(parameter_shapes(config), mesh))[0]
    create = jax.jit(lambda key: split(_create(config, key))[0], out_shardings=shardings)
    return create(jax.random.key(seed))


def hidden_states(
    params: Params,
    config: QwenConfig,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    segments: Int[Array, "B L"] | None = None,
    *,
    dtype=jnp.float32,
    remat: str = "none",
    attention: RowAttention = causal_attention,
    mesh: Mesh | None = None,
) -> Float[Array, "B L D"]:
    """Final hidden states (after the last norm) of whole rows, for scoring and training.

    Causal in the order of the row; rows are right-padded, so that no token attends to padding and no mask is
    needed. Values at padding are meaningless but finite.

    Args:
      positions: rotary positions.
      segments: for rows that hold several texts; a token attends to its own segment only.
      dtype: compute dtype; norms and softmax are float32 in any case.
      remat: what the backward pass recomputes. "block": each layer, of which only the input is kept;
        "offload": the same, and the inputs wait in the host's memory;
        "minimal": norms, rotation, attention and the MLP's product, while the outputs of the matrix products
        with weights are kept; "none": only attention. With one of `SUMS_IN_PLACE`, `params` may hold a
        `RUNNING_SUM`.
      attention: of whole rows; `backends.row_attention` chooses one.
      mesh: of weights and rows. Between layers each row is cut over `tensor`: a layer gathers its rows before
        its products with weights, and sums and cuts what they give.
    """
    rotary = rotary_angles(positions, config.head_dim, config.rope_theta)

    def attend(query, key, value):
        return attention(query, key, value, segments), None

    def on_mesh(array, name):
        if name == "tokens":  # on one axis, the compiler would gather all devices' rows for some products
            return array
        if name == "mlp":
            return constrain(array, name, mesh)
        return {"hidden": gather_rows, "residual": cut_rows}[name](array, mesh)

    place = on_one_device if mesh is None or mesh.size == 1 else on_mesh

    def layer(x, weights):
        if remat == "offload":
            x = checkpoint_name(x, "layer input")
        return run_block(config, dtype, weights, x, rotary, attend, place)[0], None

    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; it must be one of {', '.join(REMAT)}")
    if RUNNING_SUM in params and remat not in SUMS_IN_PLACE:
        raise ValueError(f"remat is {remat!r}; for a running sum, one of {', '.join(SUMS_IN_PLACE)}")
    # Each device looks up its slice of the width for all rows in its group; then rows are cut.
    x = constrain(params["embed"]["embedding"][tokens].astype(dtype), "looked_up", mesh)
    x = constrain(x, "residual", mesh)
    if RUNNING_SUM in params:
        x = _scan_adding(layer, x, params["layers"], params[RUNNING_SUM], to_host=remat == "offload")
    elif remat == "none":
        unroll = config.num_layers if config.num_layers <= MAX_UNROLLED_LAYERS else 1
        x, _ = jax.lax.scan(layer, x, params["layers"], unroll=unroll)
    else:
        # They stay in a loop, which also prevents that the recomputation is merged with the forward pass.
        layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[remat])
        x, _ = jax.lax.scan(layer, x, params["layers"])
    return place(rms_norm(x, params["norm"]["scale"], config.rms_norm_eps), "hidden")


# Key of `hidden_states`' parameters: the sum of the layers' gradients over earlier micro-batches, in the form
# of `layers`. Its own gradient is defined as the sum with this micro-batch's, which the backward pass adds in
# place, layer by layer; the gradient by `layers` is then 0. A tree of the size of all weights is saved.
RUNNING_SUM = "running_sum"
SUMS_IN_PLACE = ("block", "offload")  # values of `remat`


def sums_in_place(remat: str, config: QwenConfig) -> bool:
    """Whether micro-batches should give `hidden_states` a `RUNNING_SUM`; the sum of adapters is small."""
    return remat in SUMS_IN_PLACE and config.lora is None


def _scan_adding(layer, x: Array, layers: Params, running_sum: Params, *, to_host: bool) -> Array:
    """As `jax.lax.scan(layer, x, layers)[0]`, with a `RUNNING_SUM`; recomputes each layer from its input."""

    def cast_later(weights: Params) -> Params:
        # Times a 1 that the compiler does not know: else it casts all layers first and keeps the copies.
        return jax.tree.map(
            lambda leaf: leaf * jax.lax.optimization_barrier(jnp.ones((), leaf.dtype)), weights
        )

    @jax.custom_vjp
    def scan(x, layers, running_sum):
        return jax.lax.scan(layer, x, layers)[0]

    def forward(x, layers, running_sum):
        def step(x, weights):
            kept = jax.device_put(x, jax.memory.Space.Host) if to_host else x
            return layer(x, cast_later(weights))[0], kept

        x, inputs = jax.lax.scan(step, x, layers)
        return x, (inputs, layers, running_sum)

    def backward(kept, gradient):
        inputs, layers, running_sum = kept

        def step(carry, given):
            gradient, total = carry
            index, x, weights = given
            x = jax.device_put(x, jax.memory.Space.Device) if to_host else x
            _, pull, _ = jax.vjp(layer, x, cast_later(weights), has_aux=True)
            gradient, of_weights = pull(gradient)
            return (gradient, jax.tree.map(lambda t, g: t.at[index].add(g), total, of_weights)), None

        numbered = (jnp.arange(inputs.shape[0]), inputs, layers)
        (gradient, running_sum), _ = jax.lax.scan(step, (gradient, running_sum), numbered, reverse=True)
        return gradient, None, running_sum

    scan.defvjp(forward, backward)
    return scan(x, layers, running_sum)


def unstack_layers(layers: Params, count: int) -> list[Params]:
    """The weights of each layer."""
    return [jax.tree.map(lambda leaf, index=index: leaf[index], layers) for index in range(count)]


def for_decoding(params: Params, config: QwenConfig, dtype) -> Params:
    """The weights in the form that `extend` reads fastest: layer by layer, in the compute dtype.

    The results stay the same, bit for bit. The scales of norms stay float32.
    """
    params = in_precision(params, dtype, kept=("scale",))
    return params | {"layers": unstack_layers(params["layers"], config.num_layers)}


def init_cache(
    config: QwenConfig, rows: int, length: int, dtype=jnp.float32, *, by_feature: bool = False
) -> Cache:
    """Empty caches for `rows` rows of up to `length` tokens; `by_feature` as of `LayerCache`.

    With `dtype` int8 they are in 8 bits, with scales.
    """
    values = (rows, config.num_kv_heads, length, config.head_dim)
    keys = (rows, config.num_kv_heads, config.head_dim, length) if by_feature else values
    scales = [values[:-1]] * 2 if jnp.dtype(dtype) == jnp.int8 else []
    return [
        LayerCache(
            jnp.zeros(keys, dtype),
            jnp.zeros(values, dtype),
            by_feature,
            *(jnp.zeros(shape, jnp.float32) for shape in scales),  # arrays of their own, to be donated
        )
        for _ in range(config.num_layers)
    ]


def extend(
    params: Params,
    config: QwenConfig,
    tokens: Int[Array, "K N"],
    positions: Int[Array, "K N"],
    cache: Cache,
    *,
    dtype=jnp.float32,
    attention: CacheAttention = cached_attention,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "K N D"], Cache]:
    """Appends N tokens to each slot: a chunk of a prompt (N = chunk) or one decoded token (N = 1).

    Unstack the layers before a loop (`for_decoding`): else each is copied in every iteration.

    Keys and values are written at cache index == position; a position >= C is padding: it is not written,
    and its hidden state is meaningless. Every token attends to the cache entries at or before its own
    position, so entries beyond the row's end may hold anything.

    On a `mesh` a chunk of a prompt is computed on its slot's devices, as in training: weights are gathered.
    For a decoded token the hidden states are transferred instead, since they are far smaller than the
    weights; only attention runs on the slot's devices.

    Args:
      attention: `backends.decode_attention` chooses one for decoded tokens.

    Returns:
      Hidden states after the last norm, and the new cache (donate the old one).
    """
    rotary = rotary_angles(positions, config.head_dim, config.rope_theta)
    decoding = tokens.shape[1] == 1
    hidden, heads = ("lane_hidden", "lane_heads") if decoding else ("hidden", "heads")
    x = constrain(params["embed"]["embedding"][tokens].astype(dtype), hidden, mesh)
    layers, new_cache = params["layers"], []
    if not isinstance(layers, list):
        layers = unstack_layers(layers, config.num_layers)
    for index, entry in enumerate(cache):

        def attend(query, key, value, entry=entry):
            query = constrain(query, "slot_heads", mesh)
            key, value = (constrain(array, "slot_kv_heads", mesh) for array in (key, value))
            entry = entry.write(jnp.arange(len(query)), positions, key, value)
            output = constrain(attention(query, entry, positions), "slot_heads", mesh)
            return constrain(output, heads, mesh), entry

        x, entry = run_block(config, dtype, layers[index], x, rotary, attend)
        x = constrain(x, hidden, mesh)
        new_cache.append(entry)
    return rms_norm(x, params["norm"]["scale"], config.rms_norm_eps), new_cache
