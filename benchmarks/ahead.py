"""Steps ahead: what `rollout.ahead` brings where users and judges are slow, and costs where they are not.

    python benchmarks/ahead.py [--steps 12] [--rounds 1] [--world 8] [--json FILE]
    python benchmarks/ahead.py --seeds 8 [--folder runs/ahead] [--json FILE] [key=value ...]

Runs of a small random model in the scripted world, whose users, judges and directors answer after a time
that is drawn for each call, with a long tail (log-normal, sigma 0.8), and is the same for every N. First all
answer at once (compute-bound). From that follows the devices' time of a step, and from this the mean time of
a call: the world's time of a step is --world times that. Dialogues that wait for their users share fewer
decode steps, so a latency-bound step takes the devices longer; the title of the table has the world's time in
that of the devices. N = 0, 1, 2 run in turn, round after round. The rate is that of the steps after the first
N + 1; their number is a multiple of N + 1 for each N, since steps that begin together also end together.

With --seeds the benchmark runs the default run instead (and `key=value`), for each seed and N, and compares
the validation return after the same steps and after the same time. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from experiments.records import interval
from mapo_jax import stages, train
from mapo_jax.config import load_config
from mapo_jax.environment.roles import Roles
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.model.huggingface import save_params, write_config
from mapo_jax.model.qwen import QwenConfig, init_params
from mapo_jax.running.metrics import METRICS_FILE, read_rows
from mapo_jax.tokenizer import train_tokenizer, write_tokenizer

AHEAD, SIGMA = (0, 1, 2), 0.8
SETTINGS = {
    "rollout.scenarios": 4,
    "rollout.rollouts": 2,
    "rollout.max_turns": 4,
    "rollout.min_turns": 4,
    "rollout.max_reply_tokens": 16,
    "rollout.max_tokens": 320,
    "training.minibatch_scenarios": 2,
    "training.microbatch_tokens": 0,
}
TINY = SETTINGS | {
    "rollout.scenarios": 2,
    "rollout.rollouts": 2,
    "rollout.max_turns": 2,
    "rollout.min_turns": 2,
}


def write_model(folder: Path, hidden: int) -> Path:
    """A random Qwen3 with a tokenizer of the scripted world."""
    texts = [line for card in load_scenarios() for stage in card.story.stages for line in stage.line]
    tokenizer = train_tokenizer(texts, 512, max_tokens=512)
    write_tokenizer(folder, tokenizer)
    config = QwenConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=512,
    )
    save_params(folder, init_params(config, seed=3), config, dtype="float32")
    write_config(folder, config)
    return folder


class Slow:
    """A role whose answers take `seconds` on average; a call's time follows from its dialogue and turn."""

    def __init__(self, role: Any, name: str, seconds: float) -> None:
        self._role, self._name, self._seconds = role, name, seconds

    def __getattr__(self, method: str):
        async def call(subject, *arguments):
            turn = getattr(subject, "turn_count", -1)
            seed = arguments[0] if turn < 0 else subject.seed
            draw = random.Random(f"{seed} {turn} {self._name}").lognormvariate(-(SIGMA**2) / 2, SIGMA)
            await asyncio.sleep(self._seconds * draw)
            return await getattr(self._role, method)(subject, *arguments)

        return call


def run(folder: Path, ahead: int, seconds: float, settings: Mapping[str, Any]) -> dict[str, float]:
    """Trains with calls of `seconds`; returns seconds of a step, its devices' time, and their busy share."""
    collect = stages.collect

    def slow_collect(scenarios, rollouts, engine, chat, roles, *rest, **options):
        slow = Roles(*(Slow(getattr(roles, name), name, seconds) for name in ("user", "judge", "director")))
        return collect(scenarios, rollouts, engine, chat, slow, *rest, **options)

    changes = {**settings, "rollout.ahead": ahead, "run.directory": folder}
    stages.collect = slow_collect if seconds else collect
    try:
        train.train(load_config(None, [f"{k}={v}" for k, v in changes.items()]), Console(quiet=True))
    finally:
        stages.collect = collect
    rows = [row for row in read_rows(folder / METRICS_FILE) if "reward/mean" in row][ahead:]
    times = [row["timing_s/unix"] for row in rows]
    return {
        "seconds": (times[-1] - times[0]) / (len(times) - 1),
        "device": statistics.median(row["perf/device_busy"] * row["timing_s/step"] for row in rows[1:]),
        "busy": statistics.mean(row["perf/device_busy"] for row in rows[1:]),
    }


def rates(options: argparse.Namespace) -> dict[str, Any]:
    """Steps per hour for each N, compute-bound and latency-bound."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        settings = {
            **(TINY if options.tiny else SETTINGS),
            "model.path": write_model(base, 32 if options.tiny else 256),
            "run.compilation_cache": base / "programs",
            "training.steps": options.steps,
            "evaluation.every": options.steps,
            "evaluation.scenarios": 1,
            "evaluation.rollouts": 1,
            "checkpoint.every": options.steps,
            "logging.tensorboard": False,
            "logging.progress": False,
            "environment.concurrency": 1024,
        }
        run(base / "first", 0, 0.0, settings | {"training.steps": 2})  # compiles

        def measure(name: str, seconds: float) -> list[list[dict[str, float]]]:
            return [
                [run(base / f"{name}_{number}_{ahead}", ahead, seconds, settings) for ahead in AHEAD]
                for number in range(options.rounds)
            ]

        compute = measure("compute", 0.0)
        device = statistics.median(row[0]["device"] for row in compute)
        turns = settings["rollout.max_turns"]
        # A judge, a director and a user in each turn, without the last two in the last; a step lasts as long
        # as its slowest dialogue, about a third longer than the mean.
        seconds = options.world * device / (3 * turns - 2) / 1.3
        latency = measure("latency", seconds)
    return {
        "device_seconds": device,
        "call_seconds": seconds,
        "world_share": statistics.median(row[0]["seconds"] / row[0]["device"] - 1 for row in latency),
        "ratio": _ratios(latency),
        "compute_bound_ratio": _ratios(compute),
        "steps_per_hour": {str(n): 3600 / _median(latency, n, "seconds") for n in AHEAD},
        "device_busy": {str(n): _median(latency, n, "busy") for n in AHEAD},
        "compute_bound_steps_per_hour": {str(n): 3600 / _median(compute, n, "seconds") for n in AHEAD},
        "compute_bound_device_busy": {str(n): _median(compute, n, "busy") for n in AHEAD},
    }


def _median(rounds: Sequence[Sequence[Mapping[str, float]]], ahead: int, name: str) -> float:
    return statistics.median(row[ahead][name] for row in rounds)


def _ratios(rounds: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    return {
        str(n): statistics.median(row[0]["seconds"] / row[n]["seconds"] for row in rounds) for n in AHEAD[1:]
    }


def curves(options: argparse.Namespace) -> dict[str, Any]:
    """The validation return of the default run by step and by time, for each seed and N."""
    found: dict[str, list[list[list[float]]]] = {}
    for seed in range(options.seeds):
        for ahead in AHEAD:
            folder = options.folder / f"seed_{seed}_ahead_{ahead}"
            changes = [f"run.directory={folder}", f"training.seed={seed}", f"rollout.ahead={ahead}"]
            subprocess.run([sys.executable, "-m", "mapo_jax.train", *changes, *options.overrides], check=True)
            rows = read_rows(folder / METRICS_FILE)
            step_seconds = {row["step"]: row["timing_s/step"] for row in rows if "timing_s/step" in row}
            curve = [
                [
                    row["step"],
                    sum(s for n, s in step_seconds.items() if n <= row["step"]),
                    row["evaluation/return/mean"],
                ]
                for row in rows
                if "evaluation/return/mean" in row
            ]
            found.setdefault(str(ahead), []).append(curve)
    last = {ahead: [curve[-1][2] for curve in seeds] for ahead, seeds in found.items()}
    differences = {n: [a - b for a, b in zip(last[n], last["0"], strict=True)] for n in ("1", "2")}
    return {
        "curves": found,
        "last_return": {ahead: list(interval(values)) for ahead, values in last.items()},
        "difference": {n: list(interval(values)) for n, values in differences.items()},
    }


def table(result: Mapping[str, Any]) -> Table:
    """Steps per hour and busy share by N; or the last validation return."""
    title = (
        "the default run" if "curves" in result else f"world {result['world_share']:.1f} x the devices' time"
    )
    shown = Table(title=title, title_justify="left")
    for heading in ("", *(f"N = {n}" for n in AHEAD)):
        shown.add_column(heading, justify="right" if heading else "left")
    if "curves" in result:
        for name in ("last_return", "difference"):
            cells = [
                "{:+.2f} [{:+.2f}, {:+.2f}]".format(*result[name][n]) if n in result[name] else ""
                for n in "012"
            ]
            shown.add_row(name, *cells)
        return shown
    for name in ("steps_per_hour", "device_busy", "ratio"):
        for kind in ("", "compute_bound_"):
            values = {"0": 1.0} | result[kind + name]
            shown.add_row((kind + name).replace("_", " "), *(f"{values[str(n)]:.3g}" for n in AHEAD))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of a run; a multiple of 6")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of runs")
    parser.add_argument(
        "--world", type=float, default=8.0, help="the world's time, in that of a compute-bound step's devices"
    )
    parser.add_argument("--tiny", action="store_true", help="few short dialogues: only to see that it works")
    parser.add_argument("--seeds", type=int, default=0, help="compare the default run over these many seeds")
    parser.add_argument("--folder", type=Path, default=Path("runs/ahead"), help="folder of these runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the runs of --seeds")
    options = parser.parse_intermixed_args()
    result = curves(options) if options.seeds else rates(options)
    Console(highlight=False).print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
