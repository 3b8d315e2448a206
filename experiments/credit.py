"""How well the advantage of a turn measures what the turn really did.

    python experiments/credit.py [--world NAME ...] [--folder runs/credit] [--json FILE] [--quick]

The true effect of a reply is found by branching the world from its turn: the expected remaining return if it
is given, minus the expected remaining return of the policy's average reply there, both under the current
policy, without the judge's noise, and with random numbers of their own. An estimator's advantage for that
turn is computed from many other re-draws of everything from the turn on, with the judge's noise and together
with the other rollouts of its batch. So the target shares no random number with the estimate. For each
estimator:

  correlation  of one advantage with the effect (corrected for the target's remaining error)
  systematic   the same for the mean over the re-draws: 1 if only noise separates the two
  bias         share of the effect's variance that the mean, scaled at its best, gets wrong
  variance     share of it that the scatter over the re-draws adds; 1 - correlation^2 = bias + variance
  gradient     cosine between the batch's policy gradients with the mean advantages and with the effects

They are computed for each of several policies, early (after EARLY_STEPS steps) and late (after all steps),
for all turns and for the first, middle and last third of the dialogue. Files and options as in
`experiments/lab.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from experiments import lab
from experiments import strategy_policy as policy
from experiments import strategy_world as world
from experiments.records import circumstances, read_json, rounded, write_json
from mapo_jax.algorithm.rewards import distance
from mapo_jax.commands import prepare_jax
from mapo_jax.config import AlgorithmConfig
from mapo_jax.environment.scenario import load_scenarios

EARLY_STEPS = 3
STAGES = ("early", "late")
WORLDS = (
    "base",
    "horizon 4",
    "horizon 20",
    "noise 1",
    "noise 2",
    "rollouts 2",
    "rollouts 16",
    "no delayed effects",
    "trap",
)
ESTIMATORS = {label: AlgorithmConfig(**fields) for label, fields in (*lab.CORE, *lab.OTHERS)}
POSITIONS = ("all", "first third", "middle third", "last third")


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    policies: int = 24
    branches: int = 64
    steps: int = lab.Size.steps


def policies(place: lab.World, stage: str, size: Size):
    """Weights [1, K, F, A] of policies that `turn` has trained with its middle learning rate."""
    turn = next(s for s in lab.settings_of(lab.CORE, place) if (s.label, s.rate) == ("turn", 0.1))
    steps = EARLY_STEPS if stage == "early" else size.steps
    return lab.train(place, [turn], lab.Size(size.policies, size.steps), min(steps, size.steps))[0]


@partial(jax.jit, static_argnames="count")
def multiply(states: world.State, count: int) -> world.State:
    """Every dialogue `count` times: [1, K, N] -> [1, K, count * N]."""
    return jax.tree.map(lambda x: jnp.concatenate([x] * count, axis=2), states)


def quiet(states: world.State) -> world.State:
    """The dialogues as a judge without noise has seen them."""
    return states._replace(position=states.true_position)


def branch(weights, states, replies, key, rules, turns):
    """Positions [1, K, N, turns + 1, 3], true positions and masks of dialogues that begin with these replies.

    `replies`: of the first turn; None: drawn from the policy.
    """
    if replies is None:
        batch, _ = policy.converse(weights, states, key, rules, turns)
        return batch.positions, batch.true_positions, batch.valid
    noise = policy.draw_noise(jax.random.fold_in(key, 0), states.turn.shape[1:], rules)
    after, (alive, position, true_position) = policy.force_turns(states, replies, noise, rules)
    rows = [(alive, position, true_position)]
    for turn in range(1, turns):
        noise = policy.draw_noise(jax.random.fold_in(key, turn), states.turn.shape[1:], rules)
        after, row = policy.take_turns(after, weights, noise, rules)
        rows.append(row[3:6])
    valid, positions, true_positions = (jnp.stack(columns, axis=3) for columns in zip(*rows, strict=True))
    return (
        jnp.concatenate([states.position[:, :, :, None], positions], axis=3),
        jnp.concatenate([states.true_position[:, :, :, None], true_positions], axis=3),
        valid,
    )


def remaining_return(true_positions, valid):
    """Undiscounted true return of the branches."""
    return jnp.sum(jnp.where(valid, -jnp.diff(distance(true_positions), axis=-1), 0.0), axis=-1)


@partial(jax.jit, static_argnames="rollouts")
def estimates(rewards, valid, turn, rollouts):
    """Advantages of one turn by every estimator: [K, B, N, T] -> [E, K, B, N]."""

    def one(rewards, valid, config):
        shape = (rewards.shape[0] // rollouts, rollouts, rewards.shape[1])
        advantages = policy.advantages_of(rewards.reshape(shape), valid.reshape(shape), config, rescale=False)
        return jnp.take(advantages.reshape(rewards.shape), turn, axis=-1)

    return jnp.stack(
        [jax.vmap(jax.vmap(partial(one, config=config)))(rewards, valid) for config in ESTIMATORS.values()]
    )


def measure(place: lab.World, weights, size: Size, seed: int = 7) -> dict[str, np.ndarray]:
    """Advantages and effects of every turn of a batch of each policy.

    Returns:
      `mean`, `scatter` [E, K, N, T]: mean and variance of the advantages over the re-draws; `effects`
      [2, K, N, T]: two independent estimates of the true effect; `valid` [K, N, T]; `features`, `replies`.
    """
    rules, turns, seeds = place.rules, place.rules.max_turns, weights.shape[1]
    key = jax.random.key(seed)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(seeds))
    cards = world.cards(load_scenarios(split="train"))
    picks = lab.pick_cards(keys, 0, cards.axis.shape[0], lab.DIALOGUES // place.rollouts)
    states = lab.begin_dialogues(cards, picks, 1, place.rollouts, rules)
    batch, met = policy.converse(weights, states, key, rules, turns)
    rewards = -jnp.diff(distance(batch.positions), axis=-1)[0]
    dialogues, count = rewards.shape[1], size.branches
    silent = replace(rules, judge_noise=0.0)

    def spread(values):
        """[K, N, ...] -> [K, B, N, ...]: the same for every branch."""
        return jnp.broadcast_to(values[:, None], (values.shape[0], count, *values.shape[1:]))

    columns: dict[str, list[np.ndarray]] = {"mean": [], "scatter": [], "effects": []}
    for turn in range(turns):
        here = multiply(met[turn], count)
        replies = jnp.tile(batch.replies[..., turn], (1, 1, count))
        left = turns - turn
        positions, _, valid = branch(
            weights, here, replies, jax.random.fold_in(key, 3 * turn + 1), rules, left
        )
        redrawn = -jnp.diff(distance(positions), axis=-1)[0].reshape(seeds, count, dialogues, left)
        whole = jnp.concatenate([spread(rewards[..., :turn]), redrawn], axis=-1)
        mask = valid[0].reshape(seeds, count, dialogues, left)
        mask = jnp.concatenate([spread(batch.valid[0, ..., :turn]), mask], axis=-1)
        advantages = np.asarray(estimates(whole, mask, turn, place.rollouts))
        columns["mean"].append(advantages.mean(axis=2))
        columns["scatter"].append(advantages.var(axis=2, ddof=1))

        fresh = jax.random.fold_in(key, 3 * turn + 2)  # of both branches, which differ in the first reply
        given, average = (
            remaining_return(*branch(weights, quiet(here), reply, fresh, silent, left)[1:])
            for reply in (replies, None)
        )
        halves = np.asarray(given - average)[0].reshape(seeds, 2, count // 2, dialogues).mean(axis=2)
        columns["effects"].append(np.moveaxis(halves, 1, 0))
    return {name: np.stack(values, axis=-1) for name, values in columns.items()} | {
        "valid": np.asarray(batch.valid[0]),
        "features": np.asarray(batch.features[0]),
        "replies": np.asarray(batch.replies[0]),
    }


def summary(mean, scatter, effects, valid, branches: int) -> dict[str, float]:
    """The figures of one estimator and one policy, over the valid turns. See the head of this file."""
    mean, scatter, first, second = (values[valid] for values in (mean, scatter, *effects))
    effect = (first + second) / 2
    centred, effect = mean - mean.mean(), effect - effect.mean()
    true_variance = np.mean((first - first.mean()) * (second - second.mean()))
    noise = scatter.mean()
    systematic = max(np.mean(centred**2) - noise / branches, 1e-12)
    covariance = np.mean(centred * effect)
    total = systematic + noise
    if true_variance <= 0:
        return {}
    correlation = covariance / np.sqrt(total * true_variance)
    variance = (covariance / total) ** 2 * noise / true_variance
    return {
        "correlation": correlation,
        "systematic": covariance / np.sqrt(systematic * true_variance),
        "bias": 1 - correlation**2 - variance,
        "variance": variance,
    }


def gradient_cosine(weights, data, values) -> np.ndarray:
    """Cosine of the policy gradients with advantages `values` [K, N, T] and with the effects, per policy."""
    logits = np.einsum("kntf,kfa->knta", data["features"], np.asarray(weights[0]))
    chances = np.exp(logits - logits.max(axis=-1, keepdims=True))
    chances /= chances.sum(axis=-1, keepdims=True)
    score = np.eye(chances.shape[-1])[data["replies"]] - chances

    def direction(amounts):
        amounts = np.where(data["valid"], amounts, 0)
        return np.einsum("knt,kntf,knta->kfa", amounts, data["features"], score).reshape(len(score), -1)

    one, other = direction(values), direction(data["effects"].mean(axis=0))
    return np.sum(one * other, axis=-1) / (
        np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1) + 1e-12
    )


def thirds(turns: int) -> dict[str, np.ndarray]:
    """Masks of turns [T] by position in the dialogue."""
    third = np.arange(turns) * 3 // turns
    masks = (np.ones(turns, bool), third == 0, third == 1, third == 2)
    return dict(zip(POSITIONS, masks, strict=True))


def record(place: lab.World, stage: str, size: Size) -> dict[str, Any]:
    """Everything about one world and stage: per estimator, position and figure one number for each policy."""
    weights = policies(place, stage, size)
    data = measure(place, weights, size)
    found: dict[str, Any] = {}
    for e, label in enumerate(ESTIMATORS):
        found[label] = {}
        for position, chosen in thirds(place.rules.max_turns).items():
            rows = [
                summary(
                    data["mean"][e, k],
                    data["scatter"][e, k],
                    data["effects"][:, k],
                    data["valid"][k] & chosen,
                    size.branches,
                )
                for k in range(size.policies)
            ]
            rows = [row for row in rows if row]
            found[label][position] = {name: rounded([row[name] for row in rows]) for name in rows[0]}
        found[label]["all"]["gradient"] = rounded(gradient_cosine(weights, data, data["mean"][e]))
    effects = data["effects"].mean(axis=0)
    about = {
        "world": place.name,
        "stage": stage,
        "size": asdict(size),
        "effect_deviation": round(float(effects[data["valid"]].std()), 3),
        "reliability": round(float(np.corrcoef(*(half[data["valid"]] for half in data["effects"]))[0, 1]), 3),
    }
    if place.rules.trap is not None:
        baited = np.array([place.rules.trap.kind in reply for reply in policy.REPLIES])
        chosen = baited[data["replies"]] & data["valid"]
        about["trap"] = {
            "share": round(float(chosen.sum() / data["valid"].sum()), 4),
            "effect": round(float(effects[chosen].mean()), 3),
            "advantages": {
                label: round(
                    float(
                        data["mean"][e][chosen].mean() / np.sqrt(np.mean(data["mean"][e][data["valid"]] ** 2))
                    ),
                    3,
                )
                for e, label in enumerate(ESTIMATORS)
            },
        }
    return about | {"estimators": found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Computes what is missing and collects the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/credit"))
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--policies", type=int, default=Size.policies)
    parser.add_argument("--branches", type=int, default=Size.branches, help="an even number")
    parser.add_argument("--collect", action="store_true", help="compute nothing; collect what exists")
    parser.add_argument("--quick", action="store_true", help="one world, four policies, few branches")
    options = parser.parse_args(arguments)
    prepare_jax()
    size = Size(options.policies, options.branches)
    if options.quick:
        size, options.world = Size(4, 16, 8), ["base"]
    places = {place.name: place for place in lab.WORLDS}
    began, results = time.monotonic(), []
    for name in options.world:
        for stage in STAGES:
            file = options.folder / f"{name} {stage}.json"
            if options.collect and not file.exists():
                continue
            if not file.exists():
                start = time.monotonic()
                write_json(file, record(places[name], stage, size))
                print(f"{name}, {stage}: {time.monotonic() - start:.0f} s", flush=True)
            results.append(read_json(file))
    if options.json:
        write_json(options.json, {"about": circumstances(time.monotonic() - began), "results": results})
    from experiments.tables import print_credit

    print_credit(results)


if __name__ == "__main__":
    main()
