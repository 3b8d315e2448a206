"""The curves over the steps: which metrics, in which groups, with which bands."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mapo_jax.reporting.charts import Chart, Series, tell
from mapo_jax.reporting.comparison import interval, running_band, running_mean
from mapo_jax.reporting.study import Study, returns_by_card, values_of

MANY_POINTS = 30  # from here on a running mean is drawn over the points

# Curves of every run: metric, title, form, what it says. Metrics that are not here come under "others".
CURVES = (
    (
        "Is it learning?",
        (
            ("return/mean", "Return of a dialogue", "number", "discounted, from the first turn"),
            ("reward/mean", "Reward of a turn", "number", "how much less the user lacks, in points"),
            ("epm_q", "EPM-Q", "number", "EMPA's score of the dialogues"),
            ("turns/mean", "Turns of a dialogue", "count", "more only where dialogues may end early"),
            ("outcome/success", "Successes", "share", "dialogues that reached equilibrium"),
            ("outcome/failure", "Failures", "share", "dialogues that collapsed or went back"),
        ),
    ),
    (
        "Is the update healthy?",
        (
            ("actor/entropy", "Entropy", "number", "nats per token; falls slowly, not to zero"),
            ("actor/approx_kl", "KL within a step", "number", "how far the update moved the policy"),
            ("actor/clip_fraction", "Clip fraction", "share", "tokens whose ratio was clipped"),
            ("actor/grad_norm", "Gradient norm", "number", "before clipping"),
            ("actor/pg_loss", "Surrogate loss", "number", "has no level of its own"),
            ("actor/lr", "Learning rate", "number", "of the step's last update"),
        ),
    ),
    (
        "Can the numbers be trusted?",
        (
            (
                "sampler/logprob_diff_mean",
                "Sampler against trainer",
                "number",
                "mean difference per token; rounding only",
            ),
            ("sampler/logprob_diff_max", "The same, largest", "number", "of any token of the step"),
            ("judge/failure_rate", "Turns without a score", "share", "the judge failed"),
            ("dialogues/left_out", "Dialogues left out", "share", "in no statistic and no loss"),
            ("judge/call_failure_rate", "Judge calls lost", "share", "live world: failed for good"),
            (
                "judge/repair_rate",
                "Judge answers asked for again",
                "share",
                "live world: the first was malformed",
            ),
            ("judge/spread", "Spread of the judge", "number", "points between samples of one reply"),
            ("response_length/mean", "Reply length", "number", "sampled tokens"),
            ("response_length/truncated", "Replies cut by the limit", "share", "by rollout.max_reply_tokens"),
        ),
    ),
    (
        "What does it cost?",
        (
            ("timing_s/step", "A step", "seconds", "the first one compiles"),
            ("timing_s/rollout", "Its rollout", "seconds", "sampling and the world"),
            ("timing_s/environment", "Of it, the world", "seconds", "user, judge and director"),
            ("timing_s/update", "Its update", "seconds", "gradients and optimizer"),
            ("timing_s/checkpoint", "Its checkpoint", "seconds", ""),
            (
                "perf/tokens_per_second",
                "Sampled tokens per second",
                "number",
                "of the rollout, world included",
            ),
            ("perf/mfu", "Model FLOP utilisation", "share", "of the devices' peak"),
            ("perf/compiled_programs", "Compiled programs", "count", "constant after the first steps"),
            ("judge/latency_p50", "A judge call, median", "seconds", "live world"),
            ("judge/latency_p95", "A judge call, slowest 5 %", "seconds", "live world"),
            ("environment/cost", "Price of the calls", "number", "live world: of user, judge and director"),
        ),
    ),
)
EXACT = ("actor/lr", "perf/compiled_programs")  # curves without noise, so without a band


def hero_chart(studies: Sequence[Study]) -> Chart:
    """Return over the steps: training's curve, and the evaluations with their intervals."""
    series = []
    for study in studies:
        name = study.run.name if len(studies) > 1 else "training, mean and middle 80 % of dialogues"
        if (curve := _curve(study, "return/mean", name)) is not None:
            series.append(curve)
        marks = _evaluation_marks(study, len(studies) > 1)
        if marks is not None:
            series.append(marks)
    levels = ()
    helper = studies[0].run.helper.get("return/mean")
    if isinstance(helper, (int, float)):
        levels = ((f"good scripted helper {tell(helper)}", float(helper)),)
    return Chart("hero", "Return of a dialogue", tuple(series), levels=levels, tall=True)


def _evaluation_marks(study: Study, many: bool) -> Series | None:
    run = study.run
    if run.validation:
        x, y, errors = [], [], []
        for batch, credits in zip(run.validation, study.validation_credits, strict=True):
            cards = returns_by_card(batch, credits)
            if cards:
                mean, low, high = interval([float(np.mean(values)) for values in cards.values()])
                x.append(batch.step)
                y.append(mean)
                errors.append((low, high))
    else:
        x, y = run.evaluated("return/mean")
        errors = []
    if not x:
        return None
    name = f"{run.name}, validation" if many else "validation, mean and 95 % interval over cards"
    return Series(name, x, y, study.colour if many else "after", "2 3", marks=True, errors=errors)


def curve_groups(studies: Sequence[Study]) -> list[tuple[str, list[Chart], bool]]:
    """Title, charts, and whether they are folded away: metrics that no group names are."""
    groups = [
        (title, [_metric_chart(studies, *metric) for metric in metrics], False) for title, metrics in CURVES
    ]
    named = {metric for _, metrics in CURVES for metric, *_ in metrics}
    rest = sorted({name for s in studies for row in s.run.steps for name in row} - named - {"step"})
    others = [
        _metric_chart(studies, name, name, "share" if _is_share(name) else "number", "") for name in rest
    ]
    groups.append(("Everything else that was logged", others, True))
    # Metrics may have any name; a key must survive being an attribute.
    numbers = itertools.count()
    return [
        (title, [replace(chart, key=f"curve-{next(numbers)}") for chart in group], folded)
        for title, group, folded in groups
    ]


def _is_share(name: str) -> bool:
    return name.startswith(("kind/", "naming/", "outcome/")) and not name.endswith("_rate")


def _metric_chart(studies: Sequence[Study], name: str, title: str, form: str, meaning: str) -> Chart:
    many = len(studies) > 1
    series = []
    for study in studies:
        if (curve := _curve(study, name, study.run.name if many else "training")) is not None:
            series.append(curve)
        x, y = study.run.evaluated(name)
        if x and name in ("return/mean", "reward/mean", "epm_q", "outcome/success", "outcome/failure"):
            label = f"{study.run.name}, validation" if many else "validation"
            series.append(Series(label, x, y, study.colour if many else "after", "2 3", marks=True))
    return Chart(
        name,
        title,
        tuple(series),
        meaning,
        form="number" if form == "count" else form,
        zero=form in ("share", "seconds", "count"),
    )


def _curve(study: Study, metric: str, name: str) -> Series | None:
    """A metric over the steps. The band is the middle 80 % of dialogues where they were read, else one
    deviation of the values around."""
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
    """10th to 90th percentile over the dialogues of each step; gaps where a step was not read."""
    if metric not in ("return/mean", "reward/mean", "epm_q", "turns/mean"):
        return []
    value = values_of(metric)
    known = {}
    for batch, credits in zip(study.run.training, study.credits, strict=True):
        values = [v for d, c in zip(batch.dialogues, credits, strict=True) if (v := value(d, c)) is not None]
        if values:
            known[batch.step] = tuple(np.percentile(values, [10, 90]).tolist())
    return [known.get(step, (np.nan, np.nan)) for step in x] if known else []
