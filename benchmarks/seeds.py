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

COLUMNS = (  # heading, metric, format
    ("return", "return/mean", "{:+.2f}"),
    ("reward per turn", "reward/mean", "{:+.2f}"),
    ("EPM-Q", "epm_q", "{:.1f}"),
    ("replies that harm", "judge/harm", "{:.0%}"),
    ("situation named", "naming/situation", "{:.0%}"),
    ("feeling named", "naming/feeling", "{:.0%}"),
    ("largest kind", "kind/most", "{:.0%}"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0")
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed to every run")
    options = parser.parse_args()
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
    """Markdown: a line per seed with before -> after, and a line with the best before and the worst after."""
    lines = ["| seed | " + " | ".join(name for name, _, _ in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")

    def cell(form: str, before: float | None, after: float | None) -> str:
        return " → ".join("-" if value is None else form.format(value) for value in (before, after))

    for seed, (before, after) in enumerate(rows):
        cells = [cell(form, before.get(metric), after.get(metric)) for _, metric, form in COLUMNS]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    spread = []
    for _, metric, form in COLUMNS:
        before = [first[metric] for first, _ in rows if metric in first]
        after = [last[metric] for _, last in rows if metric in last]
        if metric in ("kind/most", "judge/harm"):
            worst = f"at most {form.format(max(after))}"
        else:
            worst = f"at least {form.format(min(after))}"
        spread.append(f"at most {form.format(max(before))} → {worst}")
    lines.append("| all | " + " | ".join(spread) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
