"""Hugging Face model folders: config.json and safetensors weights, read and written."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mapo_jax.errors import UserError
from mapo_jax.files import required_object, write_whole
from mapo_jax.model.peft import adapt, base_folder, is_adapter
from mapo_jax.model.qwen import Params, QwenConfig, in_precision, parameter_shapes
from mapo_jax.model.sharding import param_shardings
from mapo_jax.model.tensor_names import EMBEDDING, HEAD, NAMES, Reader, as_stored, read_params, tensor_names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BLOCK_BYTES = 16 * 2**20  # most bytes of a file's tensor that a comparison holds
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SIZES = {  # key of config.json -> field of QwenConfig
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}

# --- config.json -------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> QwenConfig:
    """The model's shape from `config.json`, in the spelling of transformers 4 or 5.

    Raises:
      UserError: the file cannot be read, lacks a key, or asks for what is not supported (another
        architecture, rope scaling, an active sliding window, experts, quantisation); the key is named.
    """
    path = Path(folder) / "config.json"
    content = required_object(path)

    def require(key: str) -> Any:
        if content.get(key) is None:
            raise UserError(f"{path} lacks `{key}`")
        return content[key]

    def refuse(key: str, value: Any, supported: str) -> None:
        raise UserError(f"{path}: `{key}` is {json.dumps(value)}, which is not supported; {supported}")

    family = require("model_type")
    if family not in _ARCHITECTURES:
        refuse("model_type", family, "dense qwen2 (Qwen2.5) and qwen3 models are")
    rope = (content.get("rope_scaling") or {}) | (content.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        key = "rope_parameters.rope_type" if "rope_parameters" in content else "rope_scaling"
        refuse(key, kind, "only plain rotary embedding is; remove the scaling to use the model unscaled")
    theta = rope.get("rope_theta", content.get("rope_theta"))
    if theta is None:
        raise UserError(f"{path} lacks `rope_theta` (or `rope_parameters.rope_theta`)")

    windowed = content.get("use_sliding_window", False) and content.get("sliding_window") is not None
    if windowed and content.get("max_window_layers", 0) < require("num_hidden_layers"):
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

    # transformers' own defaults for a missing head_dim
    default_head = 128 if family == "qwen3" else require("hidden_size") // require("num_attention_heads")
    return QwenConfig(
        **{field: require(key) for key, field in _SIZES.items()},
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
    token_ids: dict | None = None,
) -> None:
    """Writes `config.json` so that transformers 4 and 5 both read it.

    Args:
      dtype: of the weights beside it.
      token_ids: further entries, such as {"eos_token_id": 2, "pad_token_id": 0}.
    """
    content = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        **{key: getattr(config, field) for key, field in _SIZES.items()},
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
    stored = _open_tensors(folder, config, stack)
    if config.tie_word_embeddings and EMBEDDING not in stored and HEAD in stored:
        stored[EMBEDDING] = stored.pop(HEAD)  # some tools store a tied matrix under the head's name alone
    tensors = {name: tensor for name, tensor in stored.items() if not _is_redundant(name, config)}
    _check_tensors(folder, tensors, config)
    for name in stored.keys() - tensors.keys():
        _check_redundant(folder, name, stored, config)
    return tensors


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files with weights, and the tensors that the index lists for each (None: no index)."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return {folder / SINGLE: None}
        raise UserError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}; only safetensors are read")
    try:
        files: dict[Path, set[str] | None] = {}
        for tensor, file in required_object(index)["weight_map"].items():
            files.setdefault(folder / file, set()).add(tensor)
        return files
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no valid index of weights; fetch the file again") from error


def _open_tensors(folder: Path, config: QwenConfig, stack: ExitStack) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file, listed in _weight_files(folder).items():
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
        except FileNotFoundError as error:
            raise UserError(f"the weights file {file} is missing, though {INDEX} lists it") from error
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"the weights file {file} is truncated or damaged ({error}); fetch or export it again"
            ) from error
        names = set(handle.keys())
        differing = () if listed is None else sorted(names ^ listed)
        for name in differing:
            if not _is_redundant(name, config):
                has, lists = ("lacks", "lists") if name in listed else ("holds", "does not list")
                raise UserError(f"the file {file} {has} the tensor {name}, but {INDEX} {lists} it there")
        tensors.update((name, handle.get_slice(name)) for name in names)
    return tensors


_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def _is_redundant(name: str, config: QwenConfig) -> bool:
    """Whether a tensor repeats other tensors or config.json, as in some published folders."""
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
    stored = np.asarray(tensors[name][:]).astype(np.float64)
    # Half precision keeps two digits, and nothing below 1e-7.
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=0.01, atol=1e-4):
        raise UserError(
            f"the tensor {name} in {folder} holds other rotary frequencies than follow from config.json's "
            f"`rope_theta` ({config.rope_theta:g}); correct that, or remove the tensor"
        )


def _equal(one: Any, other: Any) -> bool:
    """Whether two matrices in files hold the same values, compared block by block."""
    return one.get_shape() == other.get_shape() and all(
        np.array_equal(
            *(np.asarray(matrix[block]).astype(np.float32) for matrix in (one, other)), equal_nan=True
        )
        for block in _row_blocks(one.get_shape())
    )


def _row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the first axis, of at most _BLOCK_BYTES in float32 each."""
    rows = max(1, _BLOCK_BYTES // (4 * math.prod(shape[1:])))
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def _check_tensors(folder: Path, tensors: Mapping[str, Any], config: QwenConfig) -> None:
    expected = tensor_names(config)
    missing = [name for name in expected if name not in tensors]
    surplus = sorted(tensors.keys() - expected.keys())
    for holds, names, calls in (("lack", missing, "calls for"), ("hold", surplus, "does not call for")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"the weights in {folder} {holds} the tensor {names[0]}{more}, which config.json {calls}"
            )
    for name, (_, _, shape) in expected.items():
        stored, dtype = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if stored != shape:
            raise UserError(
                f"the tensor {name} in {folder} has shape {list(stored)}; config.json calls for {list(shape)}"
            )
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"the tensor {name} in {folder} has dtype {dtype}; only unquantised BF16, F16, F32 are read"
            )


def _read_part(
    tensors: Mapping[str, Any], path: str, leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]
) -> np.ndarray:
    """The slice `index` of our array `path`, read from the layers that it covers."""
    shape, dtype = leaf.shape, leaf.dtype
    bounds = [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
    template, groups = NAMES[path]
    if not path.startswith("layers/"):
        return _read_tensor(tensors[template], groups, shape, bounds, dtype)
    layers = range(*bounds[0])
    stacked = np.empty((len(layers), *(end - start for start, end in bounds[1:])), dtype)
    for row, layer in enumerate(layers):
        stacked[row] = _read_tensor(tensors[template.format(layer)], groups, shape[1:], bounds[1:], dtype)
    return stacked


def _read_tensor(
    tensor: Any, groups, shape: tuple[int, ...], bounds: list[tuple[int, int]], dtype: np.dtype
) -> np.ndarray:
    """Reads `bounds` of one tensor (`shape` in our layout) from the file, and nothing else."""
    window = []
    for group in groups:
        inner = math.prod(shape[axis] for axis in group[1:])
        # A flattened axis is one range only if all axes but the first are whole (RULES never cut head_dim).
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

    The tensors of one file are on the host at a time. Each file is written under a temporary name and
    renamed; weights of an earlier save in the same folder are removed last.

    Args:
      params: the weights, or a reader of them.
      dtype: "bfloat16" or "float32".
      max_shard_bytes: most bytes of tensors in a file (one tensor may exceed it).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind, places = jnp.dtype(dtype), tensor_names(config)
    sizes = {name: math.prod(shape) * kind.itemsize for name, (_, _, shape) in places.items()}
    shards = _shards(sizes, max_shard_bytes)
    read = params if callable(params) else read_params(params)
    for file, names in shards.items():
        temporary = folder / f".{file}.{os.getpid()}"
        try:
            save_file(
                {name: np.ascontiguousarray(as_stored(read, *places[name]), kind) for name in names},
                temporary,
                metadata={"format": "pt"},
            )
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


def _shards(sizes: Mapping[str, int], most: float) -> dict[str, list[str]]:
    """File -> names of its tensors, in order."""
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > most:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{n:05}-of-{count:05}.safetensors": names for n, names in enumerate(shards, start=1)}


def differing_tensor(folder: str | Path, read: Reader, config: QwenConfig) -> str | None:
    """The first tensor of a folder that is not, bit for bit, what `read` returns in the files' precision.

    One tensor and a block of its file are on the host at a time.

    Raises:
      UserError: the folder's tensors are not those that the configuration calls for.
    """
    folder = Path(folder)
    check_weights(folder, config)
    places = tensor_names(config)
    for file in _weight_files(folder):
        with safe_open(file, framework="numpy") as handle:  # one file: mapped pages count as memory
            for name in sorted(places.keys() & set(handle.keys())):
                expected = as_stored(read, *places[name])
                for block in _row_blocks(expected.shape):
                    stored = np.asarray(handle.get_slice(name)[block])
                    if stored.tobytes() != expected[block].astype(stored.dtype).tobytes():
                        return name
                del expected  # before the next one is read
    return None
