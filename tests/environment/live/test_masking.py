"""A failed judgement enters no statistic: a batch computed by hand, from server answers to the loss mask."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from mapo_jax.config import AlgorithmConfig, RoleConfig
from mapo_jax.environment.dialogue import Action, DialogueState
from mapo_jax.environment.live.calls import Caller, CallLog
from mapo_jax.environment.live.client import Connections, Server
from mapo_jax.environment.live.judge import LiveJudge
from mapo_jax.environment.roles import Roles, take_turn
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.state import Limits
from mapo_jax.learning import batch as rows
from mapo_jax.learning.credit import turn_advantages, turn_returns, turn_rewards
from mapo_jax.rollout.collect import Dialogue
from mapo_jax.rollout.rows import Row
from mapo_jax.scores.figures import dialogue_rewards

# C1 = 3 and nothing else: P_0 = (-6, 0, 0), D = 5; a point on C is a point of D.
CARD = replace(load_scenarios()[0], start=(3, 0, 0, 0, 0, 0, 0, 0, 0))


class Quiet:
    """A minimal user and director."""

    async def act(self, state):
        return Action("continue")

    async def reply(self, state):
        return "Hm."


def test_a_hand_computed_batch(serve, judged):
    answers = {
        "one": judged(1, 0, 0, 0, 0, 0),  # C + 1: reward 1
        "two": judged(9, 0, 0, 0, 0, 0),  # out of range, and so again after the repair
        "three": judged(2, 0, 0, 0, 0, 0),  # C + 3: reward 3
        "four": judged(0, -1, 0, 0, 0, 0),  # C - 2: reward -2
    }

    def answer(request, number):
        text = request["messages"][1]["content"]
        return next(answers[word] for word in answers if f'"last reply": "{word}"' in text)

    server = serve(answer)

    async def hold():
        async with aclosing(Connections(server.url)) as connections:
            model = Server(RoleConfig(url=server.url, model="m"), connections, call_seconds=6.0)
            judge = LiveJudge(Caller("judge", model, {}, CallLog()))
            roles = Roles(Quiet(), judge, Quiet())
            states = []
            for seed, replies in enumerate((("one", "two"), ("three", "four"))):
                state = DialogueState(CARD, seed, (), "Well.")
                for reply in replies:
                    state = await take_turn(state, reply, roles, Limits(2, 2))
                states.append(state)
            return states

    first, second = asyncio.run(hold())
    assert dialogue_rewards(first) == (1.0, None) and dialogue_rewards(second) == (3.0, -2.0)
    assert first.turns[1].failure == "out_of_range" and server.count == 4 + 1

    # A row is: one prompt token, two sampled ones, and again; the ids do not matter.
    row = Row().with_prompt([9]).with_reply([1, 2], [-0.1] * 2, 0).with_prompt([9])
    row = row.with_reply([3, 4], [-0.2] * 2, 1)
    dialogues = [[Dialogue(first, row, 0, 0, 0, 0), Dialogue(second, row, 0, 1, 0, 0)]]
    cells = rows.make_cells(dialogues, 2)
    assert cells.valid.all() and cells.scored.tolist() == [[[True, False], [True, True]]]

    algorithm = AlgorithmConfig(discount=0.5, turn_weight=1 / 3)
    rewards = turn_rewards(cells.positions, cells.scored, algorithm=algorithm)
    returns = turn_returns(rewards, cells.valid, cells.scored, algorithm=algorithm)
    advantages = turn_advantages(rewards, returns, cells.valid, cells.scored, algorithm=algorithm)
    assert np.asarray(rewards).tolist() == [[[1, 0], [3, -2]]]
    # Returns: the hole counts as its rollout's mean, 1: 1 + 1/2, and 3 - 1. Turn level at turn 0: 1.5, 2 are
    # -1 and +1 deviations; at turn 1 one score is left, so 0. Batch level over 1, 3, -2: mean 2/3, deviation
    # sqrt(38)/3 = 2.05480. Mixed, a third and two thirds:
    deviation = 38**0.5 / 3
    expected = [
        [-1 / 3 + 2 / 3 * (1 / 3) / deviation, 0.0],
        [1 / 3 + 2 / 3 * (7 / 3) / deviation, 2 / 3 * (-8 / 3) / deviation],
    ]
    # float32 arithmetic on numbers of order 1.
    assert np.asarray(advantages)[0].tolist() == [pytest.approx(each, abs=1e-5) for each in expected]

    batch = rows.make_batch(dialogues, np.asarray(advantages), cells.scored, 6)
    assert np.asarray(batch.mask).tolist() == [
        [False, True, True, False, False, False],  # the unscored turn is not in the loss
        [False, True, True, False, True, True],
    ]
    assert not np.asarray(batch.advantages)[0, 3:].any()
