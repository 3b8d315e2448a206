"""Folders of LoRA adapters in PEFT's format, written, and read as the model that they and their base make.

    W' = W + scale B A        scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

The sum is computed for each slice of a tensor as it is read, so that such a model loads shard by shard like
any other.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from mapo_jax.errors import UserError
from mapo_jax.files import required_object, write_whole
from mapo_jax.hub import fetch, hub_id
from mapo_jax.model.lora import TARGETS, LoRA
from mapo_jax.model.qwen import QwenConfig
from mapo_jax.model.tensor_names import NAMES, Reader

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys of PEFT's LoraConfig that do not change what adapters compute: their origin, and settings of their
# training. `_Settings` has the keys that are read; any other, of a later PEFT too, must be off.
_IGNORED = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type", "velora_config",
)  # fmt: skip
_LINEAR = re.compile(r"(?:model\.layers\.\d+\.\w+\.\w+_proj|lm_head)\.weight")
_OFF = (None, False, "none", "", [], {})
# The `init_lora_weights` that leave the base unchanged; pissa, olora, corda, loftq and lora_ga subtract from
# its weights what they put into the adapters.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


def is_adapter(folder: Path | str) -> bool:
    """Whether a folder holds adapters.

    Raises:
      UserError: it holds a model too; other tools do not agree which of the two it is.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        return False
    if (folder / "config.json").is_file():
        raise UserError(f"{folder} holds both a model (config.json) and adapters ({CONFIG}); move one away")
    return True


def base_folder(folder: Path | str) -> Path:
    """The folder of the adapters' base model.

    Raises:
      UserError: `base_model_name_or_path` names neither an existing folder (relative to the current folder or
        to the adapters) nor a model of the Hugging Face Hub, or the adapters are of a kind that is not read.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    name = str(settings.get("base_model_name_or_path"))
    for place in (Path(name), folder / name):
        if (place / "config.json").is_file():
            return place
    named = (
        f"{folder / CONFIG}: `base_model_name_or_path` is {name!r}, and there is no model folder of that path"
    )
    if hub_id(name) is None:
        raise UserError(f"{named}; put the path of the base model there")
    try:
        return Path(fetch(f"{name}@{revision}" if (revision := settings.get("revision")) else name))
    except UserError as error:
        raise UserError(f"{named}: {error}") from error


def adapt(folder: Path | str, tensors: Mapping[str, Any], stack: ExitStack) -> dict[str, Any]:
    """The base's tensors plus the products of the adapters in `folder`.

    Args:
      tensors: by Hugging Face name, read slice by slice.
      stack: keeps the adapters' file open.

    Raises:
      UserError: another kind of adapter than plain LoRA, a damaged file, or one that does not fit the base or
        its configuration.
    """
    folder = Path(folder)
    settings, file = _read_settings(folder), folder / WEIGHTS
    try:
        handle = stack.enter_context(safe_open(file, framework="numpy"))
        matrices = {name: handle.get_tensor(name).astype(np.float32) for name in handle.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {WEIGHTS}; only adapters in safetensors are read") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or damaged ({error}); save it again") from error

    linear = sorted(name.removesuffix(".weight") for name in tensors if _LINEAR.fullmatch(name))
    pairs: dict[str, dict[str, str]] = {}  # module -> side -> name in the file
    for name in sorted(matrices):
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        if match is None or match[1] not in linear:
            raise UserError(f"{file} holds {name}, to which the base model has no matrix")
        if not _is_target(settings, match[1]):
            raise UserError(
                f"{file} holds {name}, which {CONFIG} leaves out (`target_modules`, "
                "`exclude_modules`, `layers_to_transform`)"
            )
        if match[2] in pairs.setdefault(match[1], {}):
            raise UserError(f"{file} holds {name} and {pairs[match[1]][match[2]]}, which are one")
        pairs[match[1]][match[2]] = name
    if not pairs:
        raise UserError(f"{file} holds no adapters; save them again")
    if "target_modules" in settings:
        for module in linear:
            if module not in pairs and _is_target(settings, module):
                raise UserError(f"{file} lacks the adapters of {module}, which {CONFIG} names; save it again")

    adapted = dict(tensors)
    for module, names in pairs.items():
        target = f"{module}.weight"
        shape = tuple(tensors[target].get_shape())
        down, up = (matrices.get(names.get(side)) for side in "AB")
        fits = down is not None and up is not None and down.ndim == up.ndim == 2
        if not fits or (len(up), down.shape[1]) != shape or up.shape[1] != len(down):
            name, other = (names["A"], "B") if "A" in names else (names["B"], "A")
            raise UserError(f"{file}: {name} and its {other} do not fit the base's {target}, {list(shape)}")
        rank = _by_pattern(settings, "rank_pattern", module, settings["r"])
        if len(down) != rank:
            raise UserError(
                f"{file}: {names['A']} has rank {len(down)}, but {CONFIG} says {rank} (`r`, `rank_pattern`)"
            )
        alpha = _by_pattern(settings, "alpha_pattern", module, settings["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        adapted[target] = _Adapted(tensors[target], matrices[names["A"]], matrices[names["B"]], scale)
    return adapted


def _is_target(settings: Mapping[str, Any], module: str) -> bool:
    """Whether a module has adapters by PEFT's rules; without targets every module has."""
    if _named(settings.get("exclude_modules") or (), module):
        return False
    targets = settings.get("target_modules")
    if targets is None:
        return True
    if isinstance(targets, str):
        return module != "lm_head" if targets.lower() == "all-linear" else _named(targets, module)
    if module in targets:
        return True
    layers, patterns = settings.get("layers_to_transform"), settings.get("layers_pattern") or r"[^.]*"
    if not _named(targets, module) or layers in (None, []):
        return _named(targets, module)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(match[1]) in (layers if isinstance(layers, list) else [layers])
    return False


def _named(names: str | Sequence[str], module: str) -> bool:
    """Whether a pattern matches a module's whole path, or a list has the path or its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(settings: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's path."""
    patterns = (settings.get(key) or {}).items()
    return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)), default)


class _Adapted:
    """A matrix `[out, in]` plus a low-rank product, with the interface of safetensors' slices."""

    def __init__(self, base: Any, down: np.ndarray, up: np.ndarray, scale: float) -> None:
        self._base, self._down, self._up, self._scale = base, down, up, scale

    def get_shape(self) -> list[int]:
        return self._base.get_shape()

    def get_dtype(self) -> str:
        return self._base.get_dtype()

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        rows, columns = window
        base = np.asarray(self._base[window]).astype(np.float32)
        return base + self._scale * (self._up[rows] @ self._down[:, columns])


def adapter_tensors(read: Reader, config: QwenConfig) -> dict[str, np.ndarray]:
    """Every adapter under its name and in its layout in PEFT: A `[rank, in]`, B `[out, rank]`, float32.

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


def write_adapter_config(
    folder: str | Path, lora: LoRA, base: str | None = None, revision: str | None = None
) -> None:
    """Writes `adapter_config.json` in PEFT's format.

    Args:
      base: path or id of the base model.
      revision: of the id.
    """
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": [TARGETS[name] for name in lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_whole(Path(folder) / CONFIG, json.dumps(content, indent=2) + "\n")


def read_adapter_config(folder: str | Path) -> LoRA | None:
    """The shape of the adapters that `write_adapter_config` described; None if there are none.

    Raises:
      UserError: the file is not valid.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        return None
    content = _read_settings(Path(folder))
    ours = {theirs: name for name, theirs in TARGETS.items()}
    targets = content.get("target_modules")
    written = ("r", "lora_alpha", "target_modules")
    more = [key for key in _Settings.model_fields if content.get(key) and key not in written]
    if more or not isinstance(targets, list) or not set(targets) <= set(ours):
        key = (more or ["target_modules"])[0]
        raise UserError(f"{file}: `{key}` is {content.get(key)!r}, which no run of this project writes")
    return LoRA(content["r"], float(content["lora_alpha"]), tuple(ours[name] for name in targets))


def _read_settings(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` with PEFT's defaults, after a check that everything in it is supported.

    Raises:
      UserError: it cannot be read, is of another kind, or a key (named) is neither read nor off.
    """
    file = folder / CONFIG
    content = required_object(file)
    if content.get("peft_type") != "LORA":
        raise UserError(f"{file}: `peft_type` is {content.get('peft_type')!r}; only LORA is read")

    def refuse(key: str, reason: str) -> None:
        raise UserError(f"{file}: `{key}` is {shorten(json.dumps(content[key]), 100)}, {reason}")

    start = content.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _STARTS:
        refuse(
            "init_lora_weights",
            "so these adapters belong to a base whose weights were changed; save them again with PEFT's "
            "`path_initial_model_for_weight_conversion`, or merge them into their model",
        )
    for key, value in content.items():
        if key not in _IGNORED and key not in _Settings.model_fields and value not in _OFF:
            refuse(key, "which is not supported; merge these adapters into their model with PEFT")
    content = {key: value for key, value in content.items() if value is not None}
    try:
        _Settings.model_validate(content)
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        refuse(key, f"but it must be {_Settings.model_fields[key].description}")
    return {"r": 8, "lora_alpha": 8} | content


def _is_pattern(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, RecursionError) as error:
        raise ValueError("no regular expression") from error
    return value


Pattern = Annotated[str, AfterValidator(_is_pattern)]
Rank = Annotated[int, Field(gt=0)]
Index = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
_MODULES = Field("", description="a pattern or a list of names")


class _Settings(BaseModel):
    """The keys that are read, and what each must be."""

    model_config = ConfigDict(strict=True)
    r: Rank = Field(8, description="a whole number above 0")
    lora_alpha: Number = Field(8, description="a number")
    use_rslora: bool = Field(False, description="true or false")
    rank_pattern: dict[Pattern, Rank] = Field({}, description="ranks by pattern")
    alpha_pattern: dict[Pattern, Number] = Field({}, description="numbers by pattern")
    target_modules: Pattern | list[str] = _MODULES
    exclude_modules: Pattern | list[str] = _MODULES
    layers_to_transform: Index | list[Index] = Field([], description="numbers of layers")
    layers_pattern: Pattern | list[Pattern] = Field("", description="patterns")
