"""The three roles of a world, and the two steps of a dialogue with them: opening it, and taking a turn.

A turn of the EMPA loop: the policy replies; the judge scores (sensor); the calculator (`state.py`) updates
the state and decides about the end; the director picks one action (decision maker); the user speaks again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from mapo_jax.config import Config
from mapo_jax.environment import state as calculator
from mapo_jax.environment.dialogue import Action, DialogueState, Judgement, RoleFailure, Turn
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.state import Limits

Messages = Sequence[Mapping[str, str]]
"""A chat: `role` and `content` of each message."""

Schema = Mapping[str, Any]
"""A JSON schema."""


class Completion(NamedTuple):
    """The answer of a language model."""

    text: str
    input_tokens: int
    output_tokens: int
    cut: bool = False  # at max_tokens


class User(Protocol):
    """Speaks as the person on the card."""

    async def open(self, scenario: Scenario, seed: int) -> str:
        """The first message; the rollouts of a scenario share it.

        Raises:
          RoleFailure: the call finally failed.
        """

    async def reply(self, state: DialogueState) -> str:
        """The next message; `state.turns[-1].action` holds the director's guidance.

        Raises:
          RoleFailure: the call finally failed.
        """


class Judge(Protocol):
    """Scores the last reply only, on six levels, each with evidence and a reason."""

    async def score(self, state: DialogueState, reply: str) -> Judgement:
        """The judgement of `reply` to `state.user`.

        Raises:
          RoleFailure: the call finally failed; the turn then stays unscored.
        """


class Director(Protocol):
    """Picks one of dialogue.ACTIONS after every turn that does not end the dialogue."""

    async def act(self, state: DialogueState) -> Action:
        """The action; its guidance reaches the user's next message.

        Raises:
          RoleFailure: the call finally failed.
        """


@dataclass(frozen=True)
class Roles:
    """The three roles of a world."""

    user: User
    judge: Judge
    director: Director


def limits_of(config: Config) -> Limits:
    """When the dialogues of a configuration end."""
    return Limits(config.rollout.min_turns, config.rollout.max_turns, config.environment.success_tolerance)


async def open_dialogue(scenario: Scenario, seed: int, roles: Roles) -> str:
    """The user's first message, which the rollouts of a scenario share in one step.

    Raises:
      RoleFailure: the user's call finally failed.
    """
    return await roles.user.open(scenario, seed)


async def score_turn(state: DialogueState, reply: str, judge: Judge, *, truncated: bool = False) -> Turn:
    """The turn of this reply, judged, without an action; unscored and without movement if the judge fails."""
    judgement, failure, position = None, None, state.position
    try:
        judgement = await judge.score(state, reply)
        position = calculator.move(position, calculator.points(judgement.levels))
    except RoleFailure as error:
        failure = error.kind
    return Turn(state.user, reply, judgement, failure, position, None, truncated)


def with_schema(messages: Messages, schema: Schema) -> list[Mapping[str, str]]:
    """The chat with the schema in its last message, for a model that has no other way to be told."""
    *earlier, last = messages
    text = f"{last['content']}\n\nJSON schema: {json.dumps(schema, ensure_ascii=False)}"
    return [*earlier, {**last, "content": text}]


async def take_turn(
    state: DialogueState, reply: str, roles: Roles, limits: Limits, *, truncated: bool = False
) -> DialogueState:
    """One turn of the loop.

    Args:
      state: a dialogue that awaits a reply.
      reply: the policy's reply.
      roles: user, judge and director.
      limits: minimum and maximum of turns, and the tolerance of success.
      truncated: the reply was cut by its token limit.

    Returns:
      The dialogue one turn later, ended or awaiting the next reply. A failure of the judge leaves the turn
      unscored and the position unchanged; a failure of user or director ends the dialogue with outcome
      `error`.

    Raises:
      ValueError: the dialogue has already ended.
    """
    if state.outcome is not None:
        raise ValueError(f"the dialogue has ended ({state.outcome}); it takes no further turn")
    turn = await score_turn(state, reply, roles.judge, truncated=truncated)
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
    except RoleFailure as error:
        return replace(moved, outcome="error", failure=error.kind)
