"""A dialogue as a value: its turns, the judge's levels, and the positions of the user's state."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mapo_jax.environment import state as calculator
from mapo_jax.environment.scenario import Scenario

LEVEL_NAMES = ("C progress", "C harm", "A progress", "A harm", "P progress", "P harm")
ACTIONS = (
    "reveal_stage",  # the user tells the next stage of the story
    "reveal_memory",  # the user tells something of childhood, youth, adulthood or recent times
    "shift_focus",  # the user stays with C, A or P
    "turning_point",  # an event
    "continue",
    "observe",
    "end",  # on success only
)
FAILURE_KINDS = ("timeout", "transport", "malformed", "out_of_range")


class RoleFailure(Exception):
    """A call of a user, judge or director that finally failed.

    Attributes:
      kind: one of FAILURE_KINDS.
      detail: what went wrong.
      raw: the model's answer, if it was unusable.
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
    reading: Mapping[str, Any] | None = None  # scripted judge: how it parsed the reply

    def __post_init__(self) -> None:
        """Raises RoleFailure (out_of_range) for a level outside its scale."""
        progress, harm = self.levels[0::2], self.levels[1::2]
        if len(self.levels) != 6 or not set(progress) <= {0, 1, 2} or not set(harm) <= {0, -1, -2}:
            raise RoleFailure("out_of_range", f"levels {self.levels}")


@dataclass(frozen=True)
class Action:
    """The director's choice."""

    kind: str  # one of ACTIONS
    target: str | None = None  # stage number, period of life, or axis
    guidance: str = ""  # for the user's next message


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

    @property
    def levels(self) -> calculator.Levels | None:
        """The judge's six levels; None if the turn is unscored."""
        return self.judgement and self.judgement.levels

    @property
    def reading(self) -> Mapping[str, Any] | None:
        """How the scripted judge parsed the reply."""
        return self.judgement and self.judgement.reading


@dataclass(frozen=True)
class DialogueState:
    """Everything about a dialogue. Roles keep no state: they compute theirs from it."""

    scenario: Scenario
    seed: int
    turns: tuple[Turn, ...]
    user: str  # the message that awaits a reply; empty after the end
    outcome: str | None = None  # success, failure, timeout, ended (by the director) or error
    failure: str | None = None  # kind of the user's or director's failure when the outcome is error
    rule: str | None = None  # the rule of state.ending that ended it

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
        """(C, A, P) at the start and after each turn, including unscored ones."""
        return (self.scenario.start_position, *(turn.position for turn in self.turns))

    @cached_property
    def increments(self) -> tuple[tuple[float, float, float] | None, ...]:
        """`v_t` of each turn; None where the judge failed."""
        return tuple(turn.levels and calculator.points(turn.levels) for turn in self.turns)

    @property
    def counts(self) -> bool:
        """Whether statistics count it: it did not end in an error and has a scored turn."""
        return self.outcome != "error" and any(turn.scored for turn in self.turns)

    def usable(self, max_failed_share: float) -> bool:
        """Whether to learn from it: it counts, and no larger share of its turns than this is unscored."""
        failed = sum(not turn.scored for turn in self.turns)
        return self.counts and failed <= max_failed_share * len(self.turns)

    @property
    def energy(self) -> float:
        """E so far: progress in the direction from the start state to equilibrium, in points."""
        return calculator.energy(self.scenario.start_position, self.position)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The dialogue as chat messages, including the one that awaits a reply."""
        chat = []
        for turn in self.turns:
            chat += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.reply}]
        if self.user:
            chat.append({"role": "user", "content": self.user})
        return chat


def strip_texts(state: DialogueState) -> dict[str, Any]:
    """The dialogue as JSON values without any text; enough for every metric."""

    def strip(turn: Turn) -> dict[str, Any]:
        reading = turn.reading
        if reading is not None:
            named = [{"what": name["what"], "right": name["right"]} for name in reading.get("named", ())]
            reading = {key: reading[key] for key in ("kind", "stage") if key in reading} | {"named": named}
        return {
            "position": turn.position,
            "levels": turn.levels,
            "reading": reading,
            "failure": turn.failure,
            "truncated": turn.truncated,
        }

    return {
        "seed": state.seed,
        "outcome": state.outcome,
        "failure": state.failure,
        "rule": state.rule,
        "turns": [strip(turn) for turn in state.turns],
    }


def from_stripped(scenario: Scenario, data: Mapping[str, Any]) -> DialogueState:
    """A dialogue without texts from the values of `strip_texts`; its metrics are those of the original."""
    empty = ("",) * len(LEVEL_NAMES)

    def restore(turn: Mapping[str, Any]) -> Turn:
        levels = turn["levels"]
        judgement = None if levels is None else Judgement(tuple(levels), empty, empty, turn["reading"])
        position = tuple(turn["position"])
        return Turn("", "", judgement, turn["failure"], position, action=None, truncated=turn["truncated"])

    turns = tuple(map(restore, data["turns"]))
    return DialogueState(scenario, data["seed"], turns, "", data["outcome"], data["failure"], data["rule"])
