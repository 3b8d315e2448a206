"""Draws every figure of docs/evidence.md from the raw results.

    python experiments/figures.py [--results experiments/results] [--output docs/figures]

Figures whose results are missing are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from experiments.records import interval, paired, read_json
from experiments.tables import at_best_rate, labels_of, selection_of

ROOT = Path(__file__).resolve().parents[1]
DISCOUNT_RATE = 0.1
WINDOW = 5  # steps of a running mean
COLOURS = {
    "mapo 0.33": "#1f77b4",
    "mapo 0.50": "#17becf",
    "turn": "#2ca02c",
    "batch": "#d62728",
    "grpo": "#7f7f7f",
    "reinforce_plus_plus": "#9467bd",
}
NAMES = {
    "mapo 0.33": "MAPO, w = 1/3",
    "mapo 0.50": "MAPO, w = 1/2",
    "turn": "turn level alone",
    "batch": "batch level alone",
    "grpo": "GRPO",
    "reinforce_plus_plus": "REINFORCE++",
}


def lab_worlds(content: dict[str, Any]) -> Figure:
    """Difference to GRPO in every world."""
    worlds = content["worlds"]
    places = [name for name, records in worlds.items() if "grpo" in labels_of(records)]
    labels = [label for label in NAMES if label != "grpo"]
    figure, axes = plt.subplots(figsize=(7.5, 0.62 * len(places) + 1.2))
    for i, name in enumerate(places):
        base = at_best_rate(worlds[name], "grpo")[1]
        for j, label in enumerate(labels):
            if label not in labels_of(worlds[name]):
                continue
            test = paired(at_best_rate(worlds[name], label)[1], base)
            height = -i + 0.3 - 0.15 * j
            axes.plot([test["low"], test["high"]], [height] * 2, color=COLOURS[label], linewidth=2)
            axes.plot(
                test["mean"], height, "o", color=COLOURS[label], markersize=4, label="" if i else NAMES[label]
            )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks([-i for i in range(len(places))], places)
    axes.set_xlabel("return after training, minus that of GRPO (95 % interval over paired seeds)")
    axes.legend(fontsize=8, loc="best")
    axes.grid(axis="x", alpha=0.3)
    return figure


def lab_weight(content: dict[str, Any]) -> Figure:
    """Return over the turn weight, 0 being the batch level alone and 1 the turn level alone."""
    worlds = {
        name: content["worlds"][name] for name in ("base", "noise 1", "trap") if name in content["worlds"]
    }
    figure, panels = plt.subplots(1, len(worlds), figsize=(9.5, 3.2), squeeze=False)
    for panel, (name, records) in zip(panels[0], worlds.items(), strict=True):
        rates = sorted({record["rate"] for record in records})
        for rate in [*rates, None]:
            points = []
            for label in labels_of(records):
                weight = {"batch": 0.0, "turn": 1.0}.get(label)
                if label.startswith("mapo") and len(label) == len("mapo 0.33"):
                    weight = float(label.split()[1])
                if weight is None:
                    continue
                if rate is None:
                    values = at_best_rate(records, label)[1]
                else:
                    record = next(r for r in records if (r["label"], r["rate"]) == (label, rate))
                    values = record["final"][selection_of(record) :]
                points.append((weight, *interval(values)))
            weights, means, lows, highs = np.array(sorted(points)).T
            if rate is None:
                panel.fill_between(weights, lows, highs, color="#1f77b4", alpha=0.25)
                panel.plot(weights, means, "o-", color="#1f77b4", markersize=4, label="best rate")
            else:
                panel.plot(weights, means, "--", color="gray", linewidth=0.7 + 0.5 * rates.index(rate))
        panel.axhline(at_best_rate(records, "grpo")[1].mean(), color="black", linestyle=":", label="GRPO")
        panel.set_title(name)
        panel.set_xlabel("turn_weight")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("return after training")
    panels[0][0].legend(fontsize=8)
    return figure


def lab_curves(content: dict[str, Any]) -> Figure:
    """Learning curves at each estimator's best rate."""
    worlds = {
        name: content["worlds"][name] for name in ("base", "noise 1", "trap") if name in content["worlds"]
    }
    figure, panels = plt.subplots(1, len(worlds), figsize=(9.5, 3.2), sharey=True, squeeze=False)
    for panel, (name, records) in zip(panels[0], worlds.items(), strict=True):
        for label in NAMES:
            if label not in labels_of(records):
                continue
            rate = at_best_rate(records, label)[0]
            record = next(r for r in records if (r["label"], r["rate"]) == (label, rate))
            mean = np.array(record["curve"])
            error = 1.96 * np.array(record["curve_deviation"]) / np.sqrt(len(record["final"]))
            steps = np.arange(len(mean))
            panel.fill_between(steps, mean - error, mean + error, color=COLOURS[label], alpha=0.2)
            panel.plot(steps, mean, color=COLOURS[label], label=NAMES[label])
        panel.set_title(name)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("return of the step's dialogues")
    panels[0][-1].legend(fontsize=7)
    return figure


def lab_discount(content: dict[str, Any]) -> Figure | None:
    """Return over the discount at the rate that all its settings have, if that study has results."""
    worlds = {name: content["worlds"][name] for name in ("base", "trap") if name in content["worlds"]}
    if not any(
        label.startswith("turn discount") for records in worlds.values() for label in labels_of(records)
    ):
        return None
    figure, panels = plt.subplots(1, len(worlds), figsize=(6.5, 3.0), squeeze=False)
    for panel, (name, records) in zip(panels[0], worlds.items(), strict=True):
        for label in ("mapo 0.33", "turn"):
            points = []
            for other in labels_of(records):
                if other == label or other.startswith(f"{label} discount "):
                    discount = 0.85 if other == label else float(other.split()[-1])
                    record = next(r for r in records if (r["label"], r["rate"]) == (other, DISCOUNT_RATE))
                    points.append((discount, *interval(record["final"])))
            discounts, means, lows, highs = np.array(sorted(points)).T
            panel.fill_between(discounts, lows, highs, color=COLOURS[label], alpha=0.2)
            panel.plot(discounts, means, "o-", color=COLOURS[label], markersize=4, label=NAMES[label])
        panel.set_title(name)
        panel.set_xlabel("discount")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("return after training")
    panels[0][0].legend(fontsize=8)
    return figure


def credit_worlds(content: dict[str, Any]) -> Figure:
    """Correlation of one advantage with the true effect, and of the advantages' mean."""
    results = content["results"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 0.34 * len(results) + 1.4), sharey=True)
    for panel, name in zip(panels, ("correlation", "systematic"), strict=True):
        for label in NAMES:
            for i, result in enumerate(results):
                mean, low, high = interval(result["estimators"][label]["all"][name])
                panel.plot([low, high], [-i, -i], color=COLOURS[label], linewidth=2, alpha=0.6)
                panel.plot(mean, -i, "o", color=COLOURS[label], markersize=5, label="" if i else NAMES[label])
        panel.grid(alpha=0.3)
        panel.set_xlim(-0.2, 1.0)
    panels[0].set_yticks(
        [-i for i in range(len(results))], [f"{result['world']}, {result['stage']}" for result in results]
    )
    panels[0].set_xlabel("correlation of one advantage with the effect")
    panels[1].set_xlabel("of the mean over re-draws: what no noise explains")
    panels[0].legend(fontsize=7, loc="best")
    return figure


def credit_positions(content: dict[str, Any]) -> Figure:
    """Correlation by position in the dialogue, early and late."""
    shown = [r for r in content["results"] if r["world"] in ("base", "trap")] or content["results"][:2]
    places = ("first third", "middle third", "last third")
    figure, panels = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 3.0), sharey=True, squeeze=False)
    for panel, result in zip(panels[0], shown, strict=True):
        for label in NAMES:
            values = [np.mean(result["estimators"][label][place]["correlation"]) for place in places]
            panel.plot(range(3), values, "o-", color=COLOURS[label], markersize=4, label=NAMES[label])
        panel.set_xticks(range(3), [place.split()[0] for place in places])
        panel.set_title(f"{result['world']}, {result['stage']}", fontsize=9)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("correlation with the true effect")
    panels[0][-1].legend(fontsize=7)
    return figure


def estimators(content: dict[str, Any]) -> Figure:
    """The language model: return and gradient norm by step with bands, and every seed's end."""
    figure, (curves, norms, ends) = plt.subplots(1, 3, figsize=(11, 3.4), width_ratios=(4, 4, 3))
    runs = {label: list(content["runs"][label].values()) for label in NAMES if label in content["runs"]}
    for place, (label, seeds) in enumerate(runs.items()):
        for panel, key in ((curves, "training_return"), (norms, "grad_norm")):
            values = np.array([smoothed(run[key]) for run in seeds])
            mean, error = values.mean(axis=0), 1.96 * values.std(axis=0, ddof=1) / np.sqrt(len(values))
            steps = np.arange(1, len(mean) + 1)
            panel.fill_between(steps, mean - error, mean + error, color=COLOURS[label], alpha=0.15)
            panel.plot(steps, mean, color=COLOURS[label], label=NAMES[label])
        last = [list(run["validation"].values())[-1]["return"] for run in seeds]
        mean, low, high = interval(last)
        ends.plot(last, [-place + 0.2] * len(last), "o", color=COLOURS[label], alpha=0.5, markersize=3)
        ends.plot([low, high], [-place] * 2, color=COLOURS[label], linewidth=2)
        ends.plot(mean, -place, "o", color=COLOURS[label], markersize=5)
    curves.set_ylabel("return of the step's dialogues")
    norms.set_ylabel("norm of the gradient")
    for panel in (curves, norms):
        panel.set_xlabel(f"step (mean of {WINDOW}, over the seeds)")
        panel.grid(alpha=0.3)
    curves.legend(fontsize=7, loc="upper left")
    ends.set_yticks([-place for place in range(len(runs))], [NAMES[label] for label in runs])
    ends.set_xlabel("validation return after training\n(dots: seeds; bars: 95 % interval of the mean)")
    ends.axvline(0, color="black", linewidth=0.8)
    ends.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    return figure


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Running mean over WINDOW values, of fewer at both ends."""
    ones = np.ones(WINDOW)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Figure | None]]] = {
    "lab_worlds": ("lab.json", lab_worlds),
    "lab_weight": ("lab.json", lab_weight),
    "lab_curves": ("lab.json", lab_curves),
    "lab_discount": ("lab.json", lab_discount),
    "credit_worlds": ("credit.json", credit_worlds),
    "credit_positions": ("credit.json", credit_positions),
    "estimators": ("estimators.json", estimators),
}
"""File name -> the results that it shows, and the function that draws it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws every figure whose results exist."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "experiments" / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "figures", "font.size": 9})
    for name, (file, draw) in FIGURES.items():
        if not (options.results / file).exists():
            print(f"{name}: no {options.results / file}")
            continue
        figure = draw(read_json(options.results / file))
        if figure is None:
            print(f"{name}: not in {options.results / file}")
            continue
        figure.savefig(options.output / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)


if __name__ == "__main__":
    main()
