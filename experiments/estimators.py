"""The estimators on the language model of the default run: same warm starts, several seeds.

    python experiments/estimators.py [--seeds 8] [--variants mapo grpo ...] [--folder runs/estimators]
        [--processes 1] [--json FILE] [--quick] [key=value ...]

Each run is `python -m mapo_jax.train` with another estimator and seed. A seed determines the warm start (all
variants of the seed share it), the order of the cards, and the sampling of the first step; so differences
between variants are paired. After its training each run holds dialogues with the test cards. Finished parts
are not repeated, unfinished runs are continued. `--quick` makes two steps with a barely trained model: it
shows that the parts work, and nothing about the estimators. Further `key=value` go to every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from experiments.records import circumstances, holm, interval, paired, read_json, rounded, write_json
from mapo_jax.algorithm.rewards import distance
from mapo_jax.config import load_config
from mapo_jax.environment.scenario import start_position
from mapo_jax.errors import UserError

VARIANTS = {
    "mapo 0.33": ["algorithm.estimator=mapo"],
    "mapo 0.50": ["algorithm.estimator=mapo", "algorithm.turn_weight=0.5"],
    "grpo": ["algorithm.estimator=grpo"],
    "turn": ["algorithm.estimator=turn"],
    "batch": ["algorithm.estimator=batch"],
    "reinforce_plus_plus": ["algorithm.estimator=reinforce_plus_plus"],
}
QUICK = [
    "training.steps=2", "warmstart.steps=12", "warmstart.dialogues=40", "warmstart.min_naming_ratio=0",
    "model.fresh.hidden=32", "model.fresh.layers=1", "rollout.scenarios=2", "rollout.rollouts=2",
    "rollout.max_turns=2", "rollout.min_turns=2", "evaluation.scenarios=2", "evaluation.rollouts=1",
    "evaluation.every=2",
]  # fmt: skip
QUICK_VARIANTS = ["mapo 0.33", "grpo"]
SPIKE = 3.0  # a gradient norm of more than this many medians of its run is a spike


def run_folder(folder: Path, variant: str, seed: int) -> Path:
    """Where a variant's run of a seed lies."""
    return folder / variant.replace(" ", "_") / f"seed_{seed}"


def train(folder: Path, variant: str, seed: int, overrides: Sequence[str]) -> None:
    """Trains a run, or the rest of it, and holds its dialogues with the test cards.

    Raises:
      UserError: a command failed; its own message has been printed.
    """
    place = run_folder(folder, variant, seed)
    settings = [f"run.directory={place}", f"training.seed={seed}", "logging.progress=false", *overrides]
    steps = load_config(None, settings).training.steps
    if not (place / "evaluations" / f"step_{steps:06d}.jsonl").exists():
        command(place, "train", ["-m", "mapo_jax.train", *settings, *VARIANTS[variant]])
    if not (place / "test.json").exists():
        arguments = ["empa", "--model", str(place), "--split", "test", "--seed", "0"]
        output = ["--output", str(place / "test"), "--json", str(place / "test.json")]
        command(place, "test", ["-m", "mapo_jax.evaluate", *arguments, *output])


def command(place: Path, name: str, arguments: Sequence[str]) -> None:
    """Runs Python, with its output in PLACE.NAME.log."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f"{place.name}.{name}.log").open("a") as log:
        done = subprocess.run([sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise UserError(f"{place}: `{name}` ended with status {done.returncode}; see {log.name}")


def states(file: Path) -> list[dict[str, Any]]:
    """The saved dialogues of a JSONL file."""
    return [json.loads(line)["state"] for line in file.read_text(encoding="utf-8").splitlines()]


def better_off(dialogues: Sequence[dict[str, Any]]) -> float:
    """Share of the dialogues whose user lacks less at the end than at the start."""
    ends = [
        [start_position(d["scenario"]["start"]), d["turns"][-1]["position"]] for d in dialogues if d["turns"]
    ]
    lack = distance(np.array(ends))
    return float(np.mean(lack[:, 1] < lack[:, 0]))


def record(place: Path) -> dict[str, Any]:
    """What is kept of a finished run."""
    lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "actor/grad_norm" in row]
    validation = {}
    for file in sorted((place / "evaluations").glob("step_*.json")):
        figures = read_json(file)
        validation[int(file.stem[5:])] = {
            "return": round(figures["return/mean"], 4),
            "reward": round(figures["reward/mean"], 4),
            "epm_q": round(figures["epm_q"], 2),
            "kind_most": round(figures["kind/most"], 3),
            "harm": round(figures["judge/harm"], 3),
            "better_off": round(better_off(states(file.with_suffix(".jsonl"))), 3),
        }
    norms = np.array([row["actor/grad_norm"] for row in steps])
    (scores,) = read_json(place / "test.json").values()
    return {
        "training_return": rounded([row["return/mean"] for row in steps]),
        "grad_norm": rounded(norms),
        "spikes": int(np.sum(norms > SPIKE * np.median(norms))),
        "validation": validation,
        "test_reward": round(scores["idr_mean"], 4),
        "test_epm_q": round(scores["epm_q"], 2),
    }


def summary(runs: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Markdown: a line per variant; means over the seeds with 95 % bootstrap intervals, p corrected."""
    heads = (
        *(
            "estimator",
            "seeds",
            "before",
            "after",
            "minus MAPO at 1/3 (Holm's p)",
            "users better off",
            "harm",
        ),
        *("EPM-Q", "test reward", "test EPM-Q", "spikes"),
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    base = "mapo 0.33"
    tests = {
        variant: paired(*ends)
        for variant in runs
        if variant != base and len((ends := _paired_ends(runs, variant, base))[0]) > 1
    }
    corrected = holm({variant: test["p"] for variant, test in tests.items()})
    for variant, by_seed in runs.items():
        ends = [list(run["validation"].values()) for run in by_seed.values()]

        def mean(key: str, place: int = -1, form: str = "{:+.2f}", ends: list = ends) -> str:
            return " [".join((form, f"{form}, {form}]")).format(*interval([end[place][key] for end in ends]))

        against = ""
        if variant in tests:
            test = tests[variant]
            against = (
                f"{test['mean']:+.2f} [{test['low']:+.2f}, {test['high']:+.2f}] ({corrected[variant]:.2f})"
            )
        harm, epm_q = (np.mean([end[-1][key] for end in ends]) for key in ("harm", "epm_q"))
        keys = ("test_reward", "test_epm_q", "spikes")
        reward, test_epm_q, spikes = (np.mean([run[key] for run in by_seed.values()]) for key in keys)
        cells = (
            *(variant, len(by_seed), mean("return", 0), mean("return"), against),
            *(mean("better_off", form="{:.0%}"), f"{harm:.0%}", f"{epm_q:.1f}"),
            *(f"{reward:+.2f}", f"{test_epm_q:.1f}", f"{spikes:.1f}"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def pairs(runs: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Markdown: the validation return of every two variants, by seed; p not corrected."""
    lines = ["| | difference | seeds ahead | p |", "|---|---|---|---|"]
    for one, other in combinations(runs, 2):
        ends = _paired_ends(runs, one, other)
        if len(ends[0]) > 1:
            test, ahead = paired(*ends), sum(np.greater(*ends))
            cells = (
                f"{test['mean']:+.2f} [{test['low']:+.2f}, {test['high']:+.2f}] | {ahead} of {len(ends[0])}"
            )
            lines.append(f"| {one} minus {other} | {cells} | {test['p']:.3f} |")
    return "\n".join(lines)


def _paired_ends(runs: dict[str, dict[int, dict[str, Any]]], *variants: str) -> list[list[float]]:
    """The last validation return of each variant, of the seeds that all have."""
    common = sorted(set.intersection(*(set(runs.get(variant, {})) for variant in variants)))
    return [
        [list(runs[variant][seed]["validation"].values())[-1]["return"] for seed in common]
        for variant in variants
    ]


def compare(
    folder: Path, variants: Sequence[str], seeds: int, overrides: Sequence[str], processes: int = 1
) -> dict[str, dict[int, dict[str, Any]]]:
    """Trains what is missing, `processes` runs at once, and collects every run by variant and seed.

    Raises:
      UserError: a run failed.
    """
    tasks = [(variant, seed) for seed in range(seeds) for variant in variants]  # seed by seed
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda task: train(folder, *task, overrides), tasks))
    return {
        variant: {seed: record(run_folder(folder, variant, seed)) for seed in range(seeds)}
        for variant in variants
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing, collects every finished run, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds, from 0")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--quick", action="store_true", help="one seed of MAPO and GRPO, two steps")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed to every run")
    options = parser.parse_intermixed_args(arguments)
    seeds, variants, overrides = options.seeds, options.variants, list(options.overrides)
    if options.quick:
        seeds, variants, overrides = 1, QUICK_VARIANTS, [*QUICK, *overrides]
    began = time.monotonic()
    try:
        runs = compare(options.folder, variants, seeds, overrides, options.processes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        about = circumstances(time.monotonic() - began)
        write_json(options.json, {"about": about, "overrides": overrides, "runs": runs})
    print(summary(runs), pairs(runs), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
