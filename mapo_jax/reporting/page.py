"""The page: everything a reader sees, drawn into one HTML file without any outside resource."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from mapo_jax.reporting import charts
from mapo_jax.reporting.behaviour import Behaviour, behaviour, changes, typical_pair
from mapo_jax.reporting.charts import Chart, Path, Plane, Series, draw, draw_plane, mean_path, tell
from mapo_jax.reporting.checks import ALARM, LOOK, UNKNOWN, Check, check_run
from mapo_jax.reporting.comparison import (
    Difference,
    by_card,
    compare,
    interval,
    running_band,
    running_mean,
)
from mapo_jax.reporting.credit import Credit, credit_batch
from mapo_jax.reporting.diversity import Diversity, analyse
from mapo_jax.reporting.folder import Batch, Dialogue, Run, setting
from mapo_jax.reporting.payload import PAYLOAD_BYTES, Group, pack

MOST_RUNS = 8  # more lines cannot be told apart
ROLES = ("user", "judge", "director")
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
OWN = ("run.directory", "run.name")  # settings that differ between any two runs
EXACT = ("actor/lr", "perf/compiled_programs")  # curves without noise, so without a band
TILES = (
    ("return/mean", "Return of a dialogue", "number"),
    ("reward/mean", "Reward of a turn", "number"),
    ("epm_q", "EPM-Q", "number"),
    ("distance/end", "What the user lacks at the end", "number"),
    ("outcome/success", "Successes", "share"),
)
LOWER_IS_BETTER = ("distance/end",)


@dataclass(frozen=True)
class Study:
    """A run and what follows from it."""

    number: int
    run: Run
    credits: tuple[tuple[Credit, ...], ...]  # of run.training
    validation_credits: tuple[tuple[Credit, ...], ...]
    diversity: tuple[Diversity, ...]

    @classmethod
    def of(cls, number: int, run: Run) -> Study:
        """Computes the credit of every dialogue and the diversity of every step."""
        shape = {
            "scenarios": setting(run.config, "rollout.scenarios"),
            "rollouts": setting(run.config, "rollout.rollouts"),
            "max_turns": setting(run.config, "rollout.max_turns"),
        }
        shape = {name: size for name, size in shape.items() if isinstance(size, int) and 0 < size < 10_000}
        share = setting(run.config, "environment.max_failed_share")
        if isinstance(share, (int, float)):
            shape["max_failed_share"] = share
        held_cards = max((len({d.place[0] for d in b.dialogues}) for b in run.validation), default=1)
        shape["scenarios"] = max(shape.get("scenarios", 1), held_cards)  # one shape, one compilation
        trained = tuple(tuple(credit_batch(b, run.algorithm, **shape)) for b in run.training)
        held = tuple(tuple(credit_batch(b, run.algorithm, **shape)) for b in run.validation)
        return cls(number, run, trained, held, tuple(analyse(run.training, trained)))

    @property
    def colour(self) -> str:
        """Of its curves."""
        return f"series-{self.number + 1}"

    @property
    def dash(self) -> str:
        """Of its curves, so that colour is not the only difference."""
        return charts.DASHES[self.number % len(charts.DASHES)]

    @property
    def first(self) -> tuple[Batch, Sequence[Credit]] | None:
        """The evaluation before training, if it was held."""
        if len(self.run.validation) > 1:
            return self.run.validation[0], self.validation_credits[0]
        return None

    @property
    def last(self) -> tuple[Batch, Sequence[Credit]] | None:
        """The latest evaluation."""
        if self.run.validation:
            return self.run.validation[-1], self.validation_credits[-1]
        return None

    @cached_property
    def changes(self) -> dict[str, Difference]:
        """Validation before and after, by metric of TILES."""
        if self.first is None or self.last is None:
            return {}
        found = {}
        for name in ("distance/start", *(name for name, *_ in TILES)):
            value = _values(name)
            sides = [
                by_card(batch, lambda i, d, c=credits, value=value: value(d, c[i]))
                for batch, credits in (self.first, self.last)
            ]
            if (difference := compare(*sides)) is not None:
                found[name] = difference
        return found

    @cached_property
    def behaviour(self) -> Behaviour | None:
        """What it learnt to do."""
        return behaviour(self.run, self.first, self.last) if self.first and self.last else None

    @cached_property
    def checks(self) -> list[Check]:
        """What is suspicious."""
        return check_run(self.run, self.diversity, self.changes.get("return/mean"))

    @property
    def groups(self) -> list[Group]:
        """Every batch with its credit."""
        sides = [
            *zip(self.run.training, self.credits, strict=True),
            *zip(self.run.validation, self.validation_credits, strict=True),
        ]
        return [Group(self.number, batch, credits) for batch, credits in sides]

    @cached_property
    def verdict(self) -> tuple[str, str, str]:
        """Word, sentence, and state (good, bad, unclear) of whether it got better."""
        change = self.changes.get("return/mean")
        if change is None:
            return "Not known yet", "Fewer than two evaluations are there to compare.", "unclear"
        what = f"went from {tell(change.before)} to {tell(change.after)}"
        margin = f" (95 % interval {signed(change.low)} to {signed(change.high)})" if change.cards > 1 else ""
        on = f"{change.cards} {'card' if change.cards == 1 else 'cards'} that training never saw"
        sentence = f"On {on}, the return of a dialogue {what}: {signed(change.change)}{margin}."
        word, state = {
            "up": ("It got better", "good"),
            "down": ("It got worse", "bad"),
            "unclear": ("No clear change", "unclear"),
        }[change.verdict]
        return word, f"{sentence} {self._net_help()}".strip(), state

    @property
    def suspicion(self) -> tuple[str, str]:
        """Whether anything is suspicious, in a sentence, and the state of the worst check."""
        if not self.checks:
            return "", UNKNOWN
        worst = self.checks[0].state
        seen = [check.name.lower() for check in self.checks if check.state in (ALARM, LOOK)]
        blind = [check.name.lower() for check in self.checks if check.state == UNKNOWN]
        unknown = f" Could not be checked: {', '.join(blind)}." if blind else ""
        if seen:
            return f"To look at: {', '.join(seen)}.{unknown}", worst
        if len(blind) == len(self.checks):
            return "Nothing was logged that a check could look at.", worst
        fine = len(self.checks) - len(blind)
        return f"Nothing looks suspicious in {fine} {'check' if fine == 1 else 'checks'}.{unknown}", worst

    def _net_help(self) -> str:
        """Whether users end better off than they began: a better return may still be less harm."""
        start, end = self.changes.get("distance/start"), self.changes.get("distance/end")
        if start is None or end is None:
            return ""
        was, now = end.before - start.before, end.after - start.after
        lack = f"{tell(start.after)} points at the start and {tell(end.after)} at the end"
        if now <= 0:
            return f"Users lack {lack}: they are helped."
        less = ", though by less than before" if now < was else ""
        return f"Users lack {lack}: they still end worse off than they began{less}."


def _values(name: str) -> Callable[[Dialogue, Credit], float | None]:
    """One dialogue's part in a metric."""

    def mean_reward(dialogue: Dialogue, credit: Credit) -> float | None:
        scored = [reward for reward in credit.rewards if reward is not None]
        return float(np.mean(scored)) if dialogue.counts and scored else None

    return {
        "return/mean": lambda d, c: c.first_return if d.counts else None,
        "reward/mean": mean_reward,
        "epm_q": lambda d, c: d.epm_q,
        "outcome/success": lambda d, c: float(d.outcome == "success") if d.counts else None,
        "turns/mean": lambda d, c: float(len(d.turns)) if d.counts else None,
        "distance/start": lambda d, c: d.distances[0] if d.counts else None,
        "distance/end": lambda d, c: d.distances[-1] if d.counts else None,
    }[name]


def _returns_by_card(batch: Batch, credits: Sequence[Credit]) -> dict[str, list[float]]:
    return by_card(batch, lambda i, d: credits[i].first_return if d.counts else None)


def render(
    runs: Sequence[Run], *, limit: int = PAYLOAD_BYTES, progress: Callable[[str], None] | None = None
) -> str:
    """The whole page of one or more runs, as HTML.

    Args:
      runs: what `folder.read_run` gave, at most MOST_RUNS.
      limit: most bytes of dialogues.
      progress: called with what is being done.
    """
    told = progress or (lambda name: None)
    studies = []
    for number, run in enumerate(runs):
        told(f"credit and phrases of {run.name}")
        studies.append(Study.of(number, run))
    packed = pack(runs, [g for study in studies for g in study.groups], limit=limit, progress=progress)
    told("drawing")
    curves = [(title, [c for c in g if c.series], folded) for title, g, folded in curve_groups(studies)]
    views = [view(study, len(studies) > 1) for study in studies]
    hero = hero_chart(studies)
    drawn = [hero, *(c for _, group, _ in curves for c in group), *(c for v in views for c in v["charts"])]
    script = _asset("script.js")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"tell": tell, "signed": signed, "percent": lambda x: tell(x, "share")}
    environment.globals |= {"draw": draw}
    html = environment.from_string(_asset("page.html")).render(
        title=" and ".join(run.name for run in runs),
        style=Markup(_asset("style.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        many=len(studies) > 1,
        studies=views,
        hero=hero,
        curves=[group for group in curves if group[1]],
        against=(against := against_first(studies)),
        compared=comparison_sentences(against),
        differing=settings_that_differ(studies) if len(studies) > 1 else [],
        packed=packed,
        data=_inline({"charts": {c.key: c.to_json() for c in drawn}, "steps": _steps_json(studies)}),
    )
    # A lone half of a surrogate pair is no text that a file could hold.
    return html.encode("utf-8", "replace").decode("utf-8")


def view(study: Study, many: bool) -> dict[str, Any]:
    """What the template shows of one run."""
    run = study.run
    state = state_space(study)
    diversity = diversity_charts(study)
    return {
        "study": study,
        "run": run,
        "facts": facts(run),
        "recipe": recipe(run),
        "verdict": study.verdict,
        "suspicion": study.suspicion,
        "tiles": tiles(study),
        "checks": study.checks,
        "behaviour": study.behaviour,
        "example": example(study),
        "extremes": extremes(study),
        "space": state,
        "diversity": study.diversity[-1] if study.diversity else None,
        "diversity_charts": diversity,
        "charts": [*diversity, *([state["distance"]] if state else [])],
        "config": yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
        "written": datetime.fromtimestamp(run.written, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
        if run.written
        else None,
    }


# --- The summary. ---


def recipe(run: Run) -> str:
    """What was trained, in one sentence."""
    get = lambda key: setting(run.config, key)  # noqa: E731
    if not run.config:
        return "The settings of this run are unknown."
    base = get("model.path")
    model = "a small warm-started model" if base is None else str(base).rstrip("/").split("/")[-1]
    players = [str(name) for role in ROLES if (name := get(f"environment.{role}.model"))]
    played = f" ({', '.join(dict.fromkeys(players))})" if players else ""
    family = {
        "scripted": "a scripted user, judge and director",
        "live": f"a user, judge and director played by language models{played}",
    }.get(str(get("environment.family")), "a user, judge and director")
    estimator = str(get("algorithm.estimator"))
    weight = get("algorithm.turn_weight")
    if estimator == "mapo" and isinstance(weight, (int, float)):
        estimator = f"MAPO with turn weight {weight:.3g}"
    each = f"{get('rollout.scenarios')} scenarios \u00d7 {get('rollout.rollouts')} rollouts"
    return (
        f"{model[:1].upper()}{model[1:]} talked with {family} and learnt by {estimator}: "
        f"{run.done} of {run.planned if run.planned is not None else '?'} steps of {each}, "
        f"up to {get('rollout.max_turns')} turns each."
    )


def facts(run: Run) -> list[tuple[str, str]]:
    """The run in a few words each."""
    get = lambda key: setting(run.config, key)  # noqa: E731
    seconds = sum(run.series("timing_s/step")[1])
    shape = run.shape
    found = [
        ("steps", f"{run.done} of {run.planned if run.planned is not None else '?'}"),
        ("seed", get("training.seed")),
        ("reward", f"{get('algorithm.reward')} distance" if get("algorithm.reward") else None),
        ("discount", f"{get('algorithm.discount')} per turn" if get("algorithm.discount") else None),
        (
            "model",
            f"{shape.get('num_hidden_layers')} layers, width {shape.get('hidden_size')}"
            if "hidden_size" in shape
            else None,
        ),
        ("time in steps", _duration(seconds) if seconds else None),
    ]
    return [(name, str(value)) for name, value in found if value is not None]


def tiles(study: Study) -> list[dict[str, Any]]:
    """Before, after, and the difference with its interval."""
    found = []
    for name, title, form in TILES:
        change = study.changes.get(name)
        if change is None or (name == "outcome/success" and change.before == change.after == 0):
            continue
        ceiling = study.run.helper.get(name)
        way = None
        if isinstance(ceiling, (int, float)) and ceiling > change.before and name != "outcome/success":
            way = change.change / (ceiling - change.before)
        note = None
        if name == "distance/end":
            note = f"{tell(study.changes['distance/start'].before)} at the start"
        found.append(
            {
                "title": title,
                "form": form,
                "change": change,
                "ceiling": ceiling,
                "way": way,
                "note": note,
                "turned": name in LOWER_IS_BETTER,
            }
        )
    return found


def against_first(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """Each run's last evaluation against the first run's, card by card."""
    if len(studies) < 2:
        return []
    rows = []
    for study in studies:
        row: dict[str, Any] = {"study": study, "change": study.changes.get("return/mean"), "against": None}
        row["step"] = study.last[0].step if study.last else None
        if study is not studies[0] and study.last and studies[0].last:
            sides = [_returns_by_card(*side) for side in (studies[0].last, study.last)]
            row["against"] = compare(*sides)
        rows.append(row)
    return rows


def settings_that_differ(studies: Sequence[Study]) -> list[tuple[str, list[str]]]:
    """Dotted key and each run's value, of the settings that are not the same in all runs."""
    flat = [_flat(study.run.config) for study in studies]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, [settings.get(key, "\u2013") for settings in flat]) for key in keys if key not in OWN]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(settings: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(settings, Mapping):
        return {prefix: "empty" if settings is None else str(settings)}
    found: dict[str, str] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def comparison_sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Per other run: where it ends against the first."""
    said = []
    for row in rows[1:]:
        name, first, against = row["study"].run.name, rows[0]["study"].run.name, row["against"]
        if against is None:
            said.append(f"{name} and {first} have no evaluation on the same cards to compare.")
            continue
        ends = {
            "up": f"{name} ends better than {first}",
            "down": f"{name} ends worse than {first}",
            "unclear": f"{name} and {first} end alike within the noise",
        }[against.verdict]
        margin = (
            f", 95 % interval {signed(against.low)} to {signed(against.high)}" if against.cards > 1 else ""
        )
        cards = f"{against.cards} {'card' if against.cards == 1 else 'cards'}"
        said.append(f"{ends}: {signed(against.change)} in the return of a dialogue{margin}, over {cards}.")
        if row["step"] != rows[0]["step"]:
            said.append(f"Their last evaluations were after {row['step']} and {rows[0]['step']} steps.")
    return said


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
            cards = _returns_by_card(batch, credits)
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


# --- Curves. ---


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
    value = _values(metric)
    known = {}
    for batch, credits in zip(study.run.training, study.credits, strict=True):
        values = [v for d, c in zip(batch.dialogues, credits, strict=True) if (v := value(d, c)) is not None]
        if values:
            known[batch.step] = tuple(np.percentile(values, [10, 90]).tolist())
    return [known.get(step, (np.nan, np.nan)) for step in x] if known else []


# --- The state space. ---


def state_space(study: Study) -> dict[str, Any] | None:
    """The ways through (C, A, P) before and after training."""
    sides = [side for side in (study.first, study.last) if side is not None]
    if not sides:
        return None
    colours = ["before", "after"][-len(sides) :]
    paths: list[Path] = []
    means: list[Path] = []
    distance = []
    for colour, (batch, credits) in zip(colours, sides, strict=True):
        group = Group(study.number, batch, credits)
        counted = [d for d in batch.dialogues if d.turns]
        if not counted:
            continue
        for dialogue in counted:
            s, r = dialogue.place
            paths.append(
                Path(
                    dialogue.positions,
                    colour,
                    f"#d={group.key}.{s}.{r}",
                    f"{colour} training: {dialogue.scenario}, D {dialogue.distances[0]:.1f} → "
                    f"{dialogue.distances[-1]:.1f}",
                )
            )
        mean = mean_path([d.positions for d in counted])
        means.append(Path(mean, colour, "", f"mean of {len(counted)} dialogues {colour} training"))
        longest = max(len(d.turns) for d in counted)
        held = np.asarray([[*d.distances, *[d.distances[-1]] * (longest - len(d.turns))] for d in counted])
        low, high = np.percentile(held, [10, 90], axis=0)
        distance.append(
            Series(
                f"{colour} training",
                list(range(longest + 1)),
                held.mean(0).tolist(),
                colour,
                "6 3" if colour == "before" else "",
                band=list(zip(low.tolist(), high.tolist(), strict=True)),
            )
        )
    if not paths:
        return None
    low = min(min(p) for path in paths for p in path.positions)
    names = ("C cognitive", "A affective", "P proactive")
    planes = [
        draw_plane(Plane(a, b, (names[a], names[b]), tuple(paths)), low - 1.5, means)
        for a, b in ((0, 1), (2, 1), (0, 2))
    ]
    return {
        "planes": planes,
        "both": len(sides) == 2,
        "ways": _inline([{"p": p.positions, "c": p.colour, "h": p.href, "t": p.title} for p in paths]),
        "steps": [batch.step for batch, _ in sides],
        "distance": Chart(
            f"distance-{study.number}",
            "What the user still lacks",
            tuple(distance),
            "mean distance D over the turns, with the middle 80 % of dialogues",
            x_name="turn",
            zero=True,
        ),
    }


# --- Diversity. ---


def diversity_charts(study: Study) -> list[Chart]:
    """Distinct-n and the share of repeated openings over the steps."""
    entries = study.diversity
    if not entries:
        return []
    steps = [entry.step for entry in entries]
    value = lambda x: np.nan if x is None else x  # noqa: E731
    return [
        Chart(
            f"distinct-{study.number}",
            "Distinct n-grams",
            tuple(
                Series(
                    f"distinct-{n + 1}",
                    steps,
                    [value(entry.distinct[n]) for entry in entries],
                    f"series-{n + 1}",
                    charts.DASHES[n],
                )
                for n in range(3)
            ),
            "of all runs of 1, 2 and 3 words, the share that is different; equally many words in every step",
            form="share",
            zero=True,
        ),
        Chart(
            f"repeats-{study.number}",
            "Repeated openings",
            (
                Series(
                    "replies with the commonest opening",
                    steps,
                    [entry.openings[0].share if entry.openings else 0.0 for entry in entries],
                    "series-1",
                ),
                Series(
                    "replies that open like an earlier one of their dialogue",
                    steps,
                    [entry.own_repeats for entry in entries],
                    "series-2",
                    charts.DASHES[1],
                ),
            ),
            "an opening is a reply's first four words",
            form="share",
            zero=True,
        ),
        Chart(
            f"own-cost-{study.number}",
            "What repeating oneself costs",
            (
                Series(
                    "reward of such a turn against the others",
                    steps,
                    [value(entry.own_cost) for entry in entries],
                    "series-2",
                ),
            ),
            "mean reward of replies that open like an earlier one of their dialogue, against the others",
            zero=True,
        ),
    ]


def _steps_json(studies: Sequence[Study]) -> list[list[dict[str, Any]]]:
    """Openings and phrases of every step, for the slider."""

    def repeats(entries: Any) -> list[list[Any]]:
        return [[e.text, e.count, round(e.share, 4), _rounded(e.reward), _rounded(e.cost)] for e in entries]

    return [
        [
            {
                "step": entry.step,
                "replies": entry.replies,
                "openings": repeats(entry.openings),
                "phrases": repeats(entry.phrases),
            }
            for entry in study.diversity
        ]
        for study in studies
    ]


# --- Dialogues on the page itself. ---


def example(study: Study) -> dict[str, Any] | None:
    """The dialogue whose return changed by the median, before and after."""
    if not (study.first and study.last):
        return None
    pair = typical_pair(study.first, study.last)
    if pair is None:
        return None
    i, j, standing = pair
    one, other = study.first[0].dialogues[i], study.last[0].dialogues[j]
    sides = []
    for label, (batch, credits), place in (("before", study.first, i), ("after", study.last, j)):
        dialogue, credit = batch.dialogues[place], credits[place]
        sides.append(
            {
                "label": label,
                "step": batch.step,
                "dialogue": dialogue,
                "credit": credit,
                "turns": list(zip(dialogue.turns, credit.rewards, strict=True)),
            }
        )
    return {"card": other.card, "standing": standing, "sides": sides, "href": _pair_link(study, one, other)}


def extremes(study: Study) -> list[tuple[str, str]]:
    """Links to the pairs that improved most and least."""
    if not (study.first and study.last):
        return []
    pairs = changes(study.first, study.last)
    if len(pairs) < 2:
        return []
    found = []
    for label, (change, i, j) in (("most improved", pairs[-1]), ("least", pairs[0])):
        link = _pair_link(study, study.first[0].dialogues[i], study.last[0].dialogues[j])
        found.append((f"{label}, {signed(change)}", link))
    return found


def _pair_link(study: Study, before: Dialogue, after: Dialogue) -> str:
    key = lambda d: f"{study.number}.v{d.step}.{d.place[0]}.{d.place[1]}"  # noqa: E731
    return f"#d={key(after)}&with={key(before)}"


# --- Small things. ---


def _asset(name: str) -> str:
    return (resources.files("mapo_jax.reporting") / "assets" / name).read_text(encoding="utf-8")


def _inline(content: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def signed(value: float | None) -> str:
    if value is None:
        return "\u2013"
    text = f"{value:+.2f}" if abs(value) < 10 else f"{value:+.1f}"
    return "0" if float(text) == 0 else text.replace("-", "\u2212")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
