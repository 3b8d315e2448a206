"""What the scripted judge's readings say about a set of dialogues, beside the return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.environment.scenario import FEELINGS, UNSTATED, load_scenarios

NAMED = ("situation", "feeling", "unstated", "strength", "step", "value")


def readings(states: Iterable[DialogueState]) -> list[Mapping[str, Any]]:
    """The readings of all scored turns."""
    return [
        turn.judgement.reading
        for state in states
        for turn in state.turns
        if turn.judgement is not None and turn.judgement.reading is not None
    ]


def reading_metrics(states: Sequence[DialogueState]) -> dict[str, float]:
    """Shares of kinds, accuracy of naming, and how far the story went.

    Returns:
      `kind/NAME`: share of turns whose reply is of this kind (its gravest or deepest act), kinds that occur;
      `kind/most`: the largest of them;
      `naming/NAME`: of the names of this sort given, the share that was right (absent if none was given);
      `naming/NAME_chance`: the same for a phrase drawn at random from the world, see `chance`;
      `naming/NAME_rate`: names of this sort per turn;
      `stage/mean`: mean over dialogues of the highest story stage reached (0..3).
    """
    found = readings(states)
    if not found:
        return {}
    kinds = Counter(reading["kind"] for reading in found)
    metrics = {f"kind/{kind}": count / len(found) for kind, count in sorted(kinds.items())}
    metrics["kind/most"] = max(kinds.values()) / len(found)
    given: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for reading in found:
        for name in reading["named"]:
            given[name["what"]] += 1
            right[name["what"]] += name["right"]
    for what in NAMED:
        metrics[f"naming/{what}_rate"] = given[what] / len(found)
        if given[what]:
            metrics[f"naming/{what}"] = right[what] / given[what]
            metrics[f"naming/{what}_chance"] = chance()[what]
    reached = [[r["stage"] for r in readings([state])] for state in states]
    metrics["stage/mean"] = sum(max(stages, default=0) for stages in reached) / len(reached)
    return metrics


@lru_cache(maxsize=1)
def chance() -> dict[str, float]:
    """How often a phrase of the right sort, drawn at random, would be right.

    Feelings: one of their list. Situations: the two at hand among the eight of the user's own card, which is
    generous to the guess. Strengths, steps and values: those of the user's card among the embedded cards'.
    """
    cards = load_scenarios()
    return {
        "situation": 2 / 8,
        "feeling": 1 / len(FEELINGS),
        "unstated": 1 / len(UNSTATED),
        "strength": 1 / len(cards),
        "step": 1 / len(cards),
        "value": 1 / len({card.value for card in cards}),
    }
