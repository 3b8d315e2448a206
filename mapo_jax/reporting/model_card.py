"""The model card of an exported policy: README.md from a template, and the curve of its return."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from mapo_jax.config import Config, to_yaml, updated, value_of
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.errors import UserError
from mapo_jax.files import read_object
from mapo_jax.hub import hub_id
from mapo_jax.model.qwen import QwenConfig, parameter_count
from mapo_jax.running.metrics import METRICS_FILE, read_rows

CURVE_FILE = "curve.png"
_PATHS = ("run.directory", "run.compilation_cache", "model.path")
_PATHS += ("environment.scenarios", "warmstart.data", "warmstart.cache")


def model_card(
    run: Path,
    config: Config,
    model: QwenConfig,
    step: int,
    dtype: str,
    *,
    curve: bool = False,
    adapters: bool = False,
) -> str:
    """README.md of the exported folder: what it is, how it was made, its scores and its limits.

    Args:
      curve: whether CURVE_FILE lies beside it.
      adapters: whether the folder holds adapters alone.
    """
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    template = (resources.files("mapo_jax.reporting") / "assets" / "model_card.md").read_text("utf-8")
    first, last = _evaluations(run / METRICS_FILE, step)
    return environment.from_string(template).render(
        name=run.name,
        step=step,
        config=config,
        yaml=_public_yaml(config),
        start=config.model.path and _public(config.model.path),
        model=model,
        parameters=parameter_count(replace(model, lora=None)),
        dtype=dtype,
        cards=_split_sizes(config),
        first_step=first.get("step"),
        last_step=last.get("step"),
        scores=_score_rows(first, last),
        benchmarks=_benchmarks(run, step),
        curve=CURVE_FILE if curve else "",
        adapters=adapters,
    )


def _public(path: str) -> str:
    """An id of the Hub as it is, or the last component of a path."""
    return path if hub_id(path) else Path(path).name


def _public_yaml(config: Config) -> str:
    """The run's configuration; of each path only the last component, since the card is published."""
    for dotted in _PATHS:
        if path := value_of(config, dotted):
            config = updated(config, {dotted: _public(path)})
    return to_yaml(config).rstrip()


def _evaluations(file: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first evaluation of a run, and its last one up to `step`; `step` among their entries."""
    rows = []
    for row in read_rows(file):
        scores = {name[11:]: value for name, value in row.items() if name.startswith("evaluation/")}
        if scores and row["step"] <= step:
            rows.append({"step": row["step"], **scores})
    return (rows[0], rows[-1]) if rows else ({}, {})


_SCORES = (
    ("reward per turn (incremental distance)", "reward/mean", "{:+.2f}"),
    ("discounted return of a dialogue", "return/mean", "{:+.2f}"),
    ("EPM-Q", "epm_q", "{:.1f}"),
    ("situation named right", "naming/situation", "{:.0%}"),
    ("feeling named right", "naming/feeling", "{:.0%}"),
    ("largest share of one kind of reply", "kind/most", "{:.0%}"),
)


def _score_rows(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, first and last score of everything that was measured."""
    rows = []
    for label, name, form in _SCORES:
        cells = ["" if row.get(name) is None else form.format(row[name]) for row in (first, last)]
        if any(cells):
            rows.append((label, *cells))
    return rows


def _split_sizes(config: Config) -> Mapping[str, int] | None:
    """Cards of each split; None if the cards are not there any more."""
    try:
        return Counter(card.split for card in load_scenarios(config.environment.scenarios))
    except UserError:
        return None


def _benchmarks(run: Path, step: int) -> list[tuple[str, str]]:
    """Title and result of each benchmark that `mapo_jax.evaluate` ran on this checkpoint."""
    results = []
    for name, title, line in _BENCHMARKS:
        file = run / "evaluations" / f"{name}_step_{step:06d}" / "scores.json"
        if (scores := read_object(file)) is None:
            continue
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # not as the benchmark writes them
            results.append((title, line(scores)))
    return results


def _empa_line(scores: Mapping[str, Any]) -> str:
    (result,) = scores.values()
    return f"EPM-Q {result['epm_q']:.1f}, {result['passed']} of {result['dialogues']} passed"


def _eqbench_line(scores: Mapping[str, Any]) -> str:
    value = "no parseable answer" if scores["score"] is None else f"{scores['score']:.2f}"
    return f"{value} ({scores['parseable']} of {scores['questions']} answers parseable)"


def _emobench_line(scores: Mapping[str, Any]) -> str:
    tasks = [f"{task} {100 * scores[task]['accuracy']:.1f} %" for task in ("EA", "EU") if task in scores]
    return f"{', '.join(tasks)} ({scores['unparseable']} of {scores['answers']} answers unparseable)"


_BENCHMARKS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("empa", "EMPA with this project's cards and simulated user and judge", _empa_line),
    ("emobench", "EmoBench, accuracy", _emobench_line),
    ("eqbench", "EQ-Bench v2", _eqbench_line),
)


def draw_curve(file: Path, step: int) -> bytes | None:
    """The mean return of a step's dialogues over the steps up to `step`, as PNG; None with fewer than two.

    Args:
      file: the run's metrics.
    """
    rows = read_rows(file)
    training, validation = (
        [(row["step"], row[name]) for row in rows if row["step"] <= step and row.get(name) is not None]
        for name in ("return/mean", "evaluation/return/mean")
    )
    if max(len(training), len(validation)) < 2:
        return None
    from matplotlib.figure import Figure  # the object, not pyplot: no display, no state

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    if training:
        axes.plot(*zip(*training, strict=True), color="#8ab", label="training dialogues")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#a31515", label="validation cards")
    axes.set(xlabel="step", ylabel="return of a dialogue")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    return image.getvalue()
