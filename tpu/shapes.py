"""The shape of a recipe's model, to compile it without its weights.

The tokenizers have fewer ids than the embedding has rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mapo_jax.config import Config
from mapo_jax.errors import UserError
from mapo_jax.model.huggingface import read_config
from mapo_jax.model.qwen import QwenConfig
from mapo_jax.running.policy import adapters
from mapo_jax.running.published import SHAPES

TOKENIZER_IDS = 151_669  # of Qwen3; Qwen2.5's has fewer
STOP_IDS = (151_645, 151_643)  # <|im_end|>, <|endoftext|>


def model_shape(config: Config, layers: int | None = None) -> QwenConfig:
    """The shape of the model at `model.path`, from its folder or from SHAPES, with the configured adapters.

    Args:
      layers: number of layers instead of the model's; None: the model's.

    Raises:
      UserError: the folder does not exist, and SHAPES has no model of its name.
    """
    path = Path(config.model.path or "")
    name = path.name.partition("@")[0]  # without a revision
    if (path / "config.json").is_file():
        shape = read_config(path)
    elif name in SHAPES:
        shape = SHAPES[name]
    else:
        raise UserError(
            f"`model.path` is {config.model.path!r}: no such folder, and no "
            f"published shape of that name; known are {', '.join(SHAPES)}"
        )
    return replace(shape, num_layers=layers or shape.num_layers, lora=adapters(config.lora))
