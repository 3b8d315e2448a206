"""Every recipe in configs/ loads, and has the paper's settings if it says so."""

import re
from pathlib import Path

import pytest

from mapo_jax.config import load_config
from mapo_jax.model.sharding import make_mesh
from mapo_jax.running.memory import forecast_memory
from tpu.shapes import model_shape

CONFIGS = [
    path
    for path in sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
    if path.stem != "tiny"  # the embedded one: see test_train.py
]


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_recipe_loads_and_opens_with_its_command(path):
    config = load_config(path)
    head = path.read_text().split("\nrun:")[0]
    assert f"--config configs/{path.name}" in head
    for word in ("Hardware:", "Cost:", "Expect:"):
        assert word in head
    assert config.environment.family == ("scripted" if path.stem == "scripted" else "live")


# Of the paper's training: scenarios, rollouts, scenarios of a mini-batch, most and fewest turns, temperature.
SMALLER, LARGEST = (16, 4, 8, 15, 8, 1.0), (32, 4, 16, 20, 12, 0.8)
# A scenario is not split over hosts, and a v6e-256 has 64 of them.
ON_64_HOSTS = (64, 4, 32, 20, 12, 0.8)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen2.5_7b_v5p", SMALLER),
        ("qwen3_8b_v5p", SMALLER),
        ("qwen3_8b_v6e", SMALLER),
        ("qwen3_14b_v5p", SMALLER),
        ("qwen3_32b_v5p", LARGEST),
        ("qwen3_32b_v6e", ON_64_HOSTS),
    ],
)
def test_a_tpu_recipe_has_the_papers_settings(name, sizes):
    config = load_config(next(path for path in CONFIGS if path.stem == name))
    rollout, training, optimizer = config.rollout, config.training, config.optimizer
    assert sizes == (
        rollout.scenarios,
        rollout.rollouts,
        training.minibatch_scenarios,
        rollout.max_turns,
        rollout.min_turns,
        rollout.temperature,
    )
    assert rollout.max_tokens >= 25_000
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.gradient_clip) == (1e-6, 0.1, 1.0)
    assert (optimizer.schedule, optimizer.warmup) == ("cosine", 0.05)
    # Two passes over the 727 scenarios of the paper, as far as whole steps go.
    assert abs(training.steps * rollout.scenarios - 2 * 727) < rollout.scenarios
    assert (config.algorithm.estimator, config.algorithm.kl_coefficient) == ("mapo", 0.0)
    assert config.environment.user.model == config.environment.judge.model == "Qwen3-235B-A22B-Instruct-2507"
    assert config.environment.user.temperature == config.environment.judge.temperature == 1.0


@pytest.mark.parametrize("name", ["live-small", "qwen3_0.6b_gpu", "qwen3_4b_gpu", "qwen3_8b_lora_gpu"])
def test_a_gpu_recipe_fits_the_gpu_that_it_names(name, absent_device):
    """With three quarters of its memory, jax's default."""
    path = next(path for path in CONFIGS if path.stem == name)
    size = re.search(r"one NVIDIA GPU of (\d+) GB", path.read_text())
    config = load_config(path)
    forecast = forecast_memory(
        config, model_shape(config), make_mesh(config.mesh, [absent_device(platform="gpu")])
    )
    assert forecast.most < 0.75 * 1e9 * int(size[1])
