"""The turn loop, with roles whose answers the test determines."""

import asyncio
from dataclasses import replace

import pytest

from mapo_jax.environment.dialogue import Action, DialogueState, Judgement, RoleFailure
from mapo_jax.environment.roles import Roles, open_dialogue, take_turn
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.state import Limits
from mapo_jax.scores.figures import dialogue_rewards

CARD = replace(load_scenarios()[0], start=(0, 0, 1, 0, 1, 0, 0, 1, 0))  # P_0 = (-3, -4, -4)
LIMITS = Limits(min_turns=2, max_turns=4)


class Fixed:
    """All three roles; `levels` or an exception for each turn."""

    def __init__(self, *levels, action="continue", broken=None):
        self.levels, self.action, self.broken, self.calls = levels, action, broken, []

    async def open(self, scenario, seed):
        return f"Hello from {scenario.person.name}."

    async def score(self, state, reply):
        self.calls.append("judge")
        levels = self.levels[state.turn_count]
        if isinstance(levels, str):
            raise RoleFailure(levels)
        return Judgement(levels, (reply,) * 6, ("why",) * 6)

    async def act(self, state):
        self.calls.append("director")
        assert state.turns[-1].action is None and state.user == ""
        if self.broken == "director":
            raise RoleFailure("timeout")
        return Action(self.action)

    async def reply(self, state):
        self.calls.append("user")
        assert state.turns[-1].action is not None
        if self.broken == "user":
            raise RoleFailure("transport")
        return f"Message {state.turn_count}."


def play(world, turns, limits=LIMITS, truncated=False):
    roles = Roles(world, world, world)

    async def hold():
        state = DialogueState(CARD, 7, (), await open_dialogue(CARD, 7, roles))
        for t in range(turns):
            state = await take_turn(state, f"Reply {t}.", roles, limits, truncated=truncated)
        return state

    return asyncio.run(hold())


NOTHING, ALL = (0, 0, 0, 0, 0, 0), (2, 0, 2, 0, 2, 0)


def test_turn_moves_the_state_and_goes_on():
    world = Fixed((1, 0, 2, -1, 0, -2))
    state = play(world, 1, truncated=True)
    assert world.calls == ["judge", "director", "user"]
    # Points: C +1, A +3 - 2, P -5.
    assert state.position == (-2, -3, -9) and state.positions == ((-3, -4, -4), (-2, -3, -9))
    assert state.outcome is None and state.user == "Message 1." and state.turns[0].truncated
    # D before: sqrt(2^2 + 3^2 + 3^2); after: sqrt(1 + 2^2 + 8^2).
    assert dialogue_rewards(state) == pytest.approx((22**0.5 - 69**0.5,))
    assert [m["role"] for m in state.messages] == ["user", "assistant", "user"]


def test_success_waits_for_the_minimum_turn_and_asks_nobody():
    world = Fixed(ALL, ALL)
    state = play(world, 2)
    assert state.outcome == "success" and state.turns[-1].action.kind == "end" and state.user == ""
    assert world.calls == ["judge", "director", "user", "judge"]
    assert state.energy >= 41**0.5
    with pytest.raises(ValueError, match="ended"):
        asyncio.run(take_turn(state, "More.", Roles(world, world, world), LIMITS))


def test_timeout():
    state = play(Fixed(*[NOTHING] * 4), 4)
    assert state.outcome == "timeout" and state.rule == "max_turns" and state.turns[-1].action is None


def test_judge_failure_leaves_the_turn_unscored():
    state = play(Fixed((1, 0, 0, 0, 0, 0), "malformed", (1, 0, 0, 0, 0, 0)), 3)
    turn = state.turns[1]
    assert not turn.scored and turn.failure == "malformed" and turn.position == (-2, -4, -4)
    assert dialogue_rewards(state)[1] is None and dialogue_rewards(state)[0] is not None
    assert state.position == (-1, -4, -4) and state.turn_count == 3 and state.outcome is None


@pytest.mark.parametrize(("who", "kind"), [("user", "transport"), ("director", "timeout")])
def test_user_or_director_failure_ends_the_dialogue(who, kind):
    state = play(Fixed(NOTHING, broken=who), 1)
    assert state.outcome == "error" and state.failure == kind and state.turn_count == 1


def test_director_may_end():
    assert play(Fixed(NOTHING, action="end"), 1).outcome == "ended"


def test_levels_outside_the_scale_are_a_failure():
    for levels in ((3, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0), (0, -3, 0, 0, 0, 0), (-1, 0, 0, 0, 0, 0)):
        state = play(Fixed(levels), 1)
        assert state.turns[0].failure == "out_of_range" and state.position == CARD.start_position
