"""Saved dialogues: what the report needs of each, parsed from the rows of a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mapo_jax.algorithm.rewards import distance
from mapo_jax.environment import state as calculator
from mapo_jax.environment.scenario import start_position
from mapo_jax.scores.empa import score_case

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class SavedTurn:
    """One saved turn, with the results of the judge and the director."""

    user: str
    reply: str
    position: Vector  # (C, A, P) after the turn
    levels: tuple[int, ...] | None  # six; None: unscored
    evidence: tuple[str, ...]
    reasons: tuple[str, ...]
    failure: str | None
    kind: str | None  # scripted world: the kind of reply
    named: tuple[tuple[str, bool], ...]  # scripted world: what the reply named, and whether it was right
    action: str | None  # of the director
    guidance: str
    truncated: bool


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
    card: Mapping[str, Any]  # fields of the scenario card
    start: Vector
    turns: tuple[SavedTurn, ...]
    outcome: str
    failure: str | None
    rule: str | None
    seed: int
    rows: tuple[TokenRow, ...]

    @property
    def scenario(self) -> str:
        """The card's id."""
        return str(self.card["id"])

    @cached_property
    def positions(self) -> tuple[Vector, ...]:
        """(C, A, P) at the start and after each turn."""
        return (self.start, *(turn.position for turn in self.turns))

    @cached_property
    def distances(self) -> list[float]:
        """The distance D, at the start and after each turn."""
        return distance(self.positions).tolist()

    @cached_property
    def scored(self) -> list[bool]:
        """Per turn, whether the judge scored it."""
        return [turn.levels is not None for turn in self.turns]

    @property
    def unscored_turns(self) -> int:
        """How many turns the judge failed to score."""
        return len(self.turns) - sum(self.scored)

    @cached_property
    def counts(self) -> bool:
        """Whether statistics count it: it did not end in an error and has a scored turn."""
        return self.outcome != "error" and any(self.scored)

    @cached_property
    def epm_q(self) -> float | None:
        """EMPA's score; None if there is nothing to score."""
        if not self.counts or self.distances[0] == 0:
            return None
        return score_case(self.start, [turn.levels for turn in self.turns])["epm_q"]


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
      KeyError, TypeError, ValueError, AttributeError, OverflowError, UserError: it is no saved dialogue.
    """
    state = row["state"]
    card = state["scenario"]
    start = start_position(card["start"])
    if not isinstance(card["id"], str):
        raise TypeError("a card's id is text")
    return SavedDialogue(
        step=step,
        place=(_index(row["scenario"]), _index(row["rollout"])),
        card=card,
        start=start,
        turns=tuple(map(_parse_turn, state["turns"])),
        outcome=str(state.get("outcome") or "unfinished"),
        failure=_text_or_none(state.get("failure")),
        rule=_text_or_none(state.get("rule")),
        seed=int(state.get("seed", 0)),
        rows=tuple(map(_parse_row, (*row.get("earlier_rows", ()), row["row"]))),
    )


def _parse_turn(turn: Mapping[str, Any]) -> SavedTurn:
    position = tuple(float(axis) for axis in turn["position"])
    if len(position) != 3 or not all(map(math.isfinite, position)):
        raise ValueError(f"{position} is no position")
    judgement, action = turn["judgement"], turn.get("action") or {}
    levels, reading = None, {}
    if judgement is not None:
        levels = tuple(map(int, judgement["levels"]))
        calculator.points(levels)  # raises for a level that the scale does not have
        reading = judgement.get("reading") or {}
    target = action.get("target")
    return SavedTurn(
        user=str(turn["user"]),
        reply=str(turn["reply"]),
        position=position,
        levels=levels,
        evidence=tuple(map(str, judgement["evidence"])) if judgement else (),
        reasons=tuple(map(str, judgement["reasons"])) if judgement else (),
        failure=_text_or_none(turn.get("failure")),
        kind=_text_or_none(reading.get("kind")),
        named=tuple((str(name["what"]), bool(name["right"])) for name in reading.get("named") or ()),
        action=f"{action['kind']}{f' {target}' if target else ''}" if action else None,
        guidance=str(action.get("guidance") or ""),
        truncated=bool(turn.get("truncated")),
    )


def _parse_row(row: Mapping[str, Any]) -> TokenRow:
    tokens = TokenRow(
        np.asarray(row["ids"], np.int32),
        np.asarray(row["sampled"], bool),
        np.asarray(row["turn"], np.int16),
        np.asarray(row["logprob"], np.float32),
    )
    if len({array.shape for array in vars(tokens).values()}) != 1:
        raise ValueError("the four lists of a row must have the same length")
    return tokens


def _index(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 100_000:
        raise ValueError(f"{value!r} is no index")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)
