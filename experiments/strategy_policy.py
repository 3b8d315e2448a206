"""A small policy over kinds of reply, and one step of its training with the project's own algorithm.

The policy is a softmax over `REPLIES`, linear in `FEATURES`: what a reader of the dialogue could know without
the card. It starts like the speaker of mixed quality of whom the warm start learns.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from experiments import strategy_world as world
from mapo_jax.algorithm.advantages import ESTIMATORS, estimator_options
from mapo_jax.algorithm.objective import policy_loss
from mapo_jax.algorithm.rewards import distance
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

CUE = 3.0  # leaning of the first weights towards the act that suits a message

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
            weights[FEATURES.index(cue), i] = CUE * (kind in reply)
    return jnp.asarray(weights)


class Batch(NamedTuple):
    """Dialogues of several models. Leading axes: M settings, K seeds, N dialogues."""

    features: Float[Array, "M K N T F"]
    replies: Int[Array, "M K N T"]
    logprobs: Float[Array, "M K N T"]
    valid: Bool[Array, "M K N T"]
    positions: Float[Array, "M K N T+1 3"]  # by the judge
    true_positions: Float[Array, "M K N T+1 3"]  # without the judge's noise
    harmful: Bool[Array, "M K N T"]  # the reply did harm, by the levels without noise


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
    """All random numbers of one turn."""

    uniform: Float[Array, "*N"]  # of the policy
    world: world.Draws


@partial(jax.jit, static_argnames=("shape", "rules"))
def draw_noise(key: Array, shape: tuple[int, ...], rules: world.Rules) -> Noise:
    """Random numbers for a turn of dialogues of this shape."""
    keys = jax.random.split(key, 3)
    words = jax.random.bits(keys[0], (3, *shape)) >> 8
    names, levels = (len(KINDS) if rules.naming_error else 0), (6 if rules.judge_noise else 0)
    draws = world.Draws(
        words[0].astype(jnp.int32),
        words[1] * jnp.float32(2**-24),
        jax.random.uniform(keys[1], (*shape, names)),
        jax.random.normal(keys[2], (*shape, levels)),
    )
    return Noise(words[2] * jnp.float32(2**-24), draws)


def _take_turn(state, weights, noise, rules):
    features, reply, logprob = sample(weights, state, noise.uniform)
    after = world.take_turn(state, ACTS[reply], noise.world, rules)
    alive = state.outcome == world.RUNNING
    return after, (features, reply, logprob, alive, after.position, after.true_position, after.harmed)


def _over_models(function):
    """Of one dialogue (state, weights, noise, ...) -> of [M, K, N]; the settings share the noise [K, N]."""
    for axes in ((0, None, 0, None), (0, 0, 0, None), (0, 0, None, None)):
        function = jax.vmap(function, axes)
    return function


take_turns = jax.jit(_over_models(_take_turn))
"""One turn of dialogues [M, K, N]: (states, weights, noise, rules) -> states, the columns of a `Batch`."""


def _force_turn(state, reply, noise, rules):
    after = world.take_turn(state, ACTS[reply], noise.world, rules)
    alive = state.outcome == world.RUNNING
    return after, (alive, after.position, after.true_position)


force_turns = jax.jit(
    jax.vmap(jax.vmap(jax.vmap(_force_turn, (0, 0, 0, None)), (0, 0, 0, None)), (0, 0, None, None))
)
"""One turn with given replies [M, K, N]: -> states, (valid, positions, true positions) of the turn."""


def converse(
    weights: Float[Array, "M K F A"],
    states: world.State,
    key: Array,
    rules: world.Rules,
    turns: int,
) -> tuple[Batch, list[world.State]]:
    """Dialogues from these states on.

    Args:
      weights: of the policies.
      states: [M, K, N]; they await a reply.
      key: of the random numbers, which the settings M share.
      rules: switches of the world.
      turns: how many turns are taken; those after a dialogue's end are not valid.

    Returns:
      The dialogues, and the states that each turn's reply met.
    """
    met, rows, start = [], [], states
    for turn in range(turns):
        noise = draw_noise(jax.random.fold_in(key, turn), states.turn.shape[1:], rules)
        met.append(states)
        states, row = take_turns(states, weights, noise, rules)
        rows.append(row)
    return _stack(rows, start.position, start.true_position), met


@jax.jit
def _stack(rows, position, true_position) -> Batch:
    features, replies, logprobs, valid, positions, true_positions, harmful = zip(*rows, strict=True)
    return Batch(
        jnp.stack(features, axis=-2),
        jnp.stack(replies, axis=-1),
        jnp.stack(logprobs, axis=-1),
        jnp.stack(valid, axis=-1),
        jnp.stack((position, *positions), axis=-2),
        jnp.stack((true_position, *true_positions), axis=-2),
        jnp.stack(harmful, axis=-1),
    )


def true_returns(batch: Batch) -> Float[Array, " *N"]:
    """By how much each dialogue lowered the user's distance, without the judge's noise."""
    steps = -jnp.diff(distance(batch.true_positions), axis=-1)
    return jnp.sum(jnp.where(batch.valid, steps, 0.0), axis=-1)


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
    weights: Float[Array, "F A"], batch: Batch, advantages: Float[Array, "N T"], options: dict[str, Any]
) -> Float[Array, "F A"]:
    """Gradient of the project's objective of one model; a dialogue is a row, a turn a token.

    Args:
      weights: of the policy.
      batch: its dialogues [N, T].
      advantages: of every turn.
      options: of `objective.policy_loss`.
    """

    def loss(weights):
        logprobs = jax.nn.log_softmax(batch.features @ weights)
        chosen = jnp.take_along_axis(logprobs, batch.replies[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return policy_loss(chosen, batch.logprobs, advantages, batch.valid, entropy=entropy, **options)[0]

    return jax.grad(loss)(weights)
