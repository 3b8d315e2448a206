"""Every recipe in configs/ is a configuration that loads."""

from pathlib import Path

import pytest

from mapo_jax.config import load_config

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
    assert config.environment.family == "live"
