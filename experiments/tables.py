"""What the raw results of the laboratory and the credit study say, as Markdown tables.

python experiments/tables.py lab FILE | credit FILE
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from experiments.records import holm, interval, paired, read_json

Records = Sequence[dict[str, Any]]  # of the settings of one world

CORE = ("mapo 0.33", "mapo 0.50", "turn", "batch", "grpo", "reinforce_plus_plus")
PAIRS = (("mapo 0.33", "grpo"), ("turn", "grpo"), ("mapo 0.33", "turn"), ("mapo 0.50", "turn"))


def labels_of(records: Records) -> list[str]:
    """Labels in order of appearance."""
    return list(dict.fromkeys(record["label"] for record in records))


def at_best_rate(records: Records, label: str, field: str = "final") -> tuple[float, np.ndarray]:
    """The learning rate that is best by the first seeds, and the values of the other seeds at it."""
    mine = [record for record in records if record["label"] == label]
    selection = selection_of(mine[0])
    best = max(mine, key=lambda record: np.mean(record["final"][:selection]))
    return best["rate"], np.asarray(best[field])[selection:]


def selection_of(record: dict[str, Any]) -> int:
    """How many seeds choose the learning rate: a sixth."""
    return len(record["final"]) // 6


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(mean: float, low: float, high: float) -> str:
    """A mean with its interval."""
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def lab_world(records: Records, reference: str = "grpo") -> str:
    """All estimators of one world: final return, difference to the reference, learning curve's mean."""
    labels = labels_of(records)
    rows, tests = [], {}
    base = at_best_rate(records, reference)[1] if reference in labels else None
    for label in labels:
        if base is not None and label != reference:
            tests[label] = paired(at_best_rate(records, label)[1], base)
    corrected = holm({label: test["p"] for label, test in tests.items()})
    for label in labels:
        rate, final = at_best_rate(records, label)
        area = at_best_rate(records, label, "area")[1]
        harm = at_best_rate(records, label, "harm")[1]
        difference, p = "", ""
        if label in tests:
            test = tests[label]
            difference, p = spread(test["mean"], test["low"], test["high"]), f"{corrected[label]:.4f}"
        rows.append(
            [
                label,
                f"{rate}",
                spread(*interval(final)),
                difference,
                p,
                f"{area.mean():.2f}",
                f"{harm.mean():.2f}",
            ]
        )
    header = ("estimator", "rate", "return", f"minus {reference}", "p (Holm)", "during training", "harm")
    return table(header, rows)


def lab_overview(results: dict[str, Records], labels: Sequence[str] = CORE) -> str:
    """Final return at the best learning rate: worlds by estimators; * marks a difference to the best one."""
    rows = []
    for name, records in results.items():
        present = [label for label in labels if label in labels_of(records)]
        if not present:
            continue
        values = {label: at_best_rate(records, label)[1] for label in present}
        best = max(present, key=lambda label: values[label].mean())
        tests = {label: paired(values[label], values[best])["p"] for label in present if label != best}
        corrected = holm(tests)
        cells = []
        for label in labels:
            if label not in values:
                cells.append("")
                continue
            text = f"{values[label].mean():.2f}"
            cells.append(f"**{text}**" if label == best else text + ("*" if corrected[label] < 0.05 else ""))
        rows.append([name, *cells])
    return table(("world", *labels), rows)


def lab_rates(records: Records, labels: Sequence[str]) -> str:
    """Mean final return at every learning rate."""
    rates = sorted({record["rate"] for record in records})
    rows = []
    for label in labels:
        mine = {record["rate"]: np.mean(record["final"]) for record in records if record["label"] == label}
        rows.append([label, *(f"{mine[rate]:.2f}" if rate in mine else "" for rate in rates)])
    return table(("estimator", *(f"rate {rate}" for rate in rates)), rows)


def lab_pairs(results: dict[str, Records], pairs: Sequence[tuple[str, str]] = PAIRS) -> str:
    """Differences of two estimators in every world, each at its best rate; * if Holm's p < 0.05."""
    columns = []
    for one, other in pairs:
        tests = {
            name: paired(at_best_rate(records, one)[1], at_best_rate(records, other)[1])
            for name, records in results.items()
            if {one, other} <= set(labels_of(records))
        }
        corrected = holm({name: test["p"] for name, test in tests.items()})
        columns.append(
            {
                name: spread(test["mean"], test["low"], test["high"])
                + ("*" if corrected[name] < 0.05 else "")
                for name, test in tests.items()
            }
        )
    names = [name for name in results if any(name in column for column in columns)]
    header = ("world", *(f"{one} minus {other}" for one, other in pairs))
    return table(header, [[name, *(column.get(name, "") for column in columns)] for name in names])


def print_lab(results: dict[str, Records]) -> None:
    """All tables of the laboratory."""
    print(lab_overview(results), lab_pairs(results), sep="\n\n", end="\n\n")
    for name, records in results.items():
        if records:
            print(f"{name}\n\n{lab_world(records)}\n\n{lab_rates(records, labels_of(records))}\n")


def credit_table(result: dict[str, Any], position: str = "all") -> str:
    """One world and stage: every figure of every estimator."""
    rows = []
    names = ("correlation", "systematic", "bias", "variance", "gradient")
    for label, positions in result["estimators"].items():
        figures = positions[position]
        cells = [spread(*interval(figures["correlation"]))]
        cells += [f"{np.mean(figures[name]):.2f}" if name in figures else "" for name in names[1:]]
        rows.append([label, *cells])
    return table(("estimator", *names), rows)


def credit_overview(results: Records, figure: str = "correlation", position: str = "all") -> str:
    """One figure: worlds and stages by estimators."""
    labels = list(results[0]["estimators"])
    rows = [
        [
            f"{result['world']}, {result['stage']}",
            *(f"{np.mean(result['estimators'][label][position][figure]):.2f}" for label in labels),
        ]
        for result in results
    ]
    return table(("world", *labels), rows)


def print_credit(results: Records) -> None:
    """All tables of the credit study."""
    for figure in ("correlation", "systematic", "bias", "variance", "gradient"):
        print(f"{figure}\n\n{credit_overview(results, figure)}\n")
    for position in ("first third", "last third"):
        print(f"correlation, {position}\n\n{credit_overview(results, 'correlation', position)}\n")
    for result in results:
        if "trap" in result:
            print(result["world"], result["stage"], result["trap"])


def main() -> None:
    """Prints the tables of a file of results."""
    kind, file = sys.argv[1:]
    content = read_json(Path(file))
    if kind == "lab":
        print_lab(content["worlds"])
    else:
        print_credit(content["results"])


if __name__ == "__main__":
    main()
