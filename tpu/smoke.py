"""Checks a slice before training: devices, a collective, storage, one training step; on every worker.

    python tpu/smoke.py [--storage gs://BUCKET/smoke]

Also runs on a CPU. Prints one line per check; the exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mapo_jax.config import AlgorithmConfig, MeshConfig, OptimizerConfig
from mapo_jax.learning.batch import Batch
from mapo_jax.learning.optimizer import make_optimizer
from mapo_jax.learning.train_state import create_state
from mapo_jax.learning.update import Scoring, make_update, place
from mapo_jax.model.qwen import QwenConfig, init_params, parameter_count, parameter_shapes
from mapo_jax.model.sharding import make_mesh, param_shardings
from mapo_jax.running.utilization import memory, peak_flops

MODEL = QwenConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)
LENGTH = 128  # tokens of a row


def join() -> None:
    """Connects this process with the others of the slice, if jax finds any."""
    try:
        jax.distributed.initialize()
    except ValueError:  # no cluster, and no coordinator address
        return


def devices() -> str:
    """The devices; every process must have some."""
    indices = {device.process_index for device in jax.devices()}
    assert indices == set(range(jax.process_count())), f"only these processes have devices: {indices}"
    kind, peak = jax.devices()[0].device_kind, peak_flops(jax.devices()[0])
    speed = "peak unknown, so no MFU" if peak is None else f"{peak / 1e12:.0f} TFLOP/s each"
    processes = "1 process" if len(indices) == 1 else f"{len(indices)} processes"
    return f"{jax.device_count()} x {kind} in {processes}; {speed}"


def collective() -> str:
    """A sum over all devices, each with a different number."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    numbers = np.arange(1, jax.device_count() + 1, dtype=np.float32)
    spread = jax.make_array_from_callback(
        numbers.shape, NamedSharding(mesh, PartitionSpec("all")), lambda index: numbers[index]
    )
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(spread)
    result, expected = float(np.asarray(total.addressable_data(0))), float(numbers.sum())
    assert result == expected, f"the sum over all devices is {result}, not {expected}"
    return f"1 + ... + {jax.device_count()} = {result:g}"


def storage(folder: str) -> str:
    """Every process writes a file, reads it back and deletes it."""
    from etils import epath

    file = epath.Path(folder) / f"process-{jax.process_index():05d}.bin"
    content = np.random.default_rng(jax.process_index()).bytes(2**20)
    started = time.monotonic()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    back = file.read_bytes()
    file.unlink()
    assert back == content, f"{file} was read back with different content"
    return f"1 MiB to {folder} and back in {time.monotonic() - started:.2f} s"


def training_step() -> str:
    """One update of a small model, with its weights sharded over all devices."""
    mesh = make_mesh(MeshConfig())
    shardings = param_shardings(parameter_shapes(MODEL), mesh)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    scoring = Scoring(MODEL, temperature=1.0, vocabulary_size=MODEL.vocab_size)
    update = make_update(scoring, optimizer, AlgorithmConfig(), shardings=shardings)
    rows = jax.device_count()
    generator = np.random.default_rng(0)
    mask = np.zeros((rows, LENGTH), bool)
    mask[:, LENGTH // 2 :] = True
    logprobs = np.where(mask, -np.log(MODEL.vocab_size), 0.0).astype(np.float32)
    batch = Batch(
        tokens=generator.integers(0, MODEL.vocab_size, (rows, LENGTH), dtype=np.int32),
        positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH)),
        mask=mask,
        old_logprobs=logprobs,
        sampler_logprobs=logprobs,
        advantages=np.where(mask, generator.normal(size=(rows, 1)), 0.0).astype(np.float32),
    )
    params = init_params(MODEL, 0, mesh)
    before = _norm(params)
    state, metrics = update(create_state(params, optimizer, shardings=shardings), place(batch, mesh))
    loss, norm = float(metrics["actor/loss"]), float(metrics["actor/grad_norm"])
    assert np.isfinite(loss) and norm > 0 and float(metrics["actor/skipped"]) == 0, (loss, norm)
    assert _norm(state.params) != before, "the weights did not change"
    used = memory().get("perf/device_memory_peak_gib")
    peak = "" if used is None else f"; {used:.2f} GiB at most on a device"
    return f"{parameter_count(MODEL):,} parameters, loss {loss:+.4f}, gradient {norm:.3f}{peak}"


def _norm(params) -> float:
    squares = jax.jit(lambda tree: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))(params)
    return float(squares)


def check(name: str, work: Callable[[], str]) -> bool:
    """Runs one check and prints its result."""
    started = time.monotonic()
    try:
        message, passed = work(), True
    except Exception as error:
        message, passed = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}", False
    if jax.process_index() == 0 or not passed:
        place = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
        print(f"{place}{name:<14} {message} ({time.monotonic() - started:.1f} s)", flush=True)
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 if all checks passed."""
    parser = argparse.ArgumentParser(prog="python tpu/smoke.py", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--storage", metavar="FOLDER", help="where a run would be saved, such as gs://BUCKET/smoke"
    )
    options = parser.parse_args(arguments)
    join()
    passed = [check("devices", devices), check("collective", collective)]
    if options.storage is not None:
        passed.append(check("storage", lambda: storage(options.storage)))
    passed.append(check("training step", training_step))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
