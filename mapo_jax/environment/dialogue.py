"""A dialogue as a value: finished turns, the judge's levels, and positions of the user's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mapo_jax.environment import state as calculator
from mapo_jax.environment.scenario import Scenario

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
