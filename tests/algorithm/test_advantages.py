"""Numbers come from hand calculation or from the plain loops of this file, written from the definitions."""

import functools
import math
from typing import get_args

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapo_jax import config
from mapo_jax.algorithm import advantages
from mapo_jax.algorithm.advantages import ESTIMATORS

NAN = float("nan")
S, R, T = SHAPE = (2, 3, 4)  # the one shape of the random tests: a new shape is a new compilation
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None, derandomize=True)

# Every estimator, and what can be switched about it.
VARIANTS = [(name, {}) for name in ESTIMATORS] + [
    ("mapo", {"turn_weight": 0.5, "leave_one_out": True, "batch_scope": "group", "discount": 0.6}),
    ("mapo", {"min_group": 3}),
    ("turn", {"leave_one_out": True, "discount": 1.0}),
    ("batch", {"batch_scope": "group"}),
    ("mt_grpo", {"outcome_weight": 0.3}),
]
every_variant = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(v) or "default"
)


@functools.cache
def compiled(name, **options):
    return jax.jit(functools.partial(ESTIMATORS[name], **options))


def estimate(name, rewards, valid, scored=None, **options):
    return np.asarray(compiled(name, **options)(rewards, valid, valid if scored is None else scored))


def random_dialogues(seed, holes=True):
    """Rewards, and masks: dialogues of 0 to T turns, with and without a score in each."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(1.0, 3.0, SHAPE).astype(np.float32)
    valid = np.arange(T) < rng.integers(0, T + 1, (S, R))[..., None]
    scored = valid & (rng.random(SHAPE) < 0.8) if holes else valid
    return rewards, valid, scored


def full(*shape):
    return np.ones(shape, bool)


# --- An independent implementation: loops, lists and floats. ---


def loop_z(pairs, leave_one_out=False, min_count=1):
    """{cell: value} -> {cell: normalised value}."""
    values = list(pairs.values())
    n = len(values)
    if n < min_count or n == 0:
        return dict.fromkeys(pairs, 0.0)
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / n)
    result = {}
    for cell, value in pairs.items():
        base = (sum(values) - value) / (n - 1) if leave_one_out and n > 1 else mean
        quiet = deviation <= 1e-5 * max(1.0, *(abs(v) for v in values))
        result[cell] = 0.0 if quiet else (value - base) / (deviation + 1e-6)
    return result


def loop_estimate(
    name,
    rewards,
    valid,
    scored,
    discount=0.85,
    turn_weight=1 / 3,
    batch_scope="batch",
    leave_one_out=False,
    min_group=2,
    outcome_weight=1.0,
):
    cells = [tuple(int(i) for i in cell) for cell in np.argwhere(scored)]
    immediate = {cell: float(rewards[cell]) for cell in cells}
    length = {(s, r): int(valid[s, r].sum()) for s in range(S) for r in range(R)}

    def reward_or_mean(s, r, k):
        if (s, r, k) in immediate:
            return immediate[s, r, k]
        known = [value for (a, b, _), value in immediate.items() if (a, b) == (s, r)]
        return sum(known) / len(known)

    def future(s, r, t, gamma):
        return sum(gamma ** (k - t) * reward_or_mean(s, r, k) for k in range(t, length[s, r]))

    def per_turn(quantity, **how):
        out = {}
        for s in range(S):
            for t in range(T):
                group = {(s, r, t): quantity[s, r, t] for r in range(R) if (s, r, t) in quantity}
                out |= loop_z(group, min_count=min_group, **how)
        return out

    def outcome(minus_mean=None):
        out = {}
        for s in range(S):
            total = {
                r: future(s, r, 0, 1.0) for r in range(R) if any((s, r, t) in immediate for t in range(T))
            }
            if minus_mean is None:
                normal = loop_z(total, min_count=min_group)
            else:
                normal = {r: minus_mean(r, total) if len(total) >= 2 else 0.0 for r in total}
            out |= {(s, r, t): normal[r] for (a, r, t) in cells if a == s}
        return out

    def immediate_level(scope):
        if scope == "batch":
            return loop_z(immediate)
        parts = [loop_z({c: v for c, v in immediate.items() if c[0] == s}) for s in range(S)]
        return parts[0] | parts[1]

    def turn_level():
        returns = {cell: future(*cell, discount) for cell in cells}
        return per_turn(returns, leave_one_out=leave_one_out)

    if name == "turn":
        out = turn_level()
    elif name == "batch":
        out = immediate_level(batch_scope)
    elif name == "mapo":
        one, other = turn_level(), immediate_level(batch_scope)
        out = {c: turn_weight * one[c] + (1 - turn_weight) * other[c] for c in cells}
    elif name == "grpo":
        out = outcome()
    elif name == "grpo_per_turn":
        out = per_turn(immediate)
    elif name == "reinforce_plus_plus":
        out = loop_z({cell: future(*cell, discount) for cell in cells})
    elif name == "rloo":
        out = outcome(
            lambda r, total: total[r] - sum(v for q, v in total.items() if q != r) / (len(total) - 1)
        )
    elif name == "dr_grpo":
        out = outcome(lambda r, total: total[r] - sum(total.values()) / len(total))
    elif name == "mt_grpo":
        local, whole = per_turn(immediate), outcome()
        out = {
            (s, r, t): whole[s, r, t]
            + (0 if t == length[s, r] - 1 else local[s, r, t] + (outcome_weight - 1) * whole[s, r, t])
            for (s, r, t) in cells
        }
    result = np.zeros(SHAPE)
    for cell, value in out.items():
        result[cell] = value
    return result


@every_variant
def test_every_estimator_against_a_plain_loop(name, options):
    for seed in range(25):
        rewards, valid, scored = random_dialogues(seed)
        expected = loop_estimate(name, rewards, valid, scored, **options)
        np.testing.assert_allclose(
            estimate(name, rewards, valid, scored, **options), expected, atol=2e-4, err_msg=f"seed {seed}"
        )  # float32 sums of ten numbers of size 10 against float64, divided by deviations down to 0.1


# --- By hand. ---


def test_turn_level_by_hand():
    """Two rollouts, discount 1/2. Returns: 3, 4, 4 and -1, -8; means 1, -2, 4; deviations 2, 6, 0."""
    rewards = np.array([[[1.0, 2.0, 4.0], [3.0, -8.0, NAN]]])
    valid = np.array([[[1, 1, 1], [1, 1, 0]]], bool)
    result = ESTIMATORS["turn"](rewards, valid, discount=0.5)
    np.testing.assert_allclose(result, [[[1, 1, 0], [-1, -1, 0]]], atol=1e-6)
    # The mean of the others instead: 3 - -1 = 4 over 2, 4 - -8 = 12 over 6; the deviation stays.
    result = ESTIMATORS["turn"](rewards, valid, discount=0.5, leave_one_out=True)
    np.testing.assert_allclose(result, [[[2, 2, 0], [-2, -2, 0]]], atol=1e-6)


def test_batch_level_and_the_mix_by_hand():
    """Rewards 1, 3, 5, 7: mean 4, deviation sqrt 5. Per scenario: means 2 and 6, deviation 1."""
    rewards = np.array([[[1.0], [3.0]], [[5.0], [7.0]]])
    valid = full(2, 2, 1)
    batch = np.array([[[-3.0], [-1.0]], [[1.0], [3.0]]]) / 5**0.5
    group = np.array([[[-1.0], [1.0]], [[-1.0], [1.0]]])
    np.testing.assert_allclose(ESTIMATORS["batch"](rewards, valid), batch, atol=1e-5)
    np.testing.assert_allclose(ESTIMATORS["batch"](rewards, valid, batch_scope="group"), group, atol=1e-5)
    mixed = ESTIMATORS["mapo"](rewards, valid)  # one turn: the turn level is the group's z-score
    np.testing.assert_allclose(mixed, group / 3 + 2 * batch / 3, atol=1e-5)


def test_outcome_baselines_by_hand():
    """Totals 6, 2 and 4 (a hole imputed by 2): mean 4, deviation sqrt(8/3)."""
    rewards = np.array([[[5.0, 1.0, NAN], [2.0, NAN, NAN], [2.0, NAN, NAN]]])
    valid = np.array([[[1, 1, 0], [1, 0, 0], [1, 1, 0]]], bool)
    scored = np.array([[[1, 1, 0], [1, 0, 0], [1, 0, 0]]], bool)
    expected = {
        "grpo": np.array([2, -2, 0]) / (8 / 3) ** 0.5,
        "dr_grpo": np.array([2, -2, 0]),
        "rloo": np.array([6 - 3, 2 - 5, 4 - 4]),
    }
    for name, per_rollout in expected.items():
        result = ESTIMATORS[name](rewards, valid, scored)
        np.testing.assert_allclose(result, per_rollout[None, :, None] * scored, atol=1e-5, err_msg=name)


def test_mt_grpo_by_hand():
    """Two rollouts of two turns and of one. Totals 5 and 1: grpo +-1. First turns 4 and 1: +-1."""
    rewards = np.array([[[4.0, 1.0], [1.0, NAN]]])
    valid = np.array([[[1, 1], [1, 0]]], bool)
    result = ESTIMATORS["mt_grpo"](rewards, valid, outcome_weight=0.5)
    # The last turn, second of one and first of the other, has the outcome term alone, with weight 1.
    np.testing.assert_allclose(result, [[[1 + 0.5, 1], [-1, 0]]], atol=1e-5)


def test_credit_crosses_turns():
    """Only the last turn is paid; the first turn gets credit for it through the return, and only there."""
    rewards = np.zeros((1, 2, 3), np.float32)
    rewards[0, 0, 2] = 1.0
    first = {name: ESTIMATORS[name](rewards, full(1, 2, 3))[0, :, 0] for name in ESTIMATORS}
    for name in ("mapo", "turn", "grpo", "reinforce_plus_plus", "rloo", "dr_grpo", "mt_grpo"):
        assert first[name][0] > first[name][1], name
    for name in ("batch", "grpo_per_turn"):
        assert first[name][0] == first[name][1], name


@pytest.mark.parametrize("rollouts", [3, 7])
@pytest.mark.parametrize("value", [0.1, -0.7, 1 / 3, 1e-3, 1234.56])
def test_equal_rewards_give_no_advantage(rollouts, value):
    """Binary fractions cannot hold these values, so that float32 deviations of equal ones are not 0."""
    rewards = np.full((1, rollouts, 3), value, np.float32)
    for name in ESTIMATORS:
        if name in ("reinforce_plus_plus", "rloo", "dr_grpo"):
            continue  # returns differ between turns; and without division there is nothing to blow up
        np.testing.assert_array_equal(ESTIMATORS[name](rewards, full(1, rollouts, 3)), 0.0, err_msg=name)


def test_equal_returns_from_unequal_rewards_give_no_advantage():
    """The returns agree but for rounding: 0.1 + 0.2 + 0.3 in another order."""
    rewards = np.array([[[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1]]], np.float32)
    assert not ESTIMATORS["turn"](rewards, full(1, 3, 3), discount=1.0)[0, :, 0].any()
    assert not ESTIMATORS["grpo"](rewards, full(1, 3, 3)).any()


def test_small_but_real_differences_count():
    rewards = np.array([[[1.0], [1.001]]], np.float32)
    np.testing.assert_allclose(
        ESTIMATORS["turn"](rewards, full(1, 2, 1))[0, :, 0], [-1, 1], atol=5e-3
    )  # the 1e-6 beside a deviation of 5e-4 takes off 0.2 %


def test_single_survivors_have_no_turn_level_but_a_batch_level():
    rewards = np.array([[[1.0, 5.0], [2.0, NAN], [4.0, NAN]]])
    valid = np.array([[[1, 1], [1, 0], [1, 0]]], bool)
    for options in ({}, {"leave_one_out": True}):
        assert ESTIMATORS["turn"](rewards, valid, **options)[0, 0, 1] == 0
    batch = ESTIMATORS["batch"](rewards, valid)[0, 0, 1]
    assert batch > 1
    np.testing.assert_allclose(ESTIMATORS["mapo"](rewards, valid)[0, 0, 1], 2 / 3 * batch, rtol=1e-6)


def test_min_group():
    rewards = np.array([[[1.0], [2.0]], [[1.0], [2.0]]])
    assert ESTIMATORS["turn"](rewards, full(2, 2, 1), min_group=2).all()
    assert not ESTIMATORS["turn"](rewards, full(2, 2, 1), min_group=3).any()


def test_a_hole_costs_one_discount_step_and_is_in_no_statistic():
    rewards = np.array([[[1.0, NAN, 3.0], [0.0, 0.0, 0.0]]])
    scored = np.array([[[1, 0, 1], [1, 1, 1]]], bool)
    valid = full(1, 2, 3)
    # Imputed by 2: G_0 = 1 + 2/2 + 3/4 = 2.75 against 0; the second turn has one scored rollout: 0.
    np.testing.assert_allclose(
        ESTIMATORS["turn"](rewards, valid, scored, discount=0.5), [[[1, 0, 1], [-1, 0, -1]]], atol=1e-5
    )
    observed = ESTIMATORS["batch"](rewards, valid, scored)  # over 1, 3, 0, 0, 0: mean 0.8
    deviation = (sum((x - 0.8) ** 2 for x in (1, 3, 0, 0, 0)) / 5) ** 0.5
    np.testing.assert_allclose(observed[0, 0], [0.2 / deviation, 0, 2.2 / deviation], atol=1e-5)


def test_self_inclusion_shrinks_by_its_share():
    """A mean that includes x_i leaves (1 - 1/n) of its distance to the others' mean."""
    values = np.random.default_rng(0).normal(size=(1, 5, 1)).astype(np.float32)
    included = advantages.centre(values, full(1, 5, 1), (1,))
    left_out = advantages.centre(values, full(1, 5, 1), (1,), leave_one_out=True)
    np.testing.assert_allclose(included, left_out * (1 - 1 / 5), atol=1e-6)
    others = [values[0, i, 0] - np.delete(values[0, :, 0], i).mean() for i in range(5)]
    np.testing.assert_allclose(left_out[0, :, 0], others, atol=1e-6)


# --- Properties. ---


@every_variant
def test_nothing_outside_the_masks_has_influence(name, options):
    def weighted(rewards, valid, scored, weight):
        return (ESTIMATORS[name](rewards, valid, scored, **options) * weight).sum()

    slope = jax.jit(jax.grad(weighted))
    weight = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    for seed in range(8):
        rewards, valid, scored = random_dialogues(seed)
        clean = np.where(scored, rewards, 0)
        expected = estimate(name, clean, valid, scored, **options)
        assert not expected[~scored].any()
        for other in (NAN, np.inf, 1e30, -7.0):
            dirty = np.where(scored, rewards, np.float32(other))
            np.testing.assert_array_equal(estimate(name, dirty, valid, scored, **options), expected)
        gradient = slope(np.where(scored, rewards, np.float32(NAN)), valid, scored, weight)
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient)[~scored].any()


@few
@given(seeds)
def test_weights_of_one_and_zero_reduce_to_the_parts(seed):
    data = random_dialogues(seed)
    np.testing.assert_array_equal(estimate("mapo", *data, turn_weight=1.0), estimate("turn", *data))
    np.testing.assert_array_equal(estimate("mapo", *data, turn_weight=0.0), estimate("batch", *data))


@few
@given(seeds, st.floats(-5, 5, width=32))
def test_a_constant_on_one_turn_leaves_the_turn_level_alone(seed, constant):
    """Where all rollouts have equal length: a turn that pays everybody more says nothing about anybody."""
    rewards, _, _ = random_dialogues(seed)
    raised = rewards.copy()
    raised[..., seed % T] += np.float32(constant)
    np.testing.assert_allclose(
        estimate("turn", raised, full(*SHAPE)), estimate("turn", rewards, full(*SHAPE)), atol=2e-3
    )  # rounding of returns up to 30, seen through deviations down to a few hundredths


@every_variant
def test_permuted_dialogues_have_permuted_advantages(name, options):
    for seed in range(8):
        rewards, valid, scored = random_dialogues(seed)
        rng = np.random.default_rng(seed)
        order = np.ix_(rng.permutation(S), rng.permutation(R), np.arange(T))
        np.testing.assert_allclose(
            estimate(name, rewards[order], valid[order], scored[order], **options),
            estimate(name, rewards, valid, scored, **options)[order],
            atol=2e-4,  # sums in another order
        )


@few
@given(seeds)
def test_the_turn_level_has_mean_zero_and_deviation_one_in_every_cell(seed):
    rewards, valid, scored = random_dialogues(seed)
    result = estimate("turn", rewards, valid, scored)
    for s in range(S):
        for t in range(T):
            cell = result[s, scored[s, :, t], t]
            if len(cell) > 1:
                assert abs(cell.mean()) < 1e-3
                assert cell.std() == pytest.approx(1, abs=1e-3)


@few
@given(seeds, st.floats(0.25, 8, width=32), st.floats(-4, 4, width=32))
def test_batch_level_ignores_scale_and_offset_of_the_rewards(seed, scale, offset):
    rewards, valid, scored = random_dialogues(seed)
    np.testing.assert_allclose(
        estimate("batch", rewards * scale + offset, valid, scored),
        estimate("batch", rewards, valid, scored),
        atol=1e-3,
    )


@few
@given(seeds)
def test_scored_defaults_to_every_valid_turn(seed):
    rewards, valid, _ = random_dialogues(seed)
    np.testing.assert_allclose(
        ESTIMATORS["mapo"](rewards, valid), estimate("mapo", rewards, valid, valid), atol=1e-5
    )


# --- The table, and the door. ---


def test_the_table_is_the_configuration_s():
    assert tuple(ESTIMATORS) == get_args(config.Estimator)
    for name in ESTIMATORS:
        section = config.AlgorithmConfig(estimator=name, discount=0.5, turn_weight=0.25)
        options = advantages.estimator_options(section)
        estimate(name, *random_dialogues(0), **options)  # takes them all
    options = advantages.estimator_options(config.AlgorithmConfig())
    assert options == {
        "discount": 0.85,
        "turn_weight": 1 / 3,
        "batch_scope": "batch",
        "leave_one_out": False,
    }


def test_defaults_of_configuration_and_estimators_agree():
    for name in ESTIMATORS:
        options = advantages.estimator_options(config.AlgorithmConfig(estimator=name))
        data = random_dialogues(3)
        np.testing.assert_array_equal(estimate(name, *data, **options), estimate(name, *data))


def test_what_is_refused():
    rewards, valid, _ = random_dialogues(0)
    with pytest.raises(TypeError, match="turn_weight"):
        ESTIMATORS["grpo"](rewards, valid, turn_weight=0.5)
    with pytest.raises(ValueError, match="batch_scope"):
        ESTIMATORS["batch"](rewards, valid, batch_scope="world")
    with pytest.raises(ValueError, match="scenarios, rollouts, turns"):
        ESTIMATORS["mapo"](rewards[0], valid[0])
    with pytest.raises(ValueError, match="does not fit"):
        ESTIMATORS["mapo"](rewards, valid[:, :, :2])
    with pytest.raises(ValueError, match="boolean"):
        ESTIMATORS["mapo"](rewards, valid.astype(np.float32))
