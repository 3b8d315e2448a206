"""The page: everything drawn into one HTML file without external resources."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from mapo_jax.reporting import charts, summary
from mapo_jax.reporting.behaviour import changes, typical_pair
from mapo_jax.reporting.curves import curve_groups, hero_chart
from mapo_jax.reporting.dialogues import SavedDialogue, extended
from mapo_jax.reporting.diversity import Diversity, Repeat
from mapo_jax.reporting.folder import Progress, SavedRun, no_progress
from mapo_jax.reporting.payload import PAYLOAD_BYTES, pack, rounded
from mapo_jax.reporting.study import Study

MOST_RUNS = 8  # more lines cannot be told apart


def render(runs: Sequence[SavedRun], *, limit: int = PAYLOAD_BYTES, progress: Progress = no_progress) -> str:
    """The HTML page of one or more runs.

    Args:
      runs: from `folder.read_run`, at most MOST_RUNS.
      limit: most bytes of dialogues.
      progress: called before each piece of work.
    """
    studies = []
    for number, run in enumerate(runs):
        progress(f"credit and phrases of {run.name}")
        studies.append(Study.of(number, run))
    packed = pack(runs, [g for study in studies for g in study.groups], limit=limit, progress=progress)
    progress("drawing")
    groups = [(title, [c for c in group if c.series], fold) for title, group, fold in curve_groups(studies)]
    curves = [group for group in groups if group[1]]
    views = [view(study, deepest(studies)) for study in studies]
    if len({len(v["charts"]) for v in views}) == 1:  # else a run lacks dialogues
        columns = map(charts.on_one_scale, zip(*(v["charts"] for v in views), strict=True))
        for v, row in zip(views, zip(*columns, strict=True), strict=False):
            v["charts"] = list(row)
    hero = hero_chart(studies)
    drawn = [hero, *(c for _, group, _ in curves for c in group), *(c for v in views for c in v["charts"])]
    script = charts.asset("script.js")
    html = charts.TEMPLATES.get_template("page.html").render(
        title=" and ".join(run.name for run in runs),
        style=Markup(charts.asset("style.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        many=len(studies) > 1,
        studies=views,
        hero=hero,
        curves=curves,
        against=(against := summary.against_first(studies)),
        compared=summary.comparison_sentences(against),
        differing=summary.settings_that_differ(studies),
        packed=packed,
        data=_inline({"charts": {c.key: c.to_json() for c in drawn}, "steps": _steps_json(studies)}),
    )
    # A file cannot hold a lone surrogate.
    return html.encode("utf-8", "replace").decode("utf-8")


def deepest(studies: Sequence[Study]) -> float:
    """The lowest coordinate of any validation dialogue: all state spaces have one scale."""
    sides = [side for study in studies for side in (study.first, study.last) if side]
    positions = [p for side in sides for d in side[0].dialogues if d.turns for p in d.state.positions]
    return min((min(position) for position in positions), default=0.0) - 1.5


def view(study: Study, low: float) -> dict[str, Any]:
    """What the template shows of one run; `low` is the end of the state space's axes."""
    run = study.run
    space = state_space(study, low)
    diversity = diversity_charts(study)
    return {
        "study": study,
        "key_figures": summary.key_figures(run),
        "recipe": summary.recipe(run),
        "origin": summary.origin(run),
        "tiles": summary.tiles(study),
        "example": example(study),
        "extremes": extremes(study),
        "space": space,
        "diversity": study.diversity[-1] if study.diversity else None,
        "charts": [*diversity, *([space["distance"]] if space else [])],
        "config": yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
        "written": datetime.fromtimestamp(run.written, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
        if run.written
        else None,
    }


def state_space(study: Study, low: float) -> dict[str, Any] | None:
    """The trajectories through (C, A, P) before and after training; None without dialogues."""
    paths: list[charts.TracePath] = []
    means: list[charts.TracePath] = []
    distances: list[charts.Series] = []
    sides = [(colour, side[0]) for colour, side in (("before", study.first), ("after", study.last)) if side]
    for colour, batch in sides:
        dialogues = [d for d in batch.dialogues if d.turns]
        if not dialogues:
            continue
        for d in dialogues:
            title = f"{colour} training: {d.card}, D {d.distances[0]:.1f} → {d.distances[-1]:.1f}"
            paths.append(charts.TracePath(d.state.positions, colour, f"#d={_key(study, d)}", title))
        mean = charts.mean_path([d.state.positions for d in dialogues])
        title = f"mean of {len(dialogues)} dialogues {colour} training"
        means.append(charts.TracePath(mean, colour, "", title))
        distances.append(_distance_series(dialogues, colour))
    if not paths:
        return None
    names = ("C cognitive", "A affective", "P proactive")
    return {
        "planes": [
            charts.draw_plane((across, up), (names[across], names[up]), low, paths, means)
            for across, up in ((0, 1), (2, 1), (0, 2))
        ],
        "both": len(sides) == 2,
        "ways": _inline([{"p": p.positions, "c": p.colour, "h": p.href, "t": p.title} for p in paths]),
        "steps": [batch.step for _, batch in sides],
        "distance": charts.Chart(
            f"distance-{study.number}",
            "What the user still lacks",
            tuple(distances),
            "mean distance D over the turns, with the middle 80 % of dialogues",
            x_name="turn",
            zero=True,
        ),
    }


def _distance_series(dialogues: Sequence[SavedDialogue], colour: str) -> charts.Series:
    length = max(len(d.distances) for d in dialogues)
    distances = np.asarray([extended(d.distances, length) for d in dialogues])
    return charts.Series(
        f"{colour} training",
        list(range(length)),
        distances.mean(0).tolist(),
        colour,
        "6 3" if colour == "before" else "",
        band=list(map(tuple, np.percentile(distances, [10, 90], axis=0).T.tolist())),
    )


def diversity_charts(study: Study) -> list[charts.Chart]:
    """Distinct n-grams, repeated openings and their effect on the reward, over the steps."""
    entries, number = study.diversity, study.number
    if not entries:
        return []

    def series(name: str, values: Sequence[float | None], colour: int, dash: int = 0) -> charts.Series:
        y = [np.nan if value is None else value for value in values]
        steps = [entry.step for entry in entries]
        return charts.Series(name, steps, y, f"series-{colour}", charts.DASHES[dash])

    distinct = [series(f"distinct-{n + 1}", [e.distinct[n] for e in entries], n + 1, n) for n in range(3)]
    shares = [entry.openings[0].share if entry.openings else 0.0 for entry in entries]
    own = [entry.own_repeats for entry in entries]
    share = partial(charts.Chart, form="share", zero=True)
    return [
        share(
            f"distinct-{number}",
            "Distinct n-grams",
            tuple(distinct),
            "of all runs of 1, 2 and 3 words, the share that is different; equally many words in every step",
        ),
        share(
            f"repeats-{number}",
            "Repeated openings",
            (
                series("replies with the commonest opening", shares, 1),
                series("replies that open like an earlier one of their dialogue", own, 2, 1),
            ),
            "an opening is a reply's first four words",
        ),
        charts.Chart(
            f"own-cost-{number}",
            "What repeating oneself costs",
            (series("reward of such a turn against the others", [e.own_cost for e in entries], 2),),
            "mean reward of replies that open like an earlier one of their dialogue, against the others",
            zero=True,
        ),
    ]


def _steps_json(studies: Sequence[Study]) -> list[list[dict[str, Any]]]:
    """Openings and phrases of every step, for the slider."""

    def repeats(entries: Sequence[Repeat]) -> list[list[Any]]:
        return [
            [e.text, e.count, round(e.share, 4), rounded(e.reward, 3), rounded(e.cost, 3)] for e in entries
        ]

    def step(entry: Diversity) -> dict[str, Any]:
        phrases = {"openings": repeats(entry.openings), "phrases": repeats(entry.phrases)}
        return {"step": entry.step, "replies": entry.replies, **phrases}

    return [list(map(step, study.diversity)) for study in studies]


def example(study: Study) -> dict[str, Any] | None:
    """The dialogue with the median change of return, before and after."""
    pair = typical_pair(study.first, study.last) if study.first and study.last else None
    if pair is None:
        return None
    *places, standing = pair
    sides = []
    for label, side, place in zip(("before", "after"), (study.first, study.last), places, strict=True):
        dialogue, credit = side[0].dialogues[place], side[1][place]
        turns = list(zip(dialogue.turns, credit.rewards, strict=True))
        sides.append({"label": label, "dialogue": dialogue, "credit": credit, "turns": turns})
    one, other = (side["dialogue"] for side in sides)
    link = _pair_link(study, one, other)
    return {"card": other.state.scenario, "standing": standing, "sides": sides, "href": link}


def extremes(study: Study) -> list[tuple[str, str]]:
    """Label and link of the pairs that improved most and least."""
    pairs = changes(study.first, study.last) if study.first and study.last else []
    if len(pairs) < 2:
        return []
    first, last = study.first[0].dialogues, study.last[0].dialogues
    return [
        (f"{label}, {charts.signed(change)}", _pair_link(study, first[i], last[j]))
        for label, (change, i, j) in (("most improved", pairs[-1]), ("least", pairs[0]))
    ]


def _pair_link(study: Study, before: SavedDialogue, after: SavedDialogue) -> str:
    return f"#d={_key(study, after)}&with={_key(study, before)}"


def _key(study: Study, dialogue: SavedDialogue) -> str:
    """Names a validation dialogue in links; see `payload.Group.key`."""
    return f"{study.number}.v{dialogue.step}.{dialogue.place[0]}.{dialogue.place[1]}"


def _inline(content: Any) -> Markup:
    """JSON for a script element, escaped so that nothing ends the element or begins a comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
