"""Metrics of the scripted judge's readings: kinds of replies, accuracy of naming, progress of the story."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mapo_jax.environment.card_schema import FEELINGS, UNSTATED
from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.scripted.grammar import KINDS

UNPARSED = ("incoherent", "echo", "other")  # kinds of replies that fit no construction
NAMED = ("situation", "feeling", "unstated", "strength", "step", "value")


def readings(states: Iterable[DialogueState]) -> list[Mapping[str, Any]]:
    """The readings of all scored turns."""
    return [turn.reading for state in states for turn in state.turns if turn.reading is not None]


def reading_metrics(states: Sequence[DialogueState]) -> dict[str, float]:
    """Shares of kinds, accuracy of naming, and how far the story went.

    Returns:
      `kind/NAME`: share of turns whose reply is of this kind; 0 for a kind that does not occur;
      `kind/most`: the largest of them;
      `naming/NAME`: share of the names of this sort that were right (absent if there are none);
      `naming/NAME_chance`: the same for a phrase drawn at random, see `chance`;
      `naming/NAME_rate`: names of this sort per turn;
      `stage/mean`: mean over dialogues of the highest story stage reached (0..3).
    """
    turns = readings(states)
    if not turns:
        return {}
    kinds = Counter(reading["kind"] for reading in turns)
    names = sorted({*KINDS, *UNPARSED, *kinds})
    metrics = {f"kind/{kind}": kinds[kind] / len(turns) for kind in names}
    metrics["kind/most"] = max(kinds.values()) / len(turns)
    names = [name for reading in turns for name in reading["named"]]
    given = Counter(name["what"] for name in names)
    right = Counter(name["what"] for name in names if name["right"])
    for what in NAMED:
        metrics[f"naming/{what}_rate"] = given[what] / len(turns)
        if given[what]:
            metrics[f"naming/{what}"] = right[what] / given[what]
            metrics[f"naming/{what}_chance"] = chance()[what]
    reached = [[r["stage"] for r in readings([state])] for state in states]
    metrics["stage/mean"] = sum(max(stages, default=0) for stages in reached) / len(reached)
    return metrics


@lru_cache(maxsize=1)
def chance() -> dict[str, float]:
    """Probability that a random phrase of the right sort is right.

    Feelings: one of their list. Situations: the current two of the card's eight, an upper bound. Strengths,
    steps and values: the card's among those of all embedded cards.
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
