"""FLOPs against what XLA counts in the compiled model, a hand calculation, and devices that are not known."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mapo_jax.config import load_config
from mapo_jax.model.qwen import QwenConfig, hidden_states, init_params, parameter_count
from mapo_jax.rollout.requests import Counts
from mapo_jax.running import utilization
from mapo_jax.running.utilization import (
    forward_flops,
    matrix_weights,
    memory,
    peak_flops,
    step_work,
)

CONFIG = QwenConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)


def test_the_weights_are_all_but_norms_and_the_embedding():
    layers, head = matrix_weights(CONFIG)
    norms = 3 * (2 * 32 + 2 * 16) + 32
    assert layers + head == parameter_count(CONFIG) - norms  # tied: the embedding is the head


def test_a_forward_pass_is_what_xla_counts():
    """XLA counts every product of the compiled program, with attention over the whole square of the row."""
    length = 64
    tokens, positions = np.zeros((2, length), np.int32), np.tile(np.arange(length), (2, 1))
    params = init_params(CONFIG, 0)
    compiled = jax.jit(lambda p, t: hidden_states(p, CONFIG, t, positions, dtype=jnp.float32)).lower(
        params, tokens
    )
    counted = compiled.compile().cost_analysis()["flops"]
    ours = forward_flops(CONFIG, tokens=2 * length, contexts=2 * length**2, scored=0)
    assert ours < counted < 1.15 * ours  # the rest is norms, softmax, rotary embedding


def test_a_step_is_its_rollout_once_and_its_update_three_times():
    attention = 4 * 3 * 4 * 16  # per token and token attended to
    layers, head = matrix_weights(CONFIG)
    causal = 10 * 11 / 2 + 20 * 21 / 2
    once = 2 * layers * 30 + attention * causal + 2 * head * 12
    rollout = 2 * layers * 15 + attention * 15 * causal / 30 + 2 * head * 12
    done = Counts(prefilled=3, copied=15, sampled=12, steps=4)
    for overrides, passes in (
        ([], 3),
        (["training.epochs=2"], 6),
        (["training.epochs=2", "algorithm.old_logprobs=trainer", "algorithm.kl_coefficient=0.1"], 9),
    ):
        work = step_work(CONFIG, load_config(None, overrides), [10, 20], 12, done)
        assert work == pytest.approx(
            {
                "perf/tokens": 30,
                "perf/rollout_tflop": rollout / 1e12,
                "perf/update_tflop": passes * once / 1e12,
            },
            rel=1e-12,
        )
    nothing = step_work(CONFIG, load_config(None, []), [0], 0, Counts())  # no user could even open
    assert set(nothing.values()) == {0}


def test_utilization_is_work_over_what_the_devices_can_do():
    metrics = {
        "perf/tokens": 640.0,
        "perf/rollout_tflop": 10.0,
        "perf/update_tflop": 30.0,
        "timing_s/step": 8.0,
        "timing_s/update": 2.0,
    }
    found = utilization.utilization(metrics, devices=4, peak=5e12)
    assert found == {
        "perf/tokens_per_second_per_chip": 20,
        "perf/mfu": 40 / (8 * 20),
        "perf/mfu_update": 30 / (2 * 20),
    }
    rates = utilization.utilization(metrics, devices=4, peak=None)
    assert rates == {"perf/tokens_per_second_per_chip": 20}


def test_an_unknown_device_has_no_peak_unless_it_is_given():
    device = types.SimpleNamespace(device_kind="TPU v6 lite")
    assert peak_flops(device) == 918e12 and peak_flops(device, 1e15) == 1e15
    assert peak_flops(jax.devices("cpu")[0]) is None
    assert peak_flops(types.SimpleNamespace(device_kind="TPU v99")) is None


def test_memory_is_that_of_the_process_and_of_devices_that_count_it(monkeypatch):
    found = memory()
    assert 0.01 < found["perf/host_memory_gib"] <= 1.05 * found["perf/host_memory_peak_gib"] < 1000
    counting = types.SimpleNamespace(
        memory_stats=lambda: {"bytes_in_use": 3 * 2**30, "peak_bytes_in_use": 2**32}
    )
    silent = types.SimpleNamespace(memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [silent, counting])
    found = memory()
    assert found["perf/device_memory_gib"] == 3 and found["perf/device_memory_peak_gib"] == 4
