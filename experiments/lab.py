"""Which advantage teaches best, and when: every estimator on a small policy in the scripted world's dynamics.

    python experiments/lab.py [--study NAME ...] [--processes 2] [--folder runs/lab] [--json FILE] [--quick]
    python experiments/lab.py --speed

A setting is a world, an estimator with its options, and a learning rate; all seeds of all settings of a world
are trained at once. Advantages are divided by their root mean square, and every estimator has two or three
learning rates, so that the scale of an estimator is not mistaken for its merit. Seeds share their cards,
first weights and random numbers between settings, so that differences are paired. A sixth of the seeds
chooses the learning rate, the others judge it.

Each setting's raw numbers are written whole to `FOLDER/WORLD/SETTING.json`; settings whose file exists are
skipped, so the same command continues. `--json` collects them in one file. `--quick` takes less than two
minutes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from experiments import strategy_policy as policy
from experiments import strategy_world as world
from experiments.records import circumstances, read_json, rounded, write_json
from mapo_jax.algorithm.objective import objective_options
from mapo_jax.algorithm.rewards import REWARDS
from mapo_jax.commands import prepare_jax
from mapo_jax.config import AlgorithmConfig
from mapo_jax.environment.scenario import load_scenarios

RATES = (0.03, 0.1, 0.3)
FEWER_RATES = RATES[1:]  # where the smallest one has not learnt to the end in the base world
DIALOGUES = 32  # per step
EVALUATION_ROUNDS = 3  # dialogues per held-out card after training
OBJECTIVE = objective_options(AlgorithmConfig())
LARGEST_PROGRAM = 30  # settings that are trained at once


@dataclass(frozen=True)
class World:
    """What the estimators are compared in."""

    name: str
    rules: world.Rules = field(default_factory=world.Rules)
    rollouts: int = 8
    reward: str = "incremental"
    rates: tuple[float, ...] = FEWER_RATES


@dataclass(frozen=True)
class Setting:
    """An estimator and a learning rate."""

    label: str
    algorithm: AlgorithmConfig
    rate: float
    rescale: bool = True


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    seeds: int = 120
    steps: int = 30


def horizon(turns: int, **switches: Any) -> world.Rules:
    """Rules of dialogues of so many turns; they may end after five of eight."""
    return world.Rules(max(1, round(turns * 5 / 8)), turns, **switches)


BASE = World("base", rates=RATES)
TRAP = World("trap", world.Rules(trap=world.Trap()))
NOISY = World("noise 1", world.Rules(judge_noise=1.0))
WORLDS = (
    BASE,
    *(World(f"horizon {turns}", horizon(turns)) for turns in (4, 12, 20)),
    World("noise 0.5", world.Rules(judge_noise=0.5)),
    NOISY,
    World("noise 2", world.Rules(judge_noise=2.0)),
    *(World(f"rollouts {rollouts}", rollouts=rollouts) for rollouts in (2, 4, 16)),
    World("noise 1, rollouts 2", world.Rules(judge_noise=1.0), rollouts=2),
    World("no delayed effects", world.Rules(delayed_opening=False)),
    TRAP,
    World("late trap", world.Rules(trap=world.Trap(wait=2))),
    World("naming 0.8", world.Rules(naming_error=0.2)),
    *(World(f"reward {reward}", reward=reward) for reward in ("absolute", "sum", "potential")),
)

Variant = tuple[str, dict[str, Any]]  # label, fields of AlgorithmConfig


def mapo(weight: float, **options: Any) -> Variant:
    """MAPO with this turn weight."""
    return f"mapo {weight:.2f}", {"estimator": "mapo", "turn_weight": weight, **options}


CORE: tuple[Variant, ...] = (
    mapo(1 / 3),
    mapo(1 / 2),
    ("turn", {"estimator": "turn"}),
    ("batch", {"estimator": "batch"}),
    ("grpo", {"estimator": "grpo"}),
    ("reinforce_plus_plus", {"estimator": "reinforce_plus_plus"}),
)
OTHERS: tuple[Variant, ...] = tuple(
    (name, {"estimator": name}) for name in ("grpo_per_turn", "rloo", "dr_grpo", "mt_grpo")
)
WEIGHTS = tuple(mapo(weight) for weight in (1 / 6, 2 / 3, 5 / 6))
DISCOUNTS = tuple(
    (f"{label} discount {discount}", fields | {"discount": discount})
    for label, fields in (mapo(1 / 3), ("turn", {"estimator": "turn"}))
    for discount in (0.0, 0.5, 0.7, 0.95, 1.0)
)
OPTIONS: tuple[Variant, ...] = (
    ("mapo 0.33 group", mapo(1 / 3, batch_scope="group")[1]),
    ("mapo 0.33 leave-one-out", mapo(1 / 3, leave_one_out=True)[1]),
    ("turn leave-one-out", {"estimator": "turn", "leave_one_out": True}),
)


def settings_of(variants: Sequence[Variant], place: World, rescale: bool = True) -> list[Setting]:
    """Every variant with every learning rate."""
    return [
        Setting(
            label if rescale else f"{label} unscaled",
            AlgorithmConfig(reward=place.reward, **fields),
            rate,
            rescale,
        )
        for label, fields in variants
        for rate in place.rates
    ]


STUDIES: dict[str, Callable[[World], list[Setting]]] = {
    "estimators": lambda place: settings_of(CORE, place),
    "others": lambda place: settings_of(OTHERS, place) if place in (BASE, NOISY, TRAP) else [],
    "weight": lambda place: settings_of(WEIGHTS, place) if place in (BASE, NOISY, TRAP) else [],
    "scale": lambda place: (
        settings_of([mapo(w) for w in (0.0, 1 / 3, 1 / 2, 1.0)], place, rescale=False)
        if place == BASE
        else []
    ),
    "discount": lambda place: settings_of(DISCOUNTS, place) if place in (BASE, TRAP) else [],
    "options": lambda place: (
        settings_of(OPTIONS, place) if place.name in ("base", "rollouts 2", "noise 1, rollouts 2") else []
    ),
}


# --- Training. ---


class Outcome(NamedTuple):
    """What is recorded of each setting and seed, [settings, seeds]; after training unless stated."""

    final: Array  # true return in the evaluation's dialogues
    harm: Array  # share of replies that harm
    success: Array  # share of dialogues whose user ends as well off as equilibrium
    most: Array  # share of the most frequent reply
    trap: Array  # share of replies with the trap's act
    area: Array  # mean over the steps of the training dialogues' true return
    gradient: Array  # mean over the steps of the gradient's norm
    spike: Array  # the largest of these norms over the median one
    curve: Array  # true return of the training dialogues by step, [settings, seeds, steps]


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@partial(jax.jit, static_argnames=("models", "rollouts"))
def begin_dialogues(
    cards: world.Card, picks: Int[Array, "K S"], models: int, rollouts: int, rules: world.Rules
) -> world.State:
    """States [models, K, S * rollouts] that await the first reply."""

    def begin(card):
        return world.open_dialogue(jax.tree.map(lambda values: values[card], cards), rules)

    states = jax.vmap(jax.vmap(begin))(jnp.repeat(picks, rollouts, axis=1))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (models, *x.shape)), states)


@partial(jax.jit, static_argnames=("total", "count"))
def pick_cards(seeds: Array, step: int, total: int, count: int) -> Int[Array, "K S"]:
    """The cards of a step: for each seed `count` different ones."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(seeds)
    return jnp.argsort(jax.vmap(lambda key: jax.random.bits(key, (total,)))(keys))[:, :count]


@partial(jax.jit, donate_argnums=(0, 1))
def update(weights, optimizer_states, batch, advantages, rates):
    """One step of the optimizer of every model, and the norm of its gradient."""

    def one(weights, optimizer_state, batch, advantages, rate):
        gradients = policy.gradient(weights, batch, advantages, OBJECTIVE)
        moves, optimizer_state = OPTIMIZER.update(gradients, optimizer_state)
        return weights - rate * moves, optimizer_state, optax.global_norm(gradients)

    over_seeds = jax.vmap(one, (0, 0, 0, 0, None))
    return jax.vmap(over_seeds)(weights, optimizer_states, batch, advantages, rates)


@jax.jit
def mean_returns(batch: policy.Batch) -> Float[Array, "M K"]:
    """Mean true return of the dialogues of every model."""
    return jnp.mean(policy.true_returns(batch), axis=-1)


def advantages_program(place: World, settings: Sequence[Setting]) -> Callable[..., Array]:
    """Compiles the advantages of all settings: positions and masks [M, K, N, T] -> [M, K, N, T]."""
    grouped = [list(group) for _, group in itertools.groupby(settings, key=lambda setting: setting.label)]

    def one(positions, valid, setting):
        shape = (DIALOGUES // place.rollouts, place.rollouts)
        rewards = REWARDS[place.reward](positions)
        rewards, mask = rewards.reshape(*shape, -1), valid.reshape(*shape, -1)
        advantages = policy.advantages_of(rewards, mask, setting.algorithm, setting.rescale)
        return advantages.reshape(valid.shape)

    @jax.jit
    def program(positions, valid):
        parts, first = [], 0
        for group in grouped:
            part = slice(first, first := first + len(group))
            compute = partial(one, setting=group[0])
            parts.append(jax.vmap(jax.vmap(compute))(positions[part], valid[part]))
        return jnp.concatenate(parts)

    return program


@jax.jit
def assess(batch: policy.Batch, baited: Bool[Array, " A"]) -> tuple[Array, ...]:
    """Return, harm, success, largest share of a reply and share of the trap, [M, K]."""
    counts = jnp.sum(batch.valid, axis=(-2, -1))
    shares = jnp.stack(
        [jnp.sum(batch.valid & (batch.replies == i), axis=(-2, -1)) / counts for i in range(len(baited))],
        axis=-1,
    )
    start = batch.true_positions[..., 0, :]
    kept = jnp.where(batch.valid[..., None], batch.true_positions[..., 1:, :], 0)
    last = jnp.take_along_axis(kept, jnp.sum(batch.valid, axis=-1)[..., None, None] - 1, axis=-2)[..., 0, :]
    return (
        jnp.mean(policy.true_returns(batch), axis=-1),
        jnp.sum(batch.harmful & batch.valid, axis=(-2, -1)) / counts,
        jnp.mean(jnp.sum(last * start, axis=-1) <= 0, axis=-1),
        jnp.max(shares, axis=-1),
        jnp.sum(shares * baited, axis=-1),
    )


def train(place: World, settings: Sequence[Setting], size: Size, steps: int | None = None):
    """Trains every setting with every seed.

    Args:
      place: the world.
      settings: what is trained side by side.
      size: seeds, and steps of the learning rate's schedule.
      steps: stop after so many of them; default: all.

    Returns:
      Weights [settings, seeds, F, A]; true returns of the training dialogues and norms of the gradient, both
      [settings, seeds, steps].
    """
    rules, models, rollouts = place.rules, len(settings), place.rollouts
    cards = world.cards(load_scenarios(split="train"))
    seeds = jax.vmap(jax.random.key)(jnp.arange(size.seeds))
    first = policy.start_weights()
    weights = jnp.broadcast_to(first, (models, size.seeds, *first.shape)) + 0.0  # a copy, to be donated
    optimizer_states = jax.vmap(jax.vmap(OPTIMIZER.init))(weights)
    rates = np.array([setting.rate for setting in settings], np.float32)
    advantages_of = advantages_program(place, settings)
    curve, norms = [], []
    for step in range(size.steps if steps is None else steps):
        picks = pick_cards(seeds, step, cards.axis.shape[0], DIALOGUES // rollouts)
        states = begin_dialogues(cards, picks, models, rollouts, rules)
        key = jax.random.fold_in(jax.random.key(1), step)
        batch, _ = policy.converse(weights, states, key, rules, rules.max_turns)
        advantages = advantages_of(batch.positions, batch.valid)
        rate = rates * 0.5 * (1 + math.cos(math.pi * step / size.steps))
        weights, optimizer_states, norm = update(weights, optimizer_states, batch, advantages, rate)
        curve.append(mean_returns(batch))
        norms.append(norm)
    return weights, np.stack(curve, axis=-1), np.stack(norms, axis=-1)


def evaluate(weights: Float[Array, "M K F A"], rules: world.Rules, rounds: int) -> tuple[Array, ...]:
    """`assess` of dialogues with all cards that are not trained on, without noise of the judge."""
    cards = world.cards(load_scenarios(split="validation") + load_scenarios(split="test"))
    models, seeds = weights.shape[:2]
    picks = jnp.broadcast_to(jnp.arange(cards.axis.shape[0]), (seeds, cards.axis.shape[0]))
    states = begin_dialogues(cards, picks, models, 1, rules)
    baited = jnp.array([rules.trap is not None and rules.trap.kind in reply for reply in policy.REPLIES])
    parts = []
    for i in range(rounds):
        key = jax.random.fold_in(jax.random.key(2), i)
        batch, _ = policy.converse(weights, states, key, replace(rules, judge_noise=0.0), rules.max_turns)
        parts.append(assess(batch, baited))
    return tuple(np.mean(values, axis=0) for values in zip(*parts, strict=True))


def outcome_of(place: World, settings: Sequence[Setting], size: Size) -> Outcome:
    """Trains and evaluates."""
    weights, curve, norms = train(place, settings, size)
    figures = evaluate(weights, place.rules, EVALUATION_ROUNDS)
    spikes = norms.max(axis=-1) / np.maximum(np.median(norms, axis=-1), 1e-9)
    return Outcome(*figures, curve.mean(axis=-1), norms.mean(axis=-1), spikes, curve)


# --- Files. ---


def file_of(folder: Path, place: World, setting: Setting) -> Path:
    """Where a setting's raw numbers are."""
    return folder / place.name / f"{setting.label} @{setting.rate}.json"


def record(setting: Setting, outcome: Outcome, index: int) -> dict[str, Any]:
    """The raw numbers of one setting: of every seed, and the curve's mean and deviation over the seeds."""
    per_seed = {name: rounded(getattr(outcome, name)[index]) for name in ("final", "area", "harm")}
    means = {
        name: round(float(np.mean(getattr(outcome, name)[index])), 4)
        for name in ("most", "success", "trap", "gradient", "spike")
    }
    curve = np.asarray(outcome.curve[index])
    return {
        "label": setting.label,
        "rate": setting.rate,
        **per_seed,
        "means": means,
        "curve": rounded(curve.mean(axis=0), 2),
        "curve_deviation": rounded(curve.std(axis=0), 2),
    }


def work(place: World, studies: Sequence[str], size: Size, folder: Path) -> None:
    """Trains the settings of one world that have no file yet."""
    prepare_jax()
    settings = [setting for study in studies for setting in STUDIES[study](place)]
    missing = [setting for setting in settings if not file_of(folder, place, setting).exists()]
    for first in range(0, len(missing), LARGEST_PROGRAM):
        part, began = missing[first : first + LARGEST_PROGRAM], time.monotonic()
        outcome = outcome_of(place, part, size)
        for i, setting in enumerate(part):
            content = record(setting, outcome, i) | {"size": asdict(size)}
            write_json(file_of(folder, place, setting), content)
        print(f"{place.name}: {len(part)} settings, {time.monotonic() - began:.0f} s", flush=True)


def collect(worlds: Sequence[World], studies: Sequence[str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of all settings that have a file, by world."""
    return {
        place.name: [
            read_json(file_of(folder, place, setting))
            for study in studies
            for setting in STUDIES[study](place)
            if file_of(folder, place, setting).exists()
        ]
        for place in worlds
    }


# --- Speed. ---


def measure_speed(dialogues: int = 16384, rounds: int = 7) -> tuple[float, float]:
    """Dialogues of eight turns, world and policy together: by second, and by second of CPU time; medians."""
    rules = world.Rules()
    cards = world.cards(load_scenarios(split="train"))
    picks = jnp.arange(dialogues)[None] % cards.axis.shape[0]
    rates = []
    for i in range(rounds + 1):
        wall, processor = time.perf_counter(), time.process_time()
        states = begin_dialogues(cards, picks, 1, 1, rules)
        batch, _ = policy.converse(policy.start_weights()[None, None], states, jax.random.key(i), rules, 8)
        jax.block_until_ready(mean_returns(batch))
        rates.append(
            (dialogues / (time.perf_counter() - wall), dialogues / (time.process_time() - processor))
        )
    return tuple(np.median(rates[1:], axis=0).tolist())


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing and collects the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--world", nargs="+", choices=[w.name for w in WORLDS], help="default: all")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/lab"))
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--seeds", type=int, default=Size.seeds)
    parser.add_argument("--steps", type=int, default=Size.steps)
    parser.add_argument("--quick", action="store_true", help="two worlds, 24 seeds, 10 steps")
    parser.add_argument("--collect", action="store_true", help="train nothing; collect what exists")
    parser.add_argument("--speed", action="store_true", help="only measure dialogues a second")
    options = parser.parse_args(arguments)
    prepare_jax()
    if options.speed:
        wall, processor = measure_speed()
        print(f"dialogues of 8 turns: {wall:,.0f} a second, {processor:,.0f} a second of CPU time")
        return
    size, studies, names = Size(options.seeds, options.steps), options.study, options.world
    if options.quick:
        size, studies, names = Size(24, 10), ["estimators"], names or ["base", "trap"]
    worlds = [place for place in WORLDS if names is None or place.name in names]
    began = time.monotonic()
    if options.collect:
        print(f"collecting from {options.folder}")
    elif options.processes == 1:
        for place in worlds:
            work(place, studies, size, options.folder)
    else:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
            tasks = [pool.submit(work, place, studies, size, options.folder) for place in worlds]
            for task in tasks:
                task.result()
    results = collect(worlds, studies, options.folder)
    if options.json:
        about = circumstances(time.monotonic() - began)
        write_json(options.json, {"about": about, "worlds": results})
    from experiments.tables import print_lab

    print_lab(results)


if __name__ == "__main__":
    main()
