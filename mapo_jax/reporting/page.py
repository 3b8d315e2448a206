"""The page: everything a reader sees, drawn into one HTML file without any outside resource."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from mapo_jax.reporting import charts
from mapo_jax.reporting.behaviour import changes, typical_pair
from mapo_jax.reporting.charts import (
    Chart,
    Plane,
    Series,
    TracePath,
    draw,
    draw_plane,
    mean_path,
    signed,
    tell,
)
from mapo_jax.reporting.curves import curve_groups, hero_chart
from mapo_jax.reporting.folder import SavedDialogue, SavedRun
from mapo_jax.reporting.payload import PAYLOAD_BYTES, Group, pack
from mapo_jax.reporting.study import Study
from mapo_jax.reporting.summary import (
    against_first,
    comparison_sentences,
    facts,
    recipe,
    settings_that_differ,
    tiles,
)

MOST_RUNS = 8  # more lines cannot be told apart


def render(
    runs: Sequence[SavedRun], *, limit: int = PAYLOAD_BYTES, progress: Callable[[str], None] | None = None
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


# --- The state space. ---


def state_space(study: Study) -> dict[str, Any] | None:
    """The ways through (C, A, P) before and after training."""
    sides = [side for side in (study.first, study.last) if side is not None]
    if not sides:
        return None
    colours = ["before", "after"][-len(sides) :]
    paths: list[TracePath] = []
    means: list[TracePath] = []
    distance = []
    for colour, (batch, credits) in zip(colours, sides, strict=True):
        group = Group(study.number, batch, credits)
        counted = [d for d in batch.dialogues if d.turns]
        if not counted:
            continue
        for dialogue in counted:
            s, r = dialogue.place
            paths.append(
                TracePath(
                    dialogue.positions,
                    colour,
                    f"#d={group.key}.{s}.{r}",
                    f"{colour} training: {dialogue.scenario}, D {dialogue.distances[0]:.1f} → "
                    f"{dialogue.distances[-1]:.1f}",
                )
            )
        mean = mean_path([d.positions for d in counted])
        means.append(TracePath(mean, colour, "", f"mean of {len(counted)} dialogues {colour} training"))
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


def _pair_link(study: Study, before: SavedDialogue, after: SavedDialogue) -> str:
    key = lambda d: f"{study.number}.v{d.step}.{d.place[0]}.{d.place[1]}"  # noqa: E731
    return f"#d={key(after)}&with={key(before)}"


# --- Small things. ---


def _asset(name: str) -> str:
    return (resources.files("mapo_jax.reporting") / "assets" / name).read_text(encoding="utf-8")


def _inline(content: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
