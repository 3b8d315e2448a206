"""What a person wants to know first, in words and a few figures; of one run, and of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mapo_jax.config import GONE
from mapo_jax.reporting.charts import signed, tell
from mapo_jax.reporting.comparison import compare
from mapo_jax.reporting.folder import SavedRun, setting
from mapo_jax.reporting.study import Study, returns_by_card

ROLES = ("user", "judge", "director")
OWN = ("run.directory", "run.name", *GONE)  # settings that differ between any two runs, or did
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


def facts(run: SavedRun) -> list[tuple[str, str]]:
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
            sides = [returns_by_card(*side) for side in (studies[0].last, study.last)]
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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
