"""A small policy over kinds of reply, and one step of its training with the project's own algorithm.

The policy is a softmax over `REPLIES`, linear in `FEATURES`: what a reader of the dialogue could know without
the card. It starts like the speaker of mixed quality of whom the warm start learns.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from experiments import strategy_world as world
from mapo_jax.algorithm.advantages import ESTIMATORS, estimator_options
from mapo_jax.algorithm.objective import objective_options, policy_loss
from mapo_jax.algorithm.rewards import REWARDS, distance
from mapo_jax.config import AlgorithmConfig
from mapo_jax.environment.scripted.grammar import KINDS
from mapo_jax.environment.scripted.helper import RANDOM_ACTS

PAIRS = (
    ("reflect_situation", "name_feeling"),
    ("name_unstated", "reflect_situation"),
    ("name_unstated", "name_feeling"),
    ("reframe", "affirm_strength"),
    ("offer_step", "affirm_strength"),
    ("offer_step", "name_feeling"),
    ("offer_step", "reflect_situation"),
)
REPLIES = (*((kind,) for kind in KINDS), *PAIRS)
ACTS = jnp.array([world.bits(*reply) for reply in REPLIES])

_MESSAGE = ("curt", "particular", "two particulars", "feeling", "hint", "value", "strength", "step")
_MEMORY = ("harmed", "heard", "deep", "feeling said", "hint said", "situation named", "both named")
_NAMED = ("feeling named", "unstated named", "strength named", "value named", "step named")
_RECENT = (
    *(f"last {kind}" for kind in KINDS),
    *(f"before {kind}" for kind in KINDS),
    *(f"earlier {kind}" for kind in KINDS),
)
FEATURES = ("bias", *_MESSAGE, *_MEMORY, *_NAMED, "turn", "stage", *_RECENT)


def observe(state: world.State) -> Float[Array, " F"]:
    """`FEATURES` of a dialogue that awaits a reply."""
    s, message, done = state, state.message, state.credited

    def several(mask):
        return (mask & (mask - 1)) > 0

    flags = (
        True,
        *(s.curt, message.particulars > 0, several(message.particulars), message.feeling, message.hint),
        *(message.value, message.strengths > 0, message.steps > 0),
        *(
            s.harmed,
            s.heard,
            s.deep,
            s.said_feeling,
            s.said_hint,
            done.situation > 0,
            several(done.situation),
        ),
        *(done.feeling, done.unstated, done.strengths > 0, done.value, done.steps > 0),
        *(s.turn / 8, s.stage / 3),
    )
    places = jnp.arange(len(KINDS))

    def spread(mask):
        return ((mask >> places) & 1).astype(jnp.float32)

    earlier = sum(map(spread, s.kinds[2:]))
    return jnp.concatenate(
        [jnp.stack([jnp.float32(flag) for flag in flags]), spread(s.kinds[0]), spread(s.kinds[1]), earlier]
    )


def start_weights() -> Float[Array, "F A"]:
    """Weights of the policy before training: mixed acts, with a leaning towards what suits the message."""
    weights = np.zeros((len(FEATURES), len(REPLIES)), np.float32)
    cues = {"curt": "repair", "hint": "name_unstated", "value": "reframe", "step": "offer_step"}
    for i, reply in enumerate(REPLIES):
        weights[0, i] = math.log(min(RANDOM_ACTS[kind] for kind in reply))
        for cue, kind in cues.items():
            weights[FEATURES.index(cue), i] = float(kind in reply)
    return jnp.asarray(weights)


class Batch(NamedTuple):
    """The dialogues of one step."""

    features: Float[Array, "S R T F"]
    replies: Int[Array, "S R T"]
    logprobs: Float[Array, "S R T"]
    valid: Bool[Array, "S R T"]
    positions: Float[Array, "S R T+1 3"]  # by the judge
    true_positions: Float[Array, "S R T+1 3"]  # without the judge's noise
    harmful: Bool[Array, "S R T"]  # the reply did harm, by the levels without noise


def sample(
    weights: Float[Array, "F A"], state: world.State, uniform: Float[Array, ""]
) -> tuple[Float[Array, " F"], Int[Array, ""], Float[Array, ""]]:
    """Features, a reply drawn from the policy, and its log-probability."""
    features = observe(state)
    logprobs = jax.nn.log_softmax(features @ weights)
    reply = jnp.sum(jnp.cumsum(jnp.exp(logprobs)) < uniform)
    reply = jnp.minimum(reply, len(REPLIES) - 1)
    return features, reply, logprobs[reply]


class Noise(NamedTuple):
    """All random numbers of some dialogues."""

    uniform: Float[Array, " T *N"]  # of the policy
    world: world.Draws  # leading axes [T, *N]


def draw_noise(key: Array, turns: int, shape: tuple[int, ...], rules: world.Rules) -> Noise:
    """Random numbers for `turns` turns of dialogues of this shape."""
    keys = jax.random.split(key, 3)
    words = jax.random.bits(keys[0], (3, turns, *shape)) >> 8
    names, levels = (len(KINDS) if rules.naming_error else 0), (6 if rules.judge_noise else 0)
    draws = world.Draws(
        words[0].astype(jnp.int32),
        words[1] * jnp.float32(2**-24),
        jax.random.uniform(keys[1], (turns, *shape, names)),
        jax.random.normal(keys[2], (turns, *shape, levels)),
    )
    return Noise(words[2] * jnp.float32(2**-24), draws)


def converse(
    weights: Float[Array, "F A"], states: world.State, noise: Noise, rules: world.Rules
) -> tuple[Batch, world.State]:
    """Dialogues from these states on, as many turns as there is noise for.

    Args:
      weights: of the policy.
      states: leading axes of any shape.
      noise: random numbers.
      rules: switches of the world.

    Returns:
      The dialogues, and the states that each turn's reply met, with leading axes [T, ...].
    """
    depth = states.turn.ndim

    def over(function):
        for _ in range(depth):
            function = jax.vmap(function)
        return function

    def one(state, uniform, draws):
        features, reply, logprob = sample(weights, state, uniform)
        after = world.take_turn(state, ACTS[reply], draws, rules)
        return features, reply, logprob, after

    def step(states, noise):
        features, replies, logprobs, after = over(one)(states, noise.uniform, noise.world)
        alive = states.outcome == world.RUNNING
        row = (features, replies, logprobs, alive, after.position, after.true_position, after.harmed)
        return after, (row, states)

    _, ((features, replies, logprobs, valid, positions, true_positions, harmful), met) = jax.lax.scan(
        step, states, noise
    )

    def last(values):
        return jnp.moveaxis(values, 0, depth)

    def with_start(start, values):
        return jnp.concatenate([start[..., None, :], last(values)], axis=-2)

    batch = Batch(
        last(features),
        last(replies),
        last(logprobs),
        last(valid),
        with_start(states.position, positions),
        with_start(states.true_position, true_positions),
        last(harmful),
    )
    return batch, met


def true_returns(batch: Batch) -> Float[Array, " *N"]:
    """By how much each dialogue lowered the user's distance, without the judge's noise."""
    steps = -jnp.diff(distance(batch.true_positions), axis=-1)
    return jnp.sum(jnp.where(batch.valid, steps, 0.0), axis=-1)


def rewards_of(batch: Batch, config: AlgorithmConfig) -> Float[Array, "S R T"]:
    """The configured reward of each turn, by the judge's levels."""
    return REWARDS[config.reward](batch.positions)


def advantages_of(
    rewards: Float[Array, "S R T"], valid: Bool[Array, "S R T"], config: AlgorithmConfig, rescale: bool
) -> Float[Array, "S R T"]:
    """The configured advantages; with `rescale` divided by their root mean square over the batch."""
    advantages = ESTIMATORS[config.estimator](rewards, valid, **estimator_options(config))
    if not rescale:
        return advantages
    spread = jnp.sqrt(jnp.sum(advantages**2) / jnp.maximum(jnp.sum(valid), 1))
    return advantages / jnp.maximum(spread, 1e-6)


def gradient(
    weights: Float[Array, "F A"], batch: Batch, advantages: Float[Array, "S R T"], config: AlgorithmConfig
) -> tuple[Float[Array, "F A"], dict[str, Array]]:
    """Gradient of the project's objective, a turn being one token, and its metrics."""
    rows = (-1, batch.replies.shape[-1])
    mask = batch.valid.reshape(rows)

    def loss(weights):
        logits = jax.nn.log_softmax(batch.features @ weights)
        chosen = jnp.take_along_axis(logits, batch.replies[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logits) * logits, axis=-1)
        return policy_loss(
            chosen.reshape(rows),
            batch.logprobs.reshape(rows),
            advantages.reshape(rows),
            mask,
            entropy=entropy.reshape(rows),
            **objective_options(config),
        )

    (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(weights)
    return gradients, metrics
