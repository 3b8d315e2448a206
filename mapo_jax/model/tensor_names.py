"""Hugging Face's names and layouts of our parameters: one table for reading, writing and comparing."""

import math
from collections.abc import Callable

import jax
import numpy as np

from mapo_jax.model.qwen import Params, QwenConfig, parameter_shapes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Our path -> Hugging Face's name, and which of our axes (the stacked layer axis not counted) make up each of
# its axes. ((1, 2), (0,)) means: its axis 0 is our axes 1 and 2 flattened, its axis 1 is our axis 0.
NAMES: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "embed/embedding": (EMBEDDING, ((0,), (1,))),
    "layers/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", ((0,),)),
    "layers/attention/q/kernel": ("model.layers.{}.self_attn.q_proj.weight", ((1, 2), (0,))),
    "layers/attention/q/bias": ("model.layers.{}.self_attn.q_proj.bias", ((0, 1),)),
    "layers/attention/q_norm/scale": ("model.layers.{}.self_attn.q_norm.weight", ((0,),)),
    "layers/attention/k/kernel": ("model.layers.{}.self_attn.k_proj.weight", ((1, 2), (0,))),
    "layers/attention/k/bias": ("model.layers.{}.self_attn.k_proj.bias", ((0, 1),)),
    "layers/attention/k_norm/scale": ("model.layers.{}.self_attn.k_norm.weight", ((0,),)),
    "layers/attention/v/kernel": ("model.layers.{}.self_attn.v_proj.weight", ((1, 2), (0,))),
    "layers/attention/v/bias": ("model.layers.{}.self_attn.v_proj.bias", ((0, 1),)),
    "layers/attention/o/kernel": ("model.layers.{}.self_attn.o_proj.weight", ((2,), (0, 1))),
    "layers/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", ((0,),)),
    "layers/mlp/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight", ((1,), (0,))),
    "layers/mlp/up/kernel": ("model.layers.{}.mlp.up_proj.weight", ((1,), (0,))),
    "layers/mlp/down/kernel": ("model.layers.{}.mlp.down_proj.weight", ((1,), (0,))),
    "norm/scale": ("model.norm.weight", ((0,),)),
    "head/kernel": (HEAD, ((1,), (0,))),
}

Reader = Callable[[str, int | None], np.ndarray]
"""Returns one parameter by its path, or one layer of it: from memory (`read_params`) or from a disk."""


def tensor_names(config: QwenConfig) -> dict[str, tuple[str, int | None, tuple[int, ...]]]:
    """Hugging Face name -> (our path, layer or None, shape in the file), in the order of a forward pass."""
    shapes = _leaves(parameter_shapes(config))
    in_layers = [path for path in shapes if path.startswith("layers/")]
    places = [("embed/embedding", None)]
    places += [(path, layer) for layer in range(config.num_layers) for path in in_layers]
    places += [(path, None) for path in ("norm/scale", "head/kernel") if path in shapes]
    names = {}
    for path, layer in places:
        template, groups = NAMES[path]
        sizes = shapes[path].shape if layer is None else shapes[path].shape[1:]
        shape = tuple(math.prod(sizes[axis] for axis in group) for group in groups)
        names[template.format(layer)] = (path, layer, shape)
    return names


def read_params(params: Params) -> Reader:
    """Reads from parameters in memory."""
    leaves = _leaves(params)

    def read(path: str, layer: int | None) -> np.ndarray:
        return np.asarray(leaves[path] if layer is None else leaves[path][layer])

    return read


def as_stored(read: Reader, path: str, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor as its file has it; the arguments after `read` are a value of `tensor_names`."""
    return read(path, layer).transpose(sum(NAMES[path][1], ())).reshape(shape)


def _leaves(tree: Params) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
