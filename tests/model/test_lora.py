"""Adapters against merged weights and against the chain rule; their tree, their shardings, their start."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mapo_jax.model import sharding
from mapo_jax.model.lora import ADAPTERS, LoRA, join, merge, split
from mapo_jax.model.qwen import (
    hidden_states,
    in_precision,
    init_adapters,
    init_params,
    parameter_count,
    parameter_shapes,
)

pytestmark = pytest.mark.parametrize("any_config", ["qwen2-untied", "qwen3-tied"], indirect=True)

LORA = LoRA(rank=3, alpha=5.0, targets=("q", "v", "o", "down"))  # scale 5/3, not all of the maps


@pytest.fixture
def adapted(any_config, draw_params):
    config = dataclasses.replace(any_config, lora=LORA)
    return config, draw_params(config)


def merged_by_hand(params, config):
    """`W + 5/3 A B`, layer by layer, in numpy."""
    whole = jax.tree.map(np.array, split(params)[1])
    for part, names in (("attention", "qvo"), ("mlp", ("down",))):
        for name in names:
            module = params["layers"][part][name]
            for layer in range(config.num_layers):
                a, b = (module[side][layer] for side in ADAPTERS)
                inner = 2 if name == "o" else 1
                whole["layers"][part][name]["kernel"][layer] += (
                    5 / 3 * np.tensordot(a.reshape(-1, 3).reshape(*a.shape[:inner], 3), b, 1)
                )
    return whole


def test_adapters_compute_what_merged_weights_compute(adapted):
    config, params = adapted
    plain = dataclasses.replace(config, lora=None)
    by_hand = merged_by_hand(params, config)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), merge(params, LORA), by_hand
    )
    tokens = np.random.default_rng(0).integers(0, 120, (2, 9))
    positions = np.broadcast_to(np.arange(9), (2, 9))
    ours = hidden_states(params, config, tokens, positions)
    # float32; the low-rank term is summed apart from the rest
    np.testing.assert_allclose(ours, hidden_states(by_hand, plain, tokens, positions), atol=2e-5)
    without = hidden_states(split(params)[1], plain, tokens, positions)
    assert np.abs(ours - without).max() > 0.1, "the adapters do nothing"


def test_fresh_adapters_change_nothing_and_lie_as_their_kernels_do(adapted):
    config, _ = adapted
    base = init_params(dataclasses.replace(config, lora=None), 1)
    adapters = init_adapters(config, 2)
    tokens, positions = np.arange(6)[None], np.arange(6)[None]
    np.testing.assert_array_equal(
        hidden_states(join(base, adapters), config, tokens, positions),
        hidden_states(base, dataclasses.replace(config, lora=None), tokens, positions),
    )
    start = np.asarray(adapters["layers"]["mlp"]["down"]["lora_a"])
    bound = config.intermediate_size**-0.5
    assert np.abs(start).max() <= bound and np.abs(start).std() > 0.2 * bound
    # layer 0 and layer 1 start apart
    assert not np.array_equal(start[0], start[1])

    mesh = jax.sharding.AbstractMesh((1, 2, 2), sharding.MESH_AXES)
    places = sharding.param_shardings(parameter_shapes(dataclasses.replace(config, vocab_size=132)), mesh)
    o = places["layers"]["attention"]["o"]
    assert o["lora_a"].spec == PartitionSpec(None, "tensor", None, None)
    assert o["lora_b"].spec == PartitionSpec(None, None, "fsdp")


def test_trees_come_apart_and_together(adapted):
    config, params = adapted
    adapters, base = split(params)
    assert jax.tree.structure(base) == jax.tree.structure(
        parameter_shapes(dataclasses.replace(config, lora=None))
    )
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(adapters)}
    assert names == set(ADAPTERS)
    jax.tree.map(np.testing.assert_array_equal, join(base, adapters), params)
    # q: 48 x 3 + 3 x 4 x 20, v: 48 x 3 + 3 x 2 x 20, o: 4 x 20 x 3 + 3 x 48, down: 80 x 3 + 3 x 48; 3 layers
    assert parameter_count(config) - parameter_count(dataclasses.replace(config, lora=None)) == 3 * (
        384 + 264 + 384 + 384
    )
    kinds = {
        path[-1].key: leaf.dtype.name
        for path, leaf in jax.tree_util.tree_leaves_with_path(in_precision(params, "bfloat16"))
    }
    assert kinds["kernel"] == kinds["embedding"] == "bfloat16"
    assert kinds["scale"] == kinds["lora_a"] == kinds["lora_b"] == "float32"
