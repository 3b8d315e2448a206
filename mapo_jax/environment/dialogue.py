"""A dialogue as a value, and the two steps that make one: opening it, and taking a turn.

A turn of the EMPA loop: the policy replies; the judge scores (sensor); the state moves and the end is decided
(calculator, `state.py`); the director picks one action (decision maker); the user speaks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mapo_jax.environment import state as calculator
from mapo_jax.environment.roles import Director, Judge, User
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.state import Limits

LEVEL_NAMES = ("C progress", "C harm", "A progress", "A harm", "P progress", "P harm")
ACTIONS = (
    "reveal_stage",  # tell the story's next stage
    "reveal_memory",  # tell something of childhood, youth, adulthood or recent times
    "shift_focus",  # let the user dwell on C, A or P
    "turning_point",  # something happens
    "continue",
    "observe",
    "end",  # on success only
)
FAILURE_KINDS = ("timeout", "transport", "malformed", "out_of_range")


class RoleFailure(Exception):
    """A call of a user, judge or director that failed for good; `kind` is one of FAILURE_KINDS.

    `raw` is what a model answered, if that was the trouble.
    """

    def __init__(self, kind: str, detail: str = "", raw: str = "") -> None:
        assert kind in FAILURE_KINDS, kind
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail, self.raw = kind, detail, raw


@dataclass(frozen=True)
class Judgement:
    """Six levels in the order of LEVEL_NAMES, each with evidence from the reply and a reason."""

    levels: tuple[int, int, int, int, int, int]  # progress 0..2, harm 0..-2
    evidence: tuple[str, str, str, str, str, str]
    reasons: tuple[str, str, str, str, str, str]
    reading: Mapping[str, Any] | None = None  # scripted judge: what it saw in the reply

    def __post_init__(self) -> None:
        """Raises RoleFailure (out_of_range) for a level that the scale does not have."""
        progress, harm = self.levels[0::2], self.levels[1::2]
        if len(self.levels) != 6 or not set(progress) <= {0, 1, 2} or not set(harm) <= {0, -1, -2}:
            raise RoleFailure("out_of_range", f"levels {self.levels}")


@dataclass(frozen=True)
class Action:
    """What the director chose."""

    kind: str  # one of ACTIONS
    target: str | None = None  # stage number, period of life, or axis
    guidance: str = ""  # what the user is told


@dataclass(frozen=True)
class Turn:
    """One finished turn."""

    user: str
    reply: str
    judgement: Judgement | None  # None: the judge failed and the turn is unscored
    failure: str | None  # kind of the judge's failure
    position: tuple[float, float, float]  # (C, A, P) after the turn
    action: Action | None  # None: the dialogue ended here without success
    truncated: bool = False  # the reply was cut by its token limit

    @property
    def scored(self) -> bool:
        """Whether the turn has a reward."""
        return self.judgement is not None


@dataclass(frozen=True)
class DialogueState:
    """Everything about a dialogue; what a role knows beyond it, it computes from it."""

    scenario: Scenario
    seed: int
    turns: tuple[Turn, ...]
    user: str  # the message that awaits a reply; empty when the dialogue has ended
    outcome: str | None = None  # success, failure, timeout, ended (by the director) or error
    failure: str | None = None  # kind of the user's or director's failure when the outcome is error
    rule: str | None = None  # which rule of state.ending ended it

    @property
    def turn_count(self) -> int:
        """Finished turns."""
        return len(self.turns)

    @property
    def position(self) -> tuple[float, float, float]:
        """(C, A, P) now."""
        return self.turns[-1].position if self.turns else self.scenario.start_position

    @cached_property
    def positions(self) -> tuple[tuple[float, float, float], ...]:
        """(C, A, P) at the start and after each turn, unscored ones included."""
        return (self.scenario.start_position, *(turn.position for turn in self.turns))

    @cached_property
    def increments(self) -> tuple[tuple[float, float, float] | None, ...]:
        """`v_t` of each turn; None where the judge failed."""
        return tuple(
            calculator.points(turn.judgement.levels) if turn.judgement is not None else None
            for turn in self.turns
        )

    @property
    def distance(self) -> float:
        """D of the position: what the user still lacks."""
        return calculator.distance(self.position)

    @property
    def rewards(self) -> tuple[float | None, ...]:
        """Incremental distance of each turn; None where the judge failed."""
        distances = [calculator.distance(position) for position in self.positions]
        return tuple(
            before - after if turn.scored else None
            for turn, before, after in zip(self.turns, distances, distances[1:], strict=False)
        )

    @property
    def energy(self) -> float:
        """E so far: support in the direction from the start state to equilibrium."""
        return calculator.energy_from_position(self.scenario.start_position, self.position)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The dialogue as chat messages, the awaiting one included."""
        chat = []
        for turn in self.turns:
            chat += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.reply}]
        if self.user:
            chat.append({"role": "user", "content": self.user})
        return chat


def facts(state: DialogueState) -> dict[str, Any]:
    """What a dialogue came to as JSON values, without a word of what was said: all that figures need."""

    def turn_facts(turn: Turn) -> dict[str, Any]:
        judgement = turn.judgement
        reading = None if judgement is None else judgement.reading
        if reading is not None:
            named = [{"what": name["what"], "right": name["right"]} for name in reading.get("named", ())]
            kept = {name: reading[name] for name in ("kind", "stage") if name in reading}
            reading = kept | {"named": named}
        levels = None if judgement is None else judgement.levels
        return {
            "position": turn.position,
            "levels": levels,
            "reading": reading,
            "failure": turn.failure,
            "truncated": turn.truncated,
        }

    return {
        "seed": state.seed,
        "outcome": state.outcome,
        "failure": state.failure,
        "rule": state.rule,
        "turns": [turn_facts(turn) for turn in state.turns],
    }


def from_facts(scenario: Scenario, data: Mapping[str, Any]) -> DialogueState:
    """A dialogue without words, of which every figure is as of the one that `facts` was given."""
    none = ("",) * len(LEVEL_NAMES)
    turns = tuple(
        Turn(
            user="",
            reply="",
            judgement=None
            if turn["levels"] is None
            else Judgement(tuple(turn["levels"]), none, none, turn["reading"]),
            failure=turn["failure"],
            position=tuple(turn["position"]),
            action=None,
            truncated=turn["truncated"],
        )
        for turn in data["turns"]
    )
    return DialogueState(scenario, data["seed"], turns, "", data["outcome"], data["failure"], data["rule"])


@dataclass(frozen=True)
class Roles:
    """The three roles of a world."""

    user: User
    judge: Judge
    director: Director


async def open_dialogue(scenario: Scenario, seed: int, roles: Roles) -> str:
    """The user's first message, shared by the rollouts of a scenario in one step.

    Raises:
      RoleFailure: the user's call failed for good.
    """
    return await roles.user.open(scenario, seed)


async def take_turn(
    state: DialogueState, reply: str, roles: Roles, limits: Limits, *, truncated: bool = False
) -> DialogueState:
    """One turn of the loop.

    Args:
      state: a dialogue that awaits a reply.
      reply: the policy's reply.
      roles: user, judge and director.
      limits: fewest and most turns, and the tolerance of success.
      truncated: the reply was cut by its token limit.

    Returns:
      The dialogue one turn later, ended or awaiting the next reply. A judge's failure leaves the turn
      unscored and the position where it was; a user's or director's failure ends the dialogue with outcome
      `error`.

    Raises:
      ValueError: the dialogue has already ended.
    """
    if state.outcome is not None:
        raise ValueError(f"the dialogue has ended ({state.outcome}); it takes no further turn")
    judgement, failure, position = None, None, state.position
    try:
        judgement = await roles.judge.score(state, reply)
        position = calculator.move(position, calculator.points(judgement.levels))
    except RoleFailure as problem:
        failure = problem.kind
    turn = Turn(state.user, reply, judgement, failure, position, None, truncated)
    moved = replace(state, turns=(*state.turns, turn), user="")

    ending = calculator.ending(state.scenario.start_position, moved.increments, limits)
    if ending is not None:
        action = Action("end", guidance="The need is met.") if ending.outcome == "success" else None
        turns = (*state.turns, replace(turn, action=action))
        return replace(moved, turns=turns, outcome=ending.outcome, rule=ending.rule)
    try:
        action = await roles.director.act(moved)
        moved = replace(moved, turns=(*state.turns, replace(turn, action=action)))
        if action.kind == "end":
            return replace(moved, outcome="ended")
        return replace(moved, user=await roles.user.reply(moved))
    except RoleFailure as problem:
        return replace(moved, outcome="error", failure=problem.kind)
