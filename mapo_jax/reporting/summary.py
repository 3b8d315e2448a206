"""The summary of one run, and of several compared, in sentences and a few figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mapo_jax.config import GONE
from mapo_jax.reporting.charts import format_value, signed
from mapo_jax.reporting.comparison import compare
from mapo_jax.reporting.credit import CreditedBatch
from mapo_jax.reporting.folder import SavedRun, counted
from mapo_jax.reporting.study import Study, values_by_card
from mapo_jax.running.display import duration
from mapo_jax.settings import flat, value_at

ROLES = ("user", "judge", "director")
NOT_COMPARED = ("run.directory", "run.name", *GONE)  # settings in which any two runs differ, or did
TILES = (
    ("return/mean", "Return of a dialogue", "number"),
    ("reward/mean", "Reward of a turn", "number"),
    ("epm_q", "EPM-Q", "number"),
    ("distance/end", "What the user lacks at the end", "number"),
    ("outcome/success", "Successes", "share"),
)
LOWER_IS_BETTER = ("distance/end",)


def recipe(run: SavedRun) -> str:
    """What was trained, in one sentence."""
    if not run.config:
        return "The settings of this run are unknown."
    get = partial(value_at, run.config)
    base = get("model.path")
    model = "a small warm-started model" if base is None else str(base).rstrip("/").split("/")[-1]
    own_judge = next(
        filter(None, map(get, ("environment.judge.model", "environment.judge.implementation"))), None
    )
    scripted = "a scripted user, judge and director"
    if own_judge:
        scripted = f"a scripted user and director, judged by {own_judge},"
    players = [str(name) for role in ROLES if (name := get(f"environment.{role}.model"))]
    played = f" ({', '.join(dict.fromkeys(players))})" if players else ""
    family = {
        "scripted": scripted,
        "live": f"a user, judge and director played by language models{played}",
    }.get(str(get("environment.family")), "a user, judge and director")
    estimator, weight = str(get("algorithm.estimator")), get("algorithm.turn_weight")
    if estimator == "mapo" and isinstance(weight, (int, float)):
        estimator = f"MAPO with turn weight {weight:.3g}"
    return (
        f"{model[:1].upper()}{model[1:]} talked with {family} and learnt by {estimator}: "
        f"{_steps(run)} steps of {get('rollout.scenarios')} scenarios \u00d7 "
        f"{get('rollout.rollouts')} rollouts, up to {get('rollout.max_turns')} turns each."
    )


def key_figures(run: SavedRun) -> list[tuple[str, str]]:
    """Name and value of the run's main figures; unknown ones are left out."""
    reward, discount = value_at(run.config, "algorithm.reward"), value_at(run.config, "algorithm.discount")
    layers, width = run.shape.get("num_hidden_layers"), run.shape.get("hidden_size")
    seconds = sum(run.series("timing_s/step")[1])
    rows = [
        ("steps", _steps(run)),
        ("seed", value_at(run.config, "training.seed")),
        ("reward", f"{reward} distance" if reward else None),
        ("discount", f"{discount} per turn" if discount else None),
        ("model", f"{layers} layers, width {width}" if "hidden_size" in run.shape else None),
        ("time in steps", duration(seconds) if seconds else None),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _steps(run: SavedRun) -> str:
    return f"{run.done} of {'?' if run.planned is None else run.planned}"


def origin(run: SavedRun) -> str:
    """Hardware, versions, commit and command of the run's last start; empty if they are unknown."""
    if not run.starts:
        return ""
    last = run.starts[-1]
    versions = ", ".join(f"{name} {number}" for name, number in (last.get("versions") or {}).items())
    starts = f"{len(run.starts)} starts, the last" if len(run.starts) > 1 else "Started"
    parts = [f"{starts} with {last.get('command', '?')}", f"on {last.get('devices', '?')}"]
    parts += [
        f"{last.get('machine', '')}",
        versions,
        f"commit {last['commit']}" if last.get("commit") else "",
    ]
    return "; ".join(filter(None, parts))


def tiles(study: Study) -> list[dict[str, Any]]:
    """Before, after, and the difference with its interval."""
    rows = []
    for name, title, form in TILES:
        change, helper, share = study.changes.get(name), study.run.helper.get(name), None
        if change is None or (name == "outcome/success" and change.before == change.after == 0):
            continue
        if isinstance(helper, (int, float)) and helper > change.before and name != "outcome/success":
            share = change.change / (helper - change.before)
        start = study.changes.get("distance/start") if name == "distance/end" else None
        note = f"{format_value(start.before)} at the start" if start else None
        if form == "share":
            note = " → ".join(_counted(side, name) for side in (study.first, study.last))
        row = {"title": title, "form": form, "change": change, "helper": helper, "progress": share}
        rows.append(row | {"note": note, "turned": name in LOWER_IS_BETTER})
    return rows


def _counted(side: CreditedBatch, metric: str) -> str:
    """How many dialogues of an evaluation have a metric that is 0 or 1: "3 of 32"."""
    values = [value for card in values_by_card(*side, metric).values() for value in card]
    return f"{sum(values):.0f} of {len(values)}"


def against_first(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """Each run's last evaluation against the first run's, card by card; empty for a single run."""
    rows = []
    for study in studies if len(studies) > 1 else ():
        against = None
        if study is not studies[0] and study.last and studies[0].last:
            sides = (values_by_card(*side, "return/mean") for side in (studies[0].last, study.last))
            against = compare(*sides)
        step = study.last[0].step if study.last else None
        change = study.changes.get("return/mean")
        rows.append({"study": study, "change": change, "against": against, "step": step})
    return rows


def settings_that_differ(studies: Sequence[Study]) -> list[tuple[str, list[str]]]:
    """Dotted key and each run's value, of the settings that are not the same in all runs."""
    runs = [
        {key: "empty" if value is None else str(value) for key, value in flat(study.run.config).items()}
        for study in studies
    ]
    keys = dict.fromkeys(key for settings in runs for key in settings if key not in NOT_COMPARED)
    rows = [(key, [settings.get(key, "\u2013") for settings in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def comparison_sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each other run: its last evaluation against the first run's."""
    sentences = []
    for row in rows[1:]:
        name, first, against = row["study"].run.name, rows[0]["study"].run.name, row["against"]
        if against is None:
            sentences.append(f"{name} and {first} have no evaluation on the same cards to compare.")
            continue
        verdict = {
            "up": f"{name} ends better than {first}",
            "down": f"{name} ends worse than {first}",
            "unclear": f"{name} and {first} end alike within the noise",
        }[against.verdict]
        ends = f", 95 % interval {signed(against.low)} to {signed(against.high)}" if against.cards > 1 else ""
        cards = counted(against.cards, "card")
        sentences.append(
            f"{verdict}: {signed(against.change)} in the return of a dialogue{ends}, over {cards}."
        )
        if row["step"] != rows[0]["step"]:
            sentences.append(f"Their last evaluations were after {row['step']} and {rows[0]['step']} steps.")
    return sentences
