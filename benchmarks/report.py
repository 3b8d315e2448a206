"""Report of a large run: time of the command, size of the page, time to the browser's first paint.

    python benchmarks/report.py [--dialogues 2048] [--turns 15] [--rounds 3] [--folder FOLDER]

Writes a run folder of that size with random words, which compress worse than natural text. Measures
`python -m mapo_jax.report` on it, with an empty and a filled cache of compiled programs, and the first
contentful paint in a headless Chromium. The targets are 10 s, 15 MB and 2 s. The best round counts, because
the machine may have other load. Needs Chromium (`apt-get install chromium`) and requirements-dev.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from mapo_jax.environment import state as calculator
from mapo_jax.environment.scenario import Scenario, load_scenarios

SCENARIOS, ROLLOUTS, EVALUATED = 16, 4, 2  # EVALUATED: rollouts per card of an evaluation
TOKENS, PROMPT = 60, 35  # tokens per turn, and how many of them are not sampled


def write_large_run(folder: Path, dialogues: int, turns: int, seed: int = 0) -> Path:
    """A run folder with two evaluations and about `dialogues` training dialogues of `turns` turns."""
    numbers = random.Random(seed)
    cards = load_scenarios(split="train")[:SCENARIOS]
    words = sorted({word for card in cards for stage in card.story.stages for word in stage.telling.split()})
    steps = max(1, dialogues // (SCENARIOS * ROLLOUTS))
    for name in ("dialogues", "evaluations"):
        (folder / name).mkdir(parents=True)

    def save(name: str, step: int, rollouts: int) -> None:
        rows = [
            json.dumps(_row(numbers, words, card, turns, step, s, r))
            for s, card in enumerate(cards)
            for r in range(rollouts)
        ]
        (folder / name / f"step_{step:06d}.jsonl").write_text("\n".join(rows) + "\n")

    for step in range(1, steps + 1):
        save("dialogues", step, ROLLOUTS)
    for step in (0, steps):
        save("evaluations", step, EVALUATED)
    metrics = [json.dumps({"step": step, "return/mean": numbers.random()}) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    return folder


def _row(
    numbers: random.Random, words: Sequence[str], card: Scenario, turns: int, step: int, s: int, r: int
) -> dict[str, Any]:
    text = lambda count: " ".join(numbers.choices(words, k=count)) + "."  # noqa: E731
    position, finished = card.start_position, []
    for _ in range(turns):
        levels = [numbers.choice((0, 0, -1) if k % 2 else (0, 0, 1, 2)) for k in range(6)]
        position = calculator.move(position, calculator.points(levels))
        finished.append(
            {
                "user": text(20),
                "reply": text(20),
                "judgement": {
                    "levels": levels,
                    "evidence": [text(4) for _ in levels],
                    "reasons": [text(6) for _ in levels],
                    "reading": None,
                },
                "failure": None,
                "position": position,
                "action": {"kind": "continue", "target": None, "guidance": text(6)},
                "truncated": False,
            }
        )
    size = turns * TOKENS
    return {
        "state": {
            "scenario": asdict(card),
            "seed": r,
            "turns": finished,
            "user": "",
            "outcome": "timeout",
            "failure": None,
            "rule": "max_turns",
        },
        "row": {
            "ids": numbers.choices(range(4000), k=size),
            "sampled": [i % TOKENS >= PROMPT for i in range(size)],
            "turn": [i // TOKENS if i % TOKENS >= PROMPT else -1 for i in range(size)],
            "logprob": [-numbers.expovariate(2.0) for _ in range(size)],
        },
        "scenario": s,
        "rollout": r,
        "step": step,
        "weight_version": step,
        "earlier_rows": [],
    }


def write_seconds(run: Path, cache: Path) -> float:
    """Wall time of the command in seconds, including the start of Python."""
    command = [sys.executable, "-m", "mapo_jax.report", "--run", str(run)]
    started = time.perf_counter()
    subprocess.run(
        command, check=True, env=os.environ | {"XDG_CACHE_HOME": str(cache)}, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def paint(browser: Any, file: Path) -> tuple[float, float]:
    """Seconds until the first contentful paint, and until the dialogues are readable."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(file.absolute().as_uri())
    page.wait_for_selector("html[data-ready]", timeout=120_000)
    first = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000")
    ready = page.evaluate("performance.now() / 1000")
    page.close()
    return first, ready


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dialogues", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the run here; by default it is deleted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = options.folder or Path(scratch) / "run"
        if not (run / "metrics.jsonl").exists():
            write_large_run(run, options.dialogues, options.turns)
        cold, warm, paints = [], [], []
        for number in range(options.rounds):
            cache = Path(scratch) / f"cache-{number}"
            cold.append(write_seconds(run, cache))
            warm.append(write_seconds(run, cache))
            shutil.rmtree(cache, ignore_errors=True)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            )
            paints = [paint(browser, run / "report.html") for _ in range(options.rounds)]
            browser.close()
        megabytes = (run / "report.html").stat().st_size / 1e6
    table = Table("", "best", "all rounds", "target below")
    spread = lambda values: " ".join(f"{value:.2f}" for value in values)  # noqa: E731
    table.add_row("written, empty compilation cache", f"{min(cold):.1f} s", spread(cold), "10 s")
    table.add_row("written, filled compilation cache", f"{min(warm):.1f} s", spread(warm), "10 s")
    table.add_row("size of the page", f"{megabytes:.1f} MB", "", "15 MB")
    first, ready = zip(*paints, strict=True)
    table.add_row("first paint", f"{min(first):.2f} s", spread(first), "2 s")
    table.add_row("dialogues are readable", f"{min(ready):.2f} s", spread(ready), "")
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
