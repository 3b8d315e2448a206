"""Which estimators estimate the policy gradient: a tiny stochastic dialogue, enumerated exactly.

In every turn the policy either pushes (with the probability sigmoid(logit of the turn)) or listens. A push
ends the dialogue with a probability, so the policy has a hand in how long the dialogue lasts. All dialogues
are enumerated, and all groups of three of them, each weighted by its probability: the expectations here are
sums, without Monte Carlo error. Groups are the "scenarios" of one large batch, since the turn-level
statistics are those of one scenario.
"""

import functools
import itertools
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from mapo_jax.algorithm import advantages
from mapo_jax.algorithm.returns import discounted_returns

R, T = 3, 3
LOGITS = np.array([0.3, -0.4, 0.8])


@dataclass(frozen=True)
class World:
    """Reward of a push and of listening per turn, and how often a push ends the dialogue."""

    push: tuple[float, float, float] = (2.0, 1.0, -1.0)
    listen: tuple[float, float, float] = (0.5, 1.5, 3.0)
    ends: float = 0.4


@functools.cache
def dialogues(world):
    """Every dialogue as (probability, pushes, rewards)."""
    policy = 1 / (1 + np.exp(-LOGITS))

    def go_on(turn):
        if turn == T:
            return [(1.0, (), ())]
        found = []
        for pushes in (True, False):
            chance = policy[turn] if pushes else 1 - policy[turn]
            reward = (world.push if pushes else world.listen)[turn]
            ends = world.ends if pushes and turn < T - 1 else 0.0
            if ends:
                found.append((chance * ends, (pushes,), (reward,)))
            for later, actions, rewards in go_on(turn + 1):
                found.append((chance * (1 - ends) * later, (pushes, *actions), (reward, *rewards)))
        return found

    return go_on(0)


@functools.cache
def groups(world):
    """All groups of R dialogues: probability [S], score function, rewards and valid [S, R, T]."""
    everything = dialogues(world)
    rewards, scores = np.zeros((len(everything), T)), np.zeros((len(everything), T))
    valid = np.zeros((len(everything), T), bool)
    policy = 1 / (1 + np.exp(-LOGITS))
    for i, (_, pushes, paid) in enumerate(everything):
        for t, (pushed, reward) in enumerate(zip(pushes, paid, strict=True)):
            scores[i, t] = pushed - policy[t]  # d log pi / d logit
            rewards[i, t], valid[i, t] = reward, True
    chosen = np.array(list(itertools.product(range(len(everything)), repeat=R)))
    chance = np.array([dialogue[0] for dialogue in everything])[chosen].prod(axis=1)
    return chance, scores[chosen], rewards[chosen], valid[chosen]


def expected_return(world, logits):
    """J, by recursion over the turns: no dialogue is enumerated here."""
    value = 0.0
    for t in reversed(range(T)):
        policy = 1 / (1 + np.exp(-logits[t]))
        goes_on = 1 - world.ends if t < T - 1 else 1.0
        value = policy * (world.push[t] + goes_on * value) + (1 - policy) * (world.listen[t] + value)
    return value


def true_gradient(world):
    """dJ / d logits by central differences of the recursion."""
    steps = np.eye(T) * 1e-5
    return np.array(
        [(expected_return(world, LOGITS + h) - expected_return(world, LOGITS - h)) / 2e-5 for h in steps]
    )


def alive(world):
    """Probability that a dialogue reaches each turn."""
    reach = np.zeros(T)
    for chance, pushes, _ in dialogues(world):
        reach[: len(pushes)] += chance
    return reach


def estimated_gradient(world, estimator):
    """E[sum_t d log pi(a_t) A_t] of one rollout: over all groups, the mean of their rollouts."""
    chance, scores, rewards, valid = groups(world)
    values = np.asarray(jax.jit(estimator)(rewards, valid), np.float64)
    return np.einsum("s,srt->t", chance, scores * values) / R


def centred_return(rewards, valid, leave_one_out):
    returns = discounted_returns(rewards, valid, 1.0)
    return advantages.centre(returns, valid, advantages.ROLLOUTS, leave_one_out=leave_one_out)


def normalised_return(rewards, valid):
    return advantages.turn(rewards, valid, discount=1.0)


def accumulated_normal_rewards(rewards, valid):
    """The other order: normalise the immediate rewards per turn, then accumulate."""
    return discounted_returns(advantages.grpo_per_turn(rewards, valid), valid, 1.0)


def test_the_enumeration_is_complete():
    world = World()
    assert sum(dialogue[0] for dialogue in dialogues(world)) == pytest.approx(1)
    assert groups(world)[0].sum() == pytest.approx(1)
    mean = sum(chance * sum(paid) for chance, _, paid in dialogues(world))
    assert mean == pytest.approx(expected_return(world, LOGITS))
    plain = estimated_gradient(world, lambda r, v: discounted_returns(r, v, 1.0))  # REINFORCE, no baseline
    np.testing.assert_allclose(plain, true_gradient(world), atol=1e-5)


def test_leave_one_out_centring_of_the_return_is_unbiased():
    """In the first turn, which every rollout has, exactly. In later turns a rollout that is alone has no
    baseline and is left out; with that happening with probability q, independently of its own action, the
    expectation is (1 - q) times the gradient: right in every cell that has company.
    """
    world = World()
    estimate = estimated_gradient(world, lambda r, v: centred_return(r, v, leave_one_out=True))
    alone = (1 - alive(world)) ** (R - 1)
    assert alone[0] == 0 and alone[2] > 0.01
    np.testing.assert_allclose(estimate, (1 - alone) * true_gradient(world), atol=1e-5)


def test_a_mean_that_includes_the_rollout_itself_shrinks_sparse_turns():
    """By 1 - 1/n for n rollouts alive: 2/3 in the first turn, less and less company afterwards."""
    world = World()
    estimate = estimated_gradient(world, lambda r, v: centred_return(r, v, leave_one_out=False))
    reach = alive(world)
    shrinks = [
        sum(
            count * reached**others * (1 - reached) ** (2 - others) * others / (others + 1)
            for others, count in enumerate((1, 2, 1))
        )
        for reached in reach
    ]
    assert shrinks[0] == pytest.approx(2 / 3) and shrinks[2] < 0.55
    np.testing.assert_allclose(estimate, np.array(shrinks) * true_gradient(world), atol=1e-5)


def test_leave_one_out_totals_are_unbiased_too():
    """RLOO credits every turn with the whole total: the rewards before a turn add noise, no bias."""
    world = World()
    np.testing.assert_allclose(estimated_gradient(world, advantages.rloo), true_gradient(world), atol=1e-5)


def test_dividing_by_the_deviation_rescales_every_cell():
    """Ten times the rewards have ten times the gradient; divided by the deviation, they have the same. And
    within one world the turns are rescaled by different factors, so that not even the direction stands.
    """
    world = World()
    tenfold = World(push=tuple(10 * r for r in world.push), listen=tuple(10 * r for r in world.listen))
    truth, estimate = true_gradient(world), estimated_gradient(world, normalised_return)
    np.testing.assert_allclose(true_gradient(tenfold), 10 * truth, rtol=1e-6)
    np.testing.assert_allclose(estimated_gradient(tenfold, normalised_return), estimate, atol=1e-4)
    factors = estimate / truth
    assert (factors > 0).all()
    assert factors.max() > 1.5 * factors.min()


def test_normalising_rewards_first_loses_the_gradient():
    """Every turn pays 1 whatever is said, so all that counts is not to end the dialogue. Immediate rewards
    are equal in every cell, normalise to 0, and accumulate to 0. Returns differ, and tell.
    """
    world = World(push=(1.0, 1.0, 1.0), listen=(1.0, 1.0, 1.0), ends=0.5)
    truth = true_gradient(world)
    assert (truth[:2] < -0.05).all()
    np.testing.assert_array_equal(estimated_gradient(world, accumulated_normal_rewards), 0)
    assert (estimated_gradient(world, normalised_return)[:2] < -0.05).all()
    estimate = estimated_gradient(world, lambda r, v: centred_return(r, v, leave_one_out=True))
    np.testing.assert_allclose(estimate, (1 - (1 - alive(world)) ** (R - 1)) * truth, atol=1e-5)


def test_normalising_rewards_first_can_turn_the_gradient_round():
    """A push pays a little more at once and often ends the dialogue: the true gradient is against it."""
    world = World(push=(1.2, 1.2, 1.2), listen=(1.0, 1.0, 1.0), ends=0.5)
    assert (true_gradient(world)[:2] < 0).all()
    assert (estimated_gradient(world, accumulated_normal_rewards)[:2] > 0).all()
    assert (estimated_gradient(world, normalised_return)[:2] < 0).all()


def test_a_sampled_estimate_agrees_with_the_enumeration():
    """The same by sampling, as training does it: within four standard errors of the exact value."""
    world = World()
    chance, scores, rewards, valid = groups(world)
    picked = np.random.default_rng(0).choice(len(chance), 20_000, p=chance)
    values = np.asarray(centred_return(rewards, valid, leave_one_out=True))
    samples = (scores * values).mean(axis=1)[picked]
    error = samples.std(axis=0) / len(samples) ** 0.5
    exact = (1 - (1 - alive(world)) ** (R - 1)) * true_gradient(world)
    assert (np.abs(samples.mean(axis=0) - exact) < 4 * error).all()
