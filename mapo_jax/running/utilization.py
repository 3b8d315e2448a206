"""Floating-point operations, MFU and memory of a step.

Model FLOPs as in arXiv:2204.02311 (PaLM, appendix B): rematerialisation and padding do not count.
docs/metrics.md has the formula.
"""

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from mapo_jax.config import Config
from mapo_jax.model.qwen import QwenConfig
from mapo_jax.rollout.requests import Counts

_GIB = 2**30

# Dense FLOP/s of a JAX device with bfloat16 operands and float32 sums, by `device_kind`; from the vendors'
# data sheets: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, nvidia.com (A100, H100, H200, L4).
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # half of a chip's 2307: a chip is two devices
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
}


def matrix_weights(config: QwenConfig) -> tuple[int, int]:
    """Number of weights in matrices: of all layers, and of the head."""
    width, size = config.hidden_size, config.head_dim
    attention = width * size * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = 3 * width * config.intermediate_size
    return config.num_layers * (attention + mlp), width * config.vocab_size


def forward_flops(config: QwenConfig, *, tokens: float, contexts: float, scored: float) -> float:
    """FLOPs of one forward pass: 2 per weight and token, and attention's two products.

    Args:
      tokens: through the layers.
      contexts: sum over these tokens of the tokens that each attends to, itself included.
      scored: tokens through the head.
    """
    layers, head = matrix_weights(config)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim
    return 2.0 * layers * tokens + attention * contexts + 2.0 * head * scored


def step_work(
    model: QwenConfig, config: Config, rows: Sequence[int], sampled: int, done: Counts
) -> dict[str, float]:
    """Tokens of a step, and model TFLOPs of its rollout and of its updates.

    Every prefilled or decoded token is one forward pass, a copied token none. An update is a forward pass and
    a backward pass of twice its FLOPs; log-probabilities of the trainer or of a reference add a forward pass.

    Args:
      rows: lengths of the step's token rows.
      sampled: tokens in the loss, which the policy sampled.
      done: the engine's counts; the mean context of the rows stands for that of its tokens.
    """
    tokens, contexts = sum(rows), sum(size * (size + 1) // 2 for size in rows)
    computed = done.prefilled + done.sampled
    rollout = forward_flops(
        model, tokens=computed, contexts=computed * contexts / max(1, tokens), scored=done.sampled
    )
    # Frozen weights have no gradient; the backward pass only goes through them.
    passes = (3 if model.lora is None else 2) * config.training.epochs
    passes += config.algorithm.old_logprobs == "trainer"
    passes += config.training.epochs * (config.algorithm.kl_coefficient > 0)
    update = passes * forward_flops(model, tokens=tokens, contexts=contexts, scored=sampled)
    return {
        "perf/tokens": float(tokens),
        "perf/rollout_tflop": rollout / 1e12,
        "perf/update_tflop": update / 1e12,
    }


def peak_flops(device: jax.Device, given: float | None = None) -> float | None:
    """Peak FLOP/s of a device: `given`, or by its kind; None if the kind is not in the table."""
    return given or PEAK_FLOPS.get(device.device_kind)


def utilization(metrics: Mapping[str, float], *, devices: int, peak: float | None) -> dict[str, float]:
    """Tokens per second and device; if the peak is known, MFU of the step and of its update."""
    rates = {"perf/tokens_per_second_per_chip": metrics["perf/tokens"] / metrics["timing_s/step"] / devices}
    if peak is None:
        return rates
    rollout, update = metrics["perf/rollout_tflop"], metrics["perf/update_tflop"]
    peak_tflops = peak * devices / 1e12
    return rates | {
        "perf/mfu": (rollout + update) / (metrics["timing_s/step"] * peak_tflops),
        "perf/mfu_update": update / (metrics["timing_s/update"] * peak_tflops),
    }


def memory() -> dict[str, float]:
    """GiB of host memory of this process, and of its fullest device if the runtime counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    sizes = {"perf/host_memory_peak_gib": peak / _GIB}
    status = Path("/proc/self/statm")
    if status.exists():
        pages = int(status.read_text().split()[1])
        sizes["perf/host_memory_gib"] = pages * resource.getpagesize() / _GIB
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    for name, key in (("", "bytes_in_use"), ("_peak", "peak_bytes_in_use")):
        if values := [stats[key] for stats in statistics if key in stats]:
            sizes[f"perf/device_memory{name}_gib"] = max(values) / _GIB
    return sizes
