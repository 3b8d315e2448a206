"""The curves over the steps: which metrics, in which groups, with which bands."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import yaml

from mapo_jax.reporting.charts import Chart, Ends, Series, asset, format_value
from mapo_jax.reporting.comparison import interval, running_band, running_mean
from mapo_jax.reporting.study import Study, values_by_card, values_of

MANY_POINTS = 30  # a series with at least so many gets a running mean
SPREAD = ("return/mean", "reward/mean", "epm_q", "turns/mean")  # band over the dialogues of each step
EVALUATED = ("return/mean", "reward/mean", "epm_q", "outcome/success", "outcome/failure")
EXACT = ("actor/lr", "perf/compiled_programs")  # no noise, so no band
NO_CURVE = {"step", "timing_s/unix"}  # the step itself, and the time at which it ended
CURVES: dict[str, list[list[str]]] = yaml.safe_load(asset("curves.yaml"))
"""Group -> metric, title, form and meaning of each curve."""


def hero_chart(studies: Sequence[Study]) -> Chart:
    """Return over the steps: the training curve, and the evaluations with their intervals."""
    many = len(studies) > 1
    series = []
    for study in studies:
        name = study.run.name if many else "training, mean and middle 80 % of dialogues"
        series += [_curve(study, "return/mean", name), _evaluation_marks(study, many)]
    helper = studies[0].run.helper.get("return/mean")
    known = isinstance(helper, (int, float))
    levels = ((f"good scripted helper {format_value(helper)}", float(helper)),) if known else ()
    return Chart("hero", "Return of a dialogue", tuple(filter(None, series)), levels=levels, tall=True)


def _evaluation_marks(study: Study, many: bool) -> Series | None:
    x, y = study.run.evaluated("return/mean")
    errors = []
    if study.validation:
        cards = [(batch[0].step, values_by_card(*batch, "return/mean")) for batch in study.validation]
        cards = [(step, returns) for step, returns in cards if returns]
        x = [step for step, _ in cards]
        means = [interval([float(np.mean(values)) for values in returns.values()]) for _, returns in cards]
        y, errors = [middle for middle, _, _ in means], [(low, high) for _, low, high in means]
    label = "validation, mean and 95 % interval over cards"
    return _marks(study, many, label, x, y, errors) if x else None


def _marks(
    study: Study, many: bool, label: str, x: Sequence[int], y: Sequence[float], errors: Ends = ()
) -> Series:
    name, colour = (f"{study.run.name}, validation", study.colour) if many else (label, "after")
    return Series(name, x, y, colour, "2 3", marks=True, errors=errors)


def curve_groups(studies: Sequence[Study]) -> list[tuple[str, list[Chart], bool]]:
    """Title, charts, and whether the group is collapsed: that of metrics outside CURVES is."""
    named = {metric for metrics in CURVES.values() for metric, *_ in metrics}
    rest = sorted({name for s in studies for row in s.run.steps for name in row} - named - NO_CURVE)
    others = [(name, name, "share" if _is_share(name) else "number", "") for name in rest]
    numbers = itertools.count()  # a metric may have any name, but a key must be valid as an attribute
    return [
        (
            title,
            [_metric_chart(studies, f"curve-{next(numbers)}", *metric) for metric in metrics],
            title not in CURVES,
        )
        for title, metrics in (*CURVES.items(), ("Everything else that was logged", others))
    ]


def _is_share(name: str) -> bool:
    return name.startswith(("kind/", "naming/", "outcome/")) and not name.endswith("_rate")


def _metric_chart(
    studies: Sequence[Study], key: str, metric: str, title: str, form: str, meaning: str
) -> Chart:
    many = len(studies) > 1
    series = []
    for study in studies:
        series.append(_curve(study, metric, study.run.name if many else "training"))
        x, y = study.run.evaluated(metric)
        if x and metric in EVALUATED:
            series.append(_marks(study, many, "validation", x, y))
    return Chart(
        key,
        title,
        tuple(filter(None, series)),
        meaning,
        form="number" if form == "count" else form,
        zero=form in ("share", "seconds", "count"),
    )


def _curve(study: Study, metric: str, name: str) -> Series | None:
    """A metric over the steps. The band is the middle 80 % of dialogues where they were read, else one
    standard deviation of the neighbouring steps."""
    x, y = study.run.series(metric)
    if not x:
        return None
    window = 2 * (len(x) // 20) + 1
    smooth = running_mean(y, window) if len(x) >= MANY_POINTS else ()
    band = _spread(study, metric, x)
    if not band and len(x) >= 5 and metric not in EXACT:
        band = running_band(y, max(5, window))
    return Series(name, x, y, study.colour, study.dash, band=band, smooth=smooth)


def _spread(study: Study, metric: str, x: Sequence[int]) -> list[tuple[float, float]]:
    """10th to 90th percentile over the dialogues of each step; NaN for steps that were not read."""
    if metric not in SPREAD:
        return []
    value, known = values_of(metric), {}
    for batch, credits in study.training:
        values = [v for d, c in zip(batch.dialogues, credits, strict=True) if (v := value(d, c)) is not None]
        if values:
            known[batch.step] = tuple(np.percentile(values, [10, 90]).tolist())
    return [known.get(step, (np.nan, np.nan)) for step in x] if known else []
