"""Folders of LoRA adapters in PEFT's format: read as the model that they make of their base, and written.

    W' = W + scale B A        scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

Every part of a tensor is added up as it is read, so that such a model loads shard by shard like any other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.model.lora import TARGETS, LoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What would make more of an adapter than W + scale B A; each must be absent or as here.
_PLAIN = {
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "alpha_pattern": ({},),
    "lora_bias": (False,),
    "trainable_token_indices": (None,),
}


def is_adapter(folder: Path | str) -> bool:
    """Whether a folder holds adapters and no model of its own."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_folder(folder: Path | str) -> Path:
    """The folder of the model that adapters belong to.

    Raises:
      UserError: `base_model_name_or_path` names no folder that is there (from here, or from beside the
        adapters).
    """
    folder = Path(folder)
    name = str(_settings(folder).get("base_model_name_or_path"))
    for place in (Path(name), folder / name):
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"{folder / CONFIG}: `base_model_name_or_path` is {name!r}, and there is no model folder of that "
        "path; put the path of the base model there"
    )


def adapt(folder: Path | str, tensors: Mapping[str, Any], stack: ExitStack) -> dict[str, Any]:
    """The base's tensors, with what the adapters in `folder` add to them.

    Args:
      tensors: by Hugging Face name, to be read window by window.
      stack: keeps the adapters' file open.

    Raises:
      UserError: another kind of adapter than plain LoRA, a damaged file, or one that does not fit the base.
    """
    folder = Path(folder)
    settings = _settings(folder)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG}: `peft_type` is {settings.get('peft_type')!r}; only LORA is read")
    for key, plain in _PLAIN.items():
        if key in settings and settings[key] not in plain:
            raise UserError(
                f"{folder / CONFIG}: `{key}` is {json.dumps(settings[key])}, which is not supported; merge "
                "these adapters into their model with PEFT"
            )
    try:
        file = stack.enter_context(safe_open(folder / WEIGHTS, framework="numpy"))
        matrices = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {WEIGHTS}; only adapters in safetensors are read") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} is truncated or damaged ({error}); save it again") from error

    adapted = dict(tensors)
    for name, down in matrices.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        target = f"{match[1]}.weight" if match else None
        if target not in tensors:
            raise UserError(f"{folder / WEIGHTS} holds {name}, to which the base model has no matrix")
        if match[2] == "B":
            continue
        up = matrices.get(name.replace("lora_A", "lora_B"))
        shape = tuple(tensors[target].get_shape())
        if up is None or (*up.shape[:1], *down.shape[1:]) != shape or up.shape[1] != down.shape[0]:
            raise UserError(
                f"{folder / WEIGHTS}: {name} and its B do not fit the base's {target}, which is {list(shape)}"
            )
        rank = down.shape[0]
        scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        adapted[target] = _Adapted(tensors[target], down, up, scale)
    return adapted


class _Adapted:
    """A matrix `[out, in]` with its low-rank addition, as safetensors gives it: read window by window."""

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


def write_adapter_config(folder: str | Path, lora: LoRA, base: str | None = None) -> None:
    """Writes `adapter_config.json` as PEFT has it.

    Args:
      base: where PEFT finds the weights beside the adapters.
    """
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
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
    content = _settings(Path(folder))
    try:
        ours = {theirs: name for name, theirs in TARGETS.items()}
        targets = tuple(ours[name] for name in content["target_modules"])
        return LoRA(int(content["r"]), float(content["lora_alpha"]), targets)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not describe adapters of this project ({error!r})") from error


def _settings(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{folder / CONFIG} must hold a JSON object")
    return content
