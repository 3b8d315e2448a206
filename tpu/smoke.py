"""Is this slice fit to train on? Devices, a collective, storage, one training step; on every worker.

    python tpu/smoke.py [--storage gs://BUCKET/smoke]

Also runs on a laptop's CPU. Prints a line for each check; the exit status is 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mapo_jax.config import AlgorithmConfig, MeshConfig, OptimizerConfig
from mapo_jax.learning.batch import Batch
from mapo_jax.learning.optimizer import make_optimizer
from mapo_jax.learning.train_state import create_state
from mapo_jax.learning.update import Scoring, make_update, place
from mapo_jax.model.qwen import QwenConfig, init_params, parameter_count
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
    """Makes this process one of the slice's; alone where jax finds no others."""
    try:
        jax.distributed.initialize()
    except ValueError:  # no cluster, and no coordinator named
        return


def devices() -> str:
    """What there is, and whether every process sees all of it."""
    counts = {device.process_index for device in jax.devices()}
    assert counts == set(range(jax.process_count())), f"no devices of some processes: {counts}"
    kind, peak = jax.devices()[0].device_kind, peak_flops(jax.devices()[0])
    speed = "peak not known, so no MFU" if peak is None else f"{peak / 1e12:.0f} TFLOP/s each"
    processes = "1 process" if len(counts) == 1 else f"{len(counts)} processes"
    return f"{jax.device_count()} x {kind} in {processes}; {speed}"


def collective() -> str:
    """A sum over all devices, every one of which holds another number."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    numbers = np.arange(1, jax.device_count() + 1, dtype=np.float32)
    spread = jax.make_array_from_callback(
        numbers.shape, NamedSharding(mesh, PartitionSpec("all")), lambda index: numbers[index]
    )
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(spread)
    found, right = float(np.asarray(total.addressable_data(0))), float(numbers.sum())
    assert found == right, f"the sum over all devices is {found}, not {right}"
    return f"1 + ... + {jax.device_count()} = {found:g}"


def storage(folder: str) -> str:
    """A file written, read back and deleted again, of every process."""
    from etils import epath

    file = epath.Path(folder) / f"process-{jax.process_index():05d}.bin"
    content = np.random.default_rng(jax.process_index()).bytes(2**20)
    started = time.monotonic()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    back = file.read_bytes()
    file.unlink()
    assert back == content, f"{file} came back different"
    return f"1 MiB to {folder} and back in {time.monotonic() - started:.2f} s"


def training_step() -> str:
    """The update of the main job on a small model, its weights spread over all devices."""
    mesh = make_mesh(MeshConfig())
    shardings = param_shardings(MODEL, mesh)
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
    assert _norm(state.params) != before, "the weights did not move"
    used = memory().get("perf/device_memory_peak_gib")
    peak = "" if used is None else f"; {used:.2f} GiB at most on a device"
    return f"{parameter_count(MODEL):,} parameters, loss {loss:+.4f}, gradient {norm:.3f}{peak}"


def _norm(params) -> float:
    squares = jax.jit(lambda tree: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))(params)
    return float(squares)


def check(name: str, work: Callable[[], str]) -> bool:
    """Runs one check and says what came of it."""
    started = time.monotonic()
    try:
        said, fine = work(), True
    except Exception as error:
        said, fine = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}", False
    if jax.process_index() == 0 or not fine:
        place = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
        print(f"{place}{name:<14} {said} ({time.monotonic() - started:.1f} s)", flush=True)
    return fine


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 if all is well."""
    parser = argparse.ArgumentParser(prog="python tpu/smoke.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--storage", metavar="FOLDER", help="where a run would be kept, such as gs://B/smoke")
    options = parser.parse_args(arguments)
    join()
    fine = [check("devices", devices), check("collective", collective)]
    if options.storage is not None:
        fine.append(check("storage", lambda: storage(options.storage)))
    fine.append(check("training step", training_step))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    raise SystemExit(main())
