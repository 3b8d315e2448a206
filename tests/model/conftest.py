import dataclasses

import jax
import numpy as np
import pytest

from mapo_jax.model.qwen import QwenConfig, parameter_shapes

# Nothing here has its default value, so that a constant which is not passed on shows: theta, epsilon, a head
# size that is not width / heads, an odd vocabulary.
QWEN3 = QwenConfig(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=20,
    rope_theta=5e6,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    qkv_bias=False,
    qk_norm=True,
    max_position_embeddings=777,
    family="qwen3",
)
QWEN2 = dataclasses.replace(QWEN3, qkv_bias=True, qk_norm=False, family="qwen2")


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Without most of LLVM's optimisations, as jax's own tests can be run: in two thirds of the time.

    Programs as users run them are compared with others in tests/rollout, tests/training and test_export.py.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_params(config: QwenConfig, seed: int = 0):
    """Weights large enough that every part of the model matters; numpy, because it compiles nothing."""
    rng = np.random.default_rng(seed)

    def draw(tree):
        drawn = {}
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                drawn[name] = draw(leaf)
            else:
                centre, scale = (1.0, 0.2) if name == "scale" else (0.0, 0.15)
                drawn[name] = (centre + scale * rng.standard_normal(leaf.shape)).astype(np.float32)
        return drawn

    return draw(parameter_shapes(config))


@pytest.fixture(scope="session")
def qwen3() -> QwenConfig:
    return QWEN3


@pytest.fixture(scope="session")
def draw_params():
    return random_params


@pytest.fixture(scope="session")
def qwen3_params(qwen3):
    return random_params(qwen3)


@pytest.fixture(scope="session", params=["qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-untied"])
def any_config(request) -> QwenConfig:
    family, tied = request.param.split("-")
    return dataclasses.replace({"qwen2": QWEN2, "qwen3": QWEN3}[family], tie_word_embeddings=tied == "tied")
