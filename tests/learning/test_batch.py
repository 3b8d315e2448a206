"""From dialogues to arrays, on dialogues written out by hand."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from mapo_jax.config import AlgorithmConfig, load_config
from mapo_jax.environment.dialogue import DialogueState, Judgement, Turn
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.learning import programs
from mapo_jax.learning.batch import (
    make_batch,
    make_cells,
    microbatch_rows,
    row_length,
    row_lengths,
    scenario_order,
    take_scenarios,
)
from mapo_jax.learning.credit import turn_advantages, turn_returns, turn_rewards
from mapo_jax.model.sharding import make_mesh
from mapo_jax.rollout.collect import Dialogue
from mapo_jax.rollout.rows import Row
from mapo_jax.running.forecast import fresh_model

SCENARIO = load_scenarios(split="train")[0]
LOGPROB = float(np.float32(-0.7))


def make_dialogue(rewards, *, scenario=0, rollout=0, outcome="timeout", start=(-10.0, -1.0, -1.0)):
    """One turn per reward, moving along C alone; None: the judge failed.

    The row: two prompt ids, then per turn two sampled ids and, between turns, one id of the user. Its ids are
    10 s + r for prompts, 100 (t + 1) + i for sampled token i of turn t.
    """
    turns, row, position = [], Row().with_prompt([10 * scenario + rollout] * 2), start
    for t, reward in enumerate(rewards):
        judgement = None
        if reward is not None:
            judgement = Judgement((0,) * 6, ("",) * 6, ("",) * 6)
            position = (position[0] + reward, *position[1:])
        failure = None if judgement else "timeout"
        turns.append(Turn("hello", "hi", judgement, failure, position, None))
        if t:
            row = row.with_prompt([10 * scenario + rollout])
        row = row.with_reply([100 * (t + 1), 100 * (t + 1) + 1], [LOGPROB, -0.25 * (t + 1)], t)
    state = DialogueState(SCENARIO, 5, tuple(turns), "", outcome=outcome)
    return Dialogue(state, row, scenario, rollout, 1, 0)


def credit(algorithm, positions, valid, scored):
    rewards = turn_rewards(positions, scored, algorithm=algorithm)
    returns = turn_returns(rewards, valid, scored, algorithm=algorithm)
    return rewards, turn_advantages(rewards, returns, valid, scored, algorithm=algorithm)


@pytest.fixture
def dialogues():
    """[2][2]: one with a failed turn, one shorter, one ended in error, one whose judge failed throughout."""
    return [
        [make_dialogue([1.0, None, 3.0]), make_dialogue([2.0, 1.0], rollout=1)],
        [
            make_dialogue([1.0, 1.0], scenario=1, outcome="error"),
            make_dialogue([None, None], scenario=1, rollout=1),
        ],
    ]


def test_cells_by_hand(dialogues):
    cells = make_cells(dialogues, 3)
    start = SCENARIO.start_position
    assert cells.positions.shape == (2, 2, 4, 3)
    np.testing.assert_array_equal(cells.positions[:, :, 0], np.broadcast_to(np.float32(start), (2, 2, 3)))
    np.testing.assert_array_equal(cells.positions[0, 0, 1:, 0], [-9, -9, -6])  # the hole stays where it was
    np.testing.assert_array_equal(cells.positions[0, 1, 1:, 0], [-8, -7, -7])  # held after the end
    assert cells.valid.tolist() == [
        [[True, True, True], [True, True, False]],
        [[False] * 3, [False] * 3],
    ]
    assert cells.scored.tolist() == [
        [[True, False, True], [True, True, False]],
        [[False] * 3, [False] * 3],
    ]
    assert not make_cells(dialogues, 3, max_failed_share=0.3).valid[0, 0].any(), "one turn of three failed"


def test_cells_refuse_what_does_not_fit(dialogues):
    with pytest.raises(ValueError, match="a dialogue has 3 turns; max_turns is 2"):
        make_cells(dialogues, 2)
    with pytest.raises(ValueError, match="same number of rollouts"):
        make_cells([dialogues[0], dialogues[1][:1]], 3)


def test_credit_by_hand(dialogues):
    """Distances along one axis: rewards are the movements; batch level: (r - mean)/std of 1, 3, 2, 1."""
    cells = make_cells(dialogues, 3)
    positions = cells.positions.copy()
    positions[:, :, 0] = (-10, -1, -1)  # the card's start lies elsewhere; only differences of D matter
    algorithm = AlgorithmConfig(estimator="batch")
    rewards, advantages = credit(algorithm, positions, cells.valid, cells.scored)
    np.testing.assert_allclose(rewards[0], [[1, 0, 3], [2, 1, 0]], atol=1e-6)
    assert not np.any(rewards[1]) and not np.any(advantages[1])
    values = np.array([1.0, 3.0, 2.0, 1.0])
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(np.asarray(advantages)[cells.scored], expected, atol=1e-5)


def test_rows_by_hand(dialogues):
    scored = make_cells(dialogues, 3).scored
    advantages = np.where(scored, np.arange(12).reshape(2, 2, 3) + 1.0, np.nan)
    batch = make_batch(dialogues, advantages, scored, 12)
    first = dialogues[0][0].row
    assert batch.tokens[0].tolist() == [0, 0, 100, 101, 0, 200, 201, 0, 300, 301, 0, 0]
    assert batch.tokens[0, : len(first)].tolist() == list(first.ids)
    assert batch.mask[0].tolist() == [*[False] * 2, True, True, *[False] * 4, True, True, False, False]
    assert batch.advantages[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 3, 3, 0, 0]
    assert batch.sampler_logprobs[0].tolist() == [0, 0, LOGPROB, -0.25, *[0] * 4, LOGPROB, -0.75, 0, 0]
    np.testing.assert_array_equal(batch.old_logprobs, batch.sampler_logprobs)
    assert batch.advantages[1].tolist() == [0, 0, 4, 4, 0, 5, 5, 0, 0, 0, 0, 0]
    assert not batch.mask[2:].any() and not batch.advantages[2:].any()
    assert batch.positions[3].tolist() == list(range(12))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(batch)} == {"int32", "bool", "float32"}


def test_an_unsampled_end_of_turn_is_not_in_the_loss():
    row = Row().with_prompt([1]).with_reply([7, 8], [-1.0, -2.0], 0, end_of_turn=[9])
    dialogue = replace(make_dialogue([1.0]), row=row)
    batch = make_batch([[dialogue]], np.ones((1, 1, 1)), np.ones((1, 1, 1), bool), 6)
    assert batch.tokens[0].tolist() == [1, 7, 8, 9, 0, 0]
    assert batch.mask[0].tolist() == [False, True, True, False, False, False]


def test_a_row_per_turn():
    rows = [Row().with_prompt([1, 2]).with_reply([10 + t], [-1.0], t) for t in range(2)]
    dialogue = replace(make_dialogue([1.0, 1.0]), row=rows[1], earlier_rows=(rows[0],))
    advantages, scored = np.array([[[3.0, 4.0, 5.0]]]), np.array([[[True, True, False]]])
    batch = make_batch([[dialogue]], advantages, scored, 4, rows_per_dialogue=3)
    assert batch.tokens.tolist() == [[1, 2, 10, 0], [1, 2, 11, 0], [0] * 4]
    assert batch.advantages.tolist() == [[0, 0, 3, 0], [0, 0, 4, 0], [0] * 4]
    with pytest.raises(ValueError, match="2 rows; there is room for 1"):
        make_batch([[dialogue]], advantages, scored, 4)


def test_rows_refuse_what_does_not_fit(dialogues):
    scored = make_cells(dialogues, 3).scored
    with pytest.raises(ValueError, match="row of 10 tokens does not fit the length 9"):
        make_batch(dialogues, np.zeros((2, 2, 3)), scored, 9)
    unstarted = replace(dialogues[0][0], row=Row().with_reply([1], [-1.0], 0))
    with pytest.raises(ValueError, match="first token is marked as sampled"):
        make_batch([[unstarted]], np.zeros((1, 1, 3)), scored[:1, :1], 9)


def test_a_saved_step_gives_the_same_batch_bit_for_bit(dialogues):
    lines = [json.dumps(dialogue.to_json()) for group in dialogues for dialogue in group]
    flat = [Dialogue.from_json(json.loads(line)) for line in lines]
    replayed = [flat[:2], flat[2:]]

    def batch_of(group):
        cells = make_cells(group, 3)
        _, advantages = credit(AlgorithmConfig(), cells.positions, cells.valid, cells.scored)
        return make_batch(group, np.asarray(advantages), cells.scored, 16)

    for one, other in zip(*map(jax.tree.leaves, map(batch_of, (dialogues, replayed))), strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


def test_microbatches_divide_the_minibatch():
    assert [microbatch_rows(total, 10, 49) for total in (16, 6, 7, 3)] == [4, 3, 1, 3]
    assert [microbatch_rows(16, length, 49) for length in (5, 12, 13, 99)] == [8, 4, 2, 1]  # one row at least
    assert microbatch_rows(16, 10, 0) == 16
    # on a mesh the budget is each device's
    assert [microbatch_rows(24, 10, tokens, shards=4) for tokens in (1, 20, 39, 60)] == [4, 8, 12, 24]


def test_few_lengths_hold_every_row(dialogues):
    assert row_lengths(640) == (384, 512, 640)
    assert row_lengths(512) == (512,)
    assert row_lengths(25_000) == (16_384, 24_576, 25_000)
    for longest in range(513, 1200):
        lengths = row_lengths(longest)
        assert len(lengths) <= 3 and lengths[-1] == longest and lengths == tuple(sorted(lengths))
        for size in range(longest // 2 + 1, longest + 1):
            padded = next(length for length in lengths if length >= size)
            assert padded < 1.5 * size
    assert row_length(dialogues, (8, 10, 12)) == 10
    with pytest.raises(ValueError, match="10 tokens; the longest length is 9"):
        row_length(dialogues, (8, 9))


def test_minibatches_are_whole_scenarios_in_a_fixed_shuffle(dialogues):
    order = scenario_order(3, 5, 0, 8, 2)
    assert order.shape == (4, 2) and sorted(order.ravel()) == list(range(8))
    np.testing.assert_array_equal(order, scenario_order(3, 5, 0, 8, 2))
    others = [scenario_order(*key, 8, 2).tolist() for key in ((4, 5, 0), (3, 6, 0), (3, 5, 1))]
    assert order.tolist() not in others
    with pytest.raises(ValueError, match="8 scenarios do not divide into mini-batches of 3"):
        scenario_order(3, 5, 0, 8, 3)

    scored = make_cells(dialogues, 3).scored
    batch = make_batch(dialogues, np.ones((2, 2, 3)), scored, 12)
    taken = take_scenarios(batch, np.array([1, 0]), 2)
    np.testing.assert_array_equal(taken.tokens, batch.tokens[[2, 3, 0, 1]])
    np.testing.assert_array_equal(taken.mask, batch.mask[[2, 3, 0, 1]])


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ([], 8 * 32),
        (["rollout.history=per_turn"], 32),
        (["rollout.max_turns=3", "rollout.min_turns=1"], 96),
        (["rollout.max_turns=3", "rollout.min_turns=1", "rollout.history=per_turn"], 32),
        (["rollout.max_turns=20"], 512),  # as many as fit
    ],
)
def test_the_constant_length_is_the_most_loss_tokens_of_a_row(overrides, most, monkeypatch):
    """For the history: a row is a dialogue, or one turn of it."""
    config = load_config(overrides=[*overrides, "algorithm.aggregation=constant-length"])
    given = {}
    monkeypatch.setattr(programs, "make_update", lambda scoring, *_, **options: given.update(options))
    monkeypatch.setattr(programs, "make_scorer", lambda scoring, **_: given.update(row=scoring.loss_tokens))
    mesh = make_mesh(config.mesh.model_copy(update={"fsdp": 1}))
    fresh = config.model.fresh.model_copy(update={"hidden": 8, "intermediate": 8, "layers": 1})
    programs.make_programs(config, fresh_model(fresh, 300, 512), 300, mesh)
    assert given["constant_length"] == given["row"] == programs.loss_tokens(config) == most
