"""Shapes of published Qwen models, to compile a recipe without its weights.

They come from the `config.json` of each model's repository. The tokenizers have fewer ids than the embedding
has rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mapo_jax.config import Config
from mapo_jax.errors import UserError
from mapo_jax.model.huggingface import read_config
from mapo_jax.model.qwen import QwenConfig
from mapo_jax.running.policy import adapters

TOKENIZER_IDS = 151_669  # of Qwen3; Qwen2.5's has fewer
STOP_IDS = (151_645, 151_643)  # <|im_end|>, <|endoftext|>

_QWEN3 = dict(vocab_size=151_936, num_kv_heads=8, head_dim=128, max_position_embeddings=40_960)
_QWEN2 = dict(family="qwen2", qkv_bias=True, qk_norm=False, head_dim=128, max_position_embeddings=32_768)

SHAPES: dict[str, QwenConfig] = {
    "Qwen3-0.6B": QwenConfig(
        hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, **_QWEN3
    ),
    "Qwen3-1.7B": QwenConfig(
        hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16, **_QWEN3
    ),
    "Qwen3-4B": QwenConfig(
        hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, **_QWEN3
    ),
    "Qwen3-8B": QwenConfig(
        hidden_size=4096, intermediate_size=12_288, num_layers=36, num_heads=32,
        tie_word_embeddings=False, **_QWEN3,
    ),
    "Qwen3-14B": QwenConfig(
        hidden_size=5120, intermediate_size=17_408, num_layers=40, num_heads=40,
        tie_word_embeddings=False, **_QWEN3,
    ),
    "Qwen3-32B": QwenConfig(
        hidden_size=5120, intermediate_size=25_600, num_layers=64, num_heads=64,
        tie_word_embeddings=False, **_QWEN3,
    ),
    "Qwen2.5-7B-Instruct": QwenConfig(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_layers=28, num_heads=28,
        num_kv_heads=4, tie_word_embeddings=False, **_QWEN2,
    ),
}  # fmt: skip


def model_shape(config: Config, layers: int | None = None) -> QwenConfig:
    """The shape of the model at `model.path`, from its folder or from SHAPES, with the configured adapters.

    Args:
      layers: number of layers instead of the model's; None: the model's.

    Raises:
      UserError: the folder does not exist, and SHAPES has no model of its name.
    """
    path = Path(config.model.path or "")
    if (path / "config.json").is_file():
        shape = read_config(path)
    elif path.name in SHAPES:
        shape = SHAPES[path.name]
    else:
        raise UserError(
            f"`model.path` is {config.model.path!r}: no such folder, and no "
            f"published shape of that name; known are {', '.join(SHAPES)}"
        )
    return replace(shape, num_layers=layers or shape.num_layers, lora=adapters(config.lora))
