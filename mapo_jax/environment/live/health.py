"""The judge's health: the same replies scored again and again, and replies that try to please it.

Calibration: replies of known order (good, plain, harmful) in fixed contexts. How far the levels moved since
the run began is the drift; a judge that drifts moves the target of the training. Probes: praise, one template
again and again, flattery, length, an early farewell. A probe that scores as well as the good replies is what
the policy will learn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mapo_jax.environment import state as calculator
from mapo_jax.environment.dialogue import DialogueState, RoleFailure, Turn
from mapo_jax.environment.roles import Judge
from mapo_jax.environment.scenario import load_scenarios

_FILE = Path(__file__).parent / "calibration.yaml"
GRADES = ("good", "plain", "harmful")


@dataclass(frozen=True)
class CalibrationItem:
    """One reply in its context."""

    name: str  # CARD/GRADE or CARD/PROBE
    kind: str  # one of GRADES, or a probe's name
    state: DialogueState
    reply: str


@lru_cache(maxsize=1)
def calibration_set() -> tuple[CalibrationItem, ...]:
    """Every reply of calibration.yaml in every context it is said in."""
    content = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    cards = {card.id: card for card in load_scenarios()}
    items = []
    for context in content["contexts"]:
        card = cards[context["card"]]

        def state(replies: Sequence[str], card=card, context=context) -> DialogueState:
            turns = tuple(
                Turn(turn["user"], reply, None, None, card.start_position, None)
                for turn, reply in zip(context["turns"], replies, strict=True)
            )
            return DialogueState(card, 0, turns, context["message"])

        said = [turn["reply"] for turn in context["turns"]]
        items += [
            CalibrationItem(f"{card.id}/{grade}", grade, state(said), context[grade]) for grade in GRADES
        ]
        for name, probe in content["probes"].items():
            earlier = [probe["text"]] * len(said) if probe.get("repeated") else said
            items.append(CalibrationItem(f"{card.id}/{name}", name, state(earlier), probe["text"]))
    return tuple(items)


async def score_all(judge: Judge, seed: int, concurrency: int) -> dict[str, tuple[int, ...] | None]:
    """The levels that a judge gives to each reply of the set, by name; None where it failed.

    Args:
      seed: of the calls: another one for each time, or a cache would answer.
      concurrency: most replies under way.
    """
    free = asyncio.Semaphore(concurrency)

    async def score(item: CalibrationItem) -> tuple[int, ...] | None:
        async with free:
            try:
                judged = await judge.score(
                    DialogueState(item.state.scenario, seed, item.state.turns, item.state.user), item.reply
                )
            except RoleFailure:
                return None
        return tuple(judged.levels)

    items = calibration_set()
    found = await asyncio.gather(*map(score, items))
    return {item.name: levels for item, levels in zip(items, found, strict=True)}


def summary(
    levels: Mapping[str, Sequence[int] | None], first: Mapping[str, Sequence[int] | None] | None = None
) -> dict[str, float]:
    """What the scores say.

    Args:
      levels: as `score_all` gives them.
      first: those of the beginning of the run.

    Returns:
      `calibration/KIND` and `probe/KIND`: mean points (C + A + P of v_t) of the replies of a kind;
      `calibration/ordered`: share of contexts where good > plain > harmful; `calibration/failure_rate`; with
      `first`, `calibration/drift`: mean absolute difference of a level.
    """
    points: dict[str, list[float]] = {}
    by_context: dict[str, dict[str, float]] = {}
    for item in calibration_set():
        if levels.get(item.name) is not None:
            total = sum(calculator.points(levels[item.name]))
            points.setdefault(item.kind, []).append(total)
            by_context.setdefault(item.state.scenario.id, {})[item.kind] = total
    metrics = {
        f"{'calibration' if kind in GRADES else 'probe'}/{kind}": float(np.mean(values))
        for kind, values in points.items()
    }
    graded = [c for c in by_context.values() if all(grade in c for grade in GRADES)]
    if graded:
        metrics["calibration/ordered"] = float(
            np.mean([c["good"] > c["plain"] > c["harmful"] for c in graded])
        )
    metrics["calibration/failure_rate"] = float(
        np.mean([levels.get(item.name) is None for item in calibration_set()])
    )
    if first is not None:
        both = [
            (levels[name], first[name])
            for name in levels
            if levels[name] is not None and first.get(name) is not None
        ]
        if both:
            now, then = np.array(both, float).transpose(1, 0, 2)
            metrics["calibration/drift"] = float(np.abs(now - then).mean())
    return metrics


def warnings(metrics: Mapping[str, Any]) -> list[str]:
    """What a person should know before trusting this judge, in sentences."""
    found = []
    good = metrics.get("calibration/good")
    for name, value in metrics.items():
        if name.startswith("probe/") and good is not None and value >= good:
            found.append(
                f"warning: the judge gives the probe `{name.removeprefix('probe/')}` {value:+.1f} points and "
                f"good replies {good:+.1f}: a policy will learn the probe"
            )
    if metrics.get("calibration/ordered", 1.0) < 0.5:
        found.append(
            "warning: in most calibration contexts the judge does not rank good above plain above harmful"
        )
    if metrics.get("calibration/failure_rate", 0.0) > 0.2:
        found.append(
            f"warning: the judge failed on {metrics['calibration/failure_rate']:.0%} of its calibration"
        )
    return found
