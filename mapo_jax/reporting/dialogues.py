"""Saved dialogues: what the report needs of each, from the rows of a run folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mapo_jax.algorithm.rewards import distance
from mapo_jax.environment.dialogue import DialogueState, Turn
from mapo_jax.rollout.collect import Dialogue
from mapo_jax.rollout.rows import Row
from mapo_jax.scores.empa import score_case

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class TokenRow:
    """The tokens of a dialogue, or of one of its turns (history=per_turn)."""

    ids: np.ndarray
    sampled: np.ndarray  # the loss mask, apart from unscored turns
    turn: np.ndarray  # index of the turn whose reply the token belongs to; -1: none
    logprob: np.ndarray


@dataclass(frozen=True)
class SavedDialogue:
    """One dialogue. `place` is (scenario, rollout) in its batch."""

    step: int
    place: tuple[int, int]
    state: DialogueState
    rows: tuple[TokenRow, ...]

    @property
    def card(self) -> str:
        """The card's id."""
        return self.state.scenario.id

    @property
    def outcome(self) -> str:
        """How it ended."""
        return self.state.outcome or "unfinished"

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Its turns."""
        return self.state.turns

    @cached_property
    def distances(self) -> list[float]:
        """The distance D, at the start and after each turn."""
        return distance(self.state.positions).tolist()

    @cached_property
    def epm_q(self) -> float | None:
        """EMPA's score; None if there is nothing to score."""
        if not self.state.counts or self.distances[0] == 0:
            return None
        levels = [turn.levels for turn in self.turns]
        return score_case(self.state.scenario.start_position, levels)["epm_q"]


@dataclass(frozen=True)
class SavedBatch:
    """The dialogues of one file: a training step's, or an evaluation's."""

    step: int
    validation: bool
    dialogues: tuple[SavedDialogue, ...]
    broken: int = 0  # rows that could not be read


def extended(path: Sequence[Any], length: int) -> list[Any]:
    """A path of `length` entries: an ended dialogue stays where it ended."""
    return [*path, *[path[-1]] * (length - len(path))]


def parse_dialogue(row: Any, step: int) -> SavedDialogue:
    """A dialogue from its saved row.

    Raises:
      UserError, ValueError, OverflowError: it is no saved dialogue.
    """
    saved = Dialogue.from_json(row)
    if not all(math.isfinite(axis) for position in saved.state.positions for axis in position):
        raise ValueError("a position is not finite")
    place = (saved.scenario, saved.rollout)
    return SavedDialogue(step, place, saved.state, tuple(map(_arrays, saved.rows)))


def _arrays(row: Row) -> TokenRow:
    tokens = TokenRow(
        np.asarray(row.ids, np.int32),
        np.asarray(row.sampled, bool),
        np.asarray(row.turn, np.int16),
        np.asarray(row.logprob, np.float32),
    )
    if len({array.shape for array in vars(tokens).values()}) != 1:
        raise ValueError("the four lists of a row must have the same length")
    return tokens
