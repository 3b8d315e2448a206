"""Hugging Face folders: config.json and safetensors weights, both ways through one table of names."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.model.peft import adapt, base_folder, is_adapter
from mapo_jax.model.qwen import Params, QwenConfig, in_precision, parameter_shapes
from mapo_jax.model.sharding import param_shardings

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Our path -> Hugging Face's name, and which of our axes (the stacked layer axis not counted) make up each of
# its axes. ((1, 2), (0,)) reads: its axis 0 is our axes 1 and 2 flattened, its axis 1 is our axis 0.
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


# --- config.json -------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> QwenConfig:
    """The model's shape from `config.json`, in the spelling of transformers 4 or 5.

    Raises:
      UserError: the file cannot be read, lacks a key, or asks for what is not supported (another
        architecture, rope scaling, an active sliding window, experts, quantisation); the key is named.
    """
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; a model folder needs its config.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")

    def require(key: str) -> Any:
        if content.get(key) is None:
            raise UserError(f"{path} lacks `{key}`")
        return content[key]

    def refuse(key: str, value: Any, supported: str) -> None:
        raise UserError(f"{path}: `{key}` is {json.dumps(value)}, which is not supported; {supported}")

    family = require("model_type")
    if family not in ("qwen2", "qwen3"):
        refuse("model_type", family, "dense qwen2 (Qwen2.5) and qwen3 models are")
    rope = {
        **(content.get("rope_scaling") or {}),
        **(content.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        key = "rope_parameters.rope_type" if "rope_parameters" in content else "rope_scaling"
        refuse(key, kind, "only plain rotary embedding is; remove the scaling to use the model unscaled")
    theta = rope.get("rope_theta", content.get("rope_theta"))
    if theta is None:
        raise UserError(f"{path} lacks `rope_theta` (or `rope_parameters.rope_theta`)")

    layers = require("num_hidden_layers")
    windowed = content.get("use_sliding_window", False) and content.get("sliding_window") is not None
    if windowed and content.get("max_window_layers", 0) < layers:
        refuse("use_sliding_window", True, "only full attention is")
    if any(kind != "full_attention" for kind in content.get("layer_types") or []):
        refuse("layer_types", content["layer_types"], "only full_attention is")
    for key in ("num_experts", "quantization_config"):
        if content.get(key):
            refuse(key, content[key], "only dense, unquantised models are")
    if content.get("attention_bias") and family == "qwen3":
        refuse("attention_bias", True, "Qwen3's attention has no biases")
    if content.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", content["hidden_act"], "only silu is")

    hidden, heads = require("hidden_size"), require("num_attention_heads")
    # transformers' own defaults for a missing head_dim
    default_head = 128 if family == "qwen3" else hidden // heads
    return QwenConfig(
        vocab_size=require("vocab_size"),
        hidden_size=hidden,
        intermediate_size=require("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=require("num_key_value_heads"),
        head_dim=content.get("head_dim") or default_head,
        rope_theta=float(theta),
        rms_norm_eps=float(content.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(content.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_position_embeddings=require("max_position_embeddings"),
        family=family,
    )


def write_config(
    folder: str | Path,
    config: QwenConfig,
    *,
    dtype: str = "bfloat16",
    token_ids: Mapping[str, int | list[int]] | None = None,
) -> None:
    """Writes `config.json` so that transformers 4 and 5 both read it.

    Args:
      dtype: of the weights beside it.
      token_ids: further entries, such as {"eos_token_id": 2, "pad_token_id": 0}.
    """
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[config.family]
    content = {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": True,
        # The spelling of transformers 4, then that of 5.
        "rope_theta": config.rope_theta,
        "torch_dtype": dtype,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": dtype,
        **({"attention_bias": False} if config.family == "qwen3" else {}),
        **(token_ids or {}),
    }
    write_whole(Path(folder) / "config.json", json.dumps(content, indent=2) + "\n")


# --- names and layouts -------------------------------------------------------------------------------------


def _leaves(tree: Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def tensor_names(config: QwenConfig) -> dict[str, tuple[str, int | None, tuple[int, ...]]]:
    """Hugging Face name -> (our path, layer or None, its shape there), in the order of a forward pass."""
    before, layered, after = [], [], []
    for path, leaf in _leaves(parameter_shapes(config)):
        template, groups = NAMES[path]
        if path.startswith("layers/"):
            shape = tuple(math.prod(leaf.shape[1:][axis] for axis in group) for group in groups)
            layered.append((path, template, shape))
        else:
            shape = tuple(math.prod(leaf.shape[axis] for axis in group) for group in groups)
            (before if path.startswith("embed/") else after).append((template, (path, None, shape)))
    layers = [
        (template.format(layer), (path, layer, shape))
        for layer in range(config.num_layers)
        for path, template, shape in layered
    ]
    # The norm comes before the head, as it is applied.
    return dict([*before, *layers, *sorted(after, key=lambda item: item[1][0], reverse=True)])


Reader = Callable[[str, int | None], np.ndarray]
"""Gives one of our arrays by its path, or one layer of it; `params_reader`, or reads it from a disk."""


def params_reader(params: Params) -> Reader:
    """Reads from parameters in memory."""
    leaves = dict(_leaves(params))

    def read(path: str, layer: int | None) -> np.ndarray:
        return np.asarray(leaves[path] if layer is None else leaves[path][layer])

    return read


def _views(read: Reader, config: QwenConfig) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """Every tensor's Hugging Face name and shape, and our array with its axes in their order there."""
    for name, (path, layer, shape) in tensor_names(config).items():
        yield name, shape, read(path, layer).transpose(sum(NAMES[path][1], ()))


def to_huggingface(params: Params, config: QwenConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name and in its layout, one at a time on the host."""
    for name, shape, view in _views(params_reader(params), config):
        yield name, view.reshape(shape)


# --- loading -----------------------------------------------------------------------------------------------


def load_params(
    folder: str | Path, config: QwenConfig, mesh: Mesh | None = None, *, dtype: str = "float32"
) -> Params:
    """Parameters from the safetensors files of a folder: a model's, or adapters and their base's.

    The files are memory-mapped, and each device's part of each tensor is read on its own: with a mesh, a
    host's memory holds its own shards and one part of one tensor more.

    Args:
      dtype: of the parameters; norms are float32 in any case.

    Raises:
      UserError: no weights, an unreadable or truncated file, or a tensor that is missing, surplus, of
        another shape, or quantised; the tensor or file is named.
    """
    shapes = in_precision(parameter_shapes(config), dtype)
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        shardings = param_shardings(parameter_shapes(config), mesh)
    with ExitStack() as stack:
        tensors = _open_weights(Path(folder), config, stack)

        def load(path, leaf, sharding):
            name = "/".join(entry.key for entry in path)
            return jax.make_array_from_callback(
                leaf.shape, sharding, lambda index: _read_part(tensors, name, leaf, index)
            )

        return jax.tree_util.tree_map_with_path(load, shapes, shardings)


def check_weights(folder: str | Path, config: QwenConfig) -> None:
    """Refuses what `load_params` refuses; of the weights only a tied head and its embedding are read."""
    with ExitStack() as stack:
        _open_weights(Path(folder), config, stack)


def _open_weights(folder: Path, config: QwenConfig, stack: ExitStack) -> dict[str, Any]:
    """The tensors that the configuration calls for, to be read window by window, adapters included."""
    if not is_adapter(folder):
        return _open_model(folder, config, stack)
    return adapt(folder, _open_model(base_folder(folder), config, stack), stack)


def _open_model(folder: Path, config: QwenConfig, stack: ExitStack) -> dict[str, Any]:
    found = _open_tensors(folder, config, stack)
    if config.tie_word_embeddings and EMBEDDING not in found and HEAD in found:
        found[EMBEDDING] = found.pop(HEAD)  # of one matrix with two names some tools store only the second
    tensors = {name: tensor for name, tensor in found.items() if not _is_redundant(name, config)}
    _check_tensors(folder, tensors, config)
    for name in found.keys() - tensors.keys():
        _check_redundant(folder, name, found, config)
    return tensors


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files with weights, and the tensors that the index promises in each (None: no index)."""
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            files: dict[Path, set[str] | None] = {}
            for tensor, file in weight_map.items():
                files.setdefault(folder / file, set()).add(tensor)
            return files
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} is no valid index of weights; fetch the file again") from error
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    raise UserError(
        f"{folder} holds no weights: neither {SINGLE} nor {INDEX}; only safetensors files are read"
    )


def _open_tensors(folder: Path, config: QwenConfig, stack: ExitStack) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file, promised in _weight_files(folder).items():
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
        except FileNotFoundError as error:
            raise UserError(f"the weights file {file} is missing, though {INDEX} lists it") from error
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"the weights file {file} is truncated or damaged ({error}); fetch or export it again"
            ) from error
        names = set(handle.keys())
        odd = [] if promised is None else sorted(names ^ promised)
        if odd := next((name for name in odd if not _is_redundant(name, config)), None):
            where = "lists it there" if odd in promised else "does not list it there"
            having = "lacks" if odd in promised else "holds"
            raise UserError(f"the weights file {file} {having} the tensor {odd}, but {INDEX} {where}")
        tensors.update((name, handle.get_slice(name)) for name in names)
    return tensors


_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def _is_redundant(name: str, config: QwenConfig) -> bool:
    """Whether a tensor says again what the others or config.json say, as some published folders have it."""
    return bool(_FREQUENCIES.fullmatch(name)) or (name == HEAD and config.tie_word_embeddings)


def _check_redundant(folder: Path, name: str, tensors: Mapping[str, Any], config: QwenConfig) -> None:
    if name == HEAD:
        if _equal(tensors[name], tensors[EMBEDDING]):
            return
        raise UserError(
            f"the weights in {folder} hold a tensor {name} that differs from the embedding, while "
            "config.json ties the two (`tie_word_embeddings`); set that to false, or remove the tensor"
        )
    expected = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    found = np.asarray(tensors[name][:]).astype(np.float64)
    # Half precision keeps two digits, and nothing below 1e-7.
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=0.01, atol=1e-4):
        raise UserError(
            f"the tensor {name} in {folder} holds other rotary frequencies than follow from config.json's "
            f"`rope_theta` ({config.rope_theta:g}); correct that, or remove the tensor"
        )


def _equal(one: Any, other: Any) -> bool:
    """Whether two matrices in files hold the same values; a block of each is in memory at a time."""
    if one.get_shape() != other.get_shape():
        return False
    height, width = one.get_shape()
    rows = max(1, _BLOCK_BYTES // (4 * width))
    blocks = (slice(start, min(start + rows, height)) for start in range(0, height, rows))
    return all(
        np.array_equal(
            *(np.asarray(matrix[block]).astype(np.float32) for matrix in (one, other)), equal_nan=True
        )
        for block in blocks
    )


def _check_tensors(folder: Path, tensors: Mapping[str, Any], config: QwenConfig) -> None:
    expected = tensor_names(config)
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"the weights in {folder} lack the tensor {missing[0]}{more}, which config.json calls for"
        )
    surplus = sorted(name for name in tensors if name not in expected)
    if surplus:
        more = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        raise UserError(
            f"the weights in {folder} hold the tensor {surplus[0]}{more}, which config.json does not call for"
        )
    for name, (_, _, shape) in expected.items():
        found = tuple(tensors[name].get_shape())
        if found != shape:
            raise UserError(
                f"the tensor {name} in {folder} has shape {list(found)}, "
                f"but config.json calls for {list(shape)}"
            )
        if tensors[name].get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"the tensor {name} in {folder} has dtype {tensors[name].get_dtype()}; "
                "only unquantised weights (BF16, F16, F32) are read"
            )


def _read_part(
    tensors: Mapping[str, Any], path: str, leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of our array `path`, read from the layers that it touches."""
    shape, dtype = leaf.shape, leaf.dtype
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    template, groups = NAMES[path]
    if not path.startswith("layers/"):
        return _read_tensor(tensors[template], groups, shape, bounds, dtype)
    layers = range(*bounds[0])
    part = np.empty((len(layers), *(end - start for start, end in bounds[1:])), dtype)
    for row, layer in enumerate(layers):
        part[row] = _read_tensor(tensors[template.format(layer)], groups, shape[1:], bounds[1:], dtype)
    return part


def _read_tensor(
    tensor: Any, groups, shape: tuple[int, ...], bounds: list[tuple[int, int]], dtype: np.dtype
) -> np.ndarray:
    """Reads `bounds` of one tensor (ours: `shape`) from the file, and only them."""
    window = []
    for group in groups:
        inner = math.prod(shape[axis] for axis in group[1:])
        # A flattened axis is one range only if all but its first part are whole (RULES never cut head_dim).
        assert all(bounds[axis] == (0, shape[axis]) for axis in group[1:])
        start, end = bounds[group[0]]
        window.append(slice(start * inner, end * inner))
    order = sum(groups, ())
    data = np.asarray(tensor[tuple(window)]).astype(dtype, copy=False)
    data = data.reshape([bounds[axis][1] - bounds[axis][0] for axis in order])
    return np.ascontiguousarray(data.transpose(np.argsort(order)))


# --- saving ------------------------------------------------------------------------------------------------


def save_params(
    folder: str | Path,
    params: Params | Reader,
    config: QwenConfig,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes the weights as safetensors, in several files with an index where one would be too large.

    One tensor is on the host at a time, whatever the files' sizes. Each file is written under a temporary
    name and renamed; weights of an earlier save in the same folder are removed last.

    Args:
      params: the weights, or what reads them one by one.
      dtype: "bfloat16" or "float32".
      max_shard_bytes: a file holds at most this much (and at least one tensor).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = jnp.dtype(dtype)
    sizes = {name: math.prod(shape) * kind.itemsize for name, (_, _, shape) in tensor_names(config).items()}
    shards = _shards(sizes, max_shard_bytes)
    tensors = _views(params if callable(params) else params_reader(params), config)
    for file, names in shards.items():
        temporary = folder / f".{file}.{os.getpid()}"
        try:
            with temporary.open("wb") as out:
                out.write(_header(names, config, kind))
                for expected in names:
                    name, _, view = next(tensors)
                    assert name == expected
                    for block in _blocks(view, kind):
                        out.write(block)
                    del view  # before the next one is read
            os.chmod(temporary, 0o644)
            os.replace(temporary, folder / file)
        finally:
            temporary.unlink(missing_ok=True)

    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        if old.name not in shards:
            old.unlink()


def differing_tensor(folder: str | Path, read: Reader, config: QwenConfig) -> str | None:
    """The first tensor of a folder that is not, bit for bit, what `read` gives in the files' precision.

    One tensor and a block of its file are on the host at a time.

    Raises:
      UserError: the folder's tensors are not those that the configuration calls for.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        _open_model(folder, config, stack)
    places = {}
    for file in _weight_files(folder):
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(length))
        header.pop("__metadata__", None)
        places |= {
            name: (file, 8 + length + entry["data_offsets"][0], entry["dtype"])
            for name, entry in header.items()
        }
    kinds = {name: jnp.dtype(kind) for kind, name in _DTYPE_NAMES.items()}
    for name, _, view in _views(read, config):
        file, start, dtype = places[name]
        with file.open("rb") as content:
            content.seek(start)
            for block in _blocks(view, kinds[dtype]):
                if content.read(len(block)) != block:
                    return name
        del view
    return None


_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_BLOCK_BYTES = 16 * 2**20


def _shards(sizes: Mapping[str, int], most: float) -> dict[str, list[str]]:
    """File -> names of its tensors, in order."""
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > most:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def _header(names: list[str], config: QwenConfig, kind: np.dtype) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON, padded to a multiple of 8."""
    shapes = tensor_names(config)
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape = shapes[name][2]
        start, end = end, end + math.prod(shape) * kind.itemsize
        content[name] = {
            "dtype": _DTYPE_NAMES[kind.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _blocks(view: np.ndarray, kind: np.dtype) -> Iterator[bytes]:
    """The bytes of an array in C order and in another precision, some rows at a time."""
    rows = max(1, _BLOCK_BYTES // max(1, view[:1].nbytes))
    for start in range(0, len(view), rows):
        yield np.ascontiguousarray(view[start : start + rows]).astype(kind, copy=False).tobytes()


# --- adapters, in PEFT's format ----------------------------------------------------------------------------


def adapter_tensors(read: Reader, config: QwenConfig) -> dict[str, np.ndarray]:
    """Every adapter under PEFT's name and in its layout: A `[rank, in]`, B `[out, rank]`, float32.

    Args:
      read: reads `layers/.../lora_a` and `lora_b` by layer.
    """
    tensors = {}
    for path, (template, _) in NAMES.items():
        module, kind = path.rsplit("/", 1)
        if kind != "kernel" or module.rsplit("/", 1)[-1] not in config.lora.targets:
            continue
        for layer in range(config.num_layers):
            stem = "base_model.model." + template.format(layer).removesuffix("weight")
            a, b = (np.asarray(read(f"{module}/lora_{side}", layer), np.float32) for side in "ab")
            tensors[stem + "lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, config.lora.rank).T)
            tensors[stem + "lora_B.weight"] = np.ascontiguousarray(b.reshape(config.lora.rank, -1).T)
    return tensors
