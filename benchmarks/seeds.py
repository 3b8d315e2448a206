"""The default run over several seeds: the effect of training compared with the variation between seeds.

    python benchmarks/seeds.py [--seeds 5] [--folder runs/seeds] [key=value ...]

Runs `python -m mapo_jax.train` once per seed, one after the other, each with its own warm start, and prints
a table of the validation dialogues before and after training. Finished runs are not repeated; unfinished
runs are continued.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from experiments.records import interval

COLUMNS = (  # heading, metric, format
    ("return", "return/mean", "{:+.2f}"),
    ("reward per turn", "reward/mean", "{:+.2f}"),
    ("EPM-Q", "epm_q", "{:.1f}"),
    ("replies that harm", "judge/harm", "{:.0%}"),
    ("largest kind", "kind/most", "{:.0%}"),
    ("steps offered", "kind/offer_step", "{:.0%}"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0")
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed to every run")
    options = parser.parse_intermixed_args()
    rows = []
    for seed in range(options.seeds):
        folder = options.folder / f"seed_{seed}"
        command = [sys.executable, "-m", "mapo_jax.train", f"run.directory={folder}", f"training.seed={seed}"]
        subprocess.run([*command, *options.overrides], check=True)
        files = sorted((folder / "evaluations").glob("step_*.json"))
        rows.append([json.loads(file.read_text()) for file in (files[0], files[-1])])
    print(table(rows))
    return 0


def table(rows: list[list[dict[str, float]]]) -> str:
    """Markdown: a line per seed with before → after, and a line of means with 95 % bootstrap intervals."""
    lines = ["| seed | " + " | ".join(name for name, _, _ in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for seed, ends in enumerate(rows):
        cells = [" → ".join(form.format(end.get(key, 0.0)) for end in ends) for _, key, form in COLUMNS]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    means = []
    for _, key, form in COLUMNS:
        spreads = [interval([end.get(key, 0.0) for end in column]) for column in zip(*rows, strict=True)]
        means.append(" → ".join(f"{form} [{form}, {form}]".format(*spread) for spread in spreads))
    lines.append("| mean | " + " | ".join(means) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
