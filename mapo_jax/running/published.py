"""Shapes of published Qwen models, so that a recipe can be planned and compiled without its weights.

They come from the `config.json` of each model's repository. The tokenizers have fewer ids than the embedding
has rows.
"""

from __future__ import annotations

from mapo_jax.hub import HubId
from mapo_jax.model.qwen import QwenConfig

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
    "Qwen3-4B-Instruct-2507": QwenConfig(
        hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, rope_theta=5e6,
        **_QWEN3 | {"max_position_embeddings": 262_144},
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
    "Qwen2.5-0.5B-Instruct": QwenConfig(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14,
        num_kv_heads=2, **_QWEN2 | {"head_dim": 64},
    ),
    "Qwen2.5-1.5B-Instruct": QwenConfig(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
        num_kv_heads=2, **_QWEN2,
    ),
    "Qwen2.5-3B-Instruct": QwenConfig(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_layers=36, num_heads=16,
        num_kv_heads=2, **_QWEN2,
    ),
    "Qwen2.5-7B-Instruct": QwenConfig(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_layers=28, num_heads=28,
        num_kv_heads=4, tie_word_embeddings=False, **_QWEN2,
    ),
}  # fmt: skip


def published_shape(model: HubId) -> QwenConfig | None:
    """The shape of a model of the organisation Qwen; None if it is not in the table."""
    return SHAPES.get(model.name) if model.repo == f"Qwen/{model.name}" else None
