"""Forecast of the calls, tokens and cost of a run with a live world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from mapo_jax.config import ENGINE, HELD_OUT, ROLES, Config, RoleConfig, held_out
from mapo_jax.environment.dialogue import Action, DialogueState, Judgement, Turn
from mapo_jax.environment.live.director import director_messages
from mapo_jax.environment.live.health import calibration_set
from mapo_jax.environment.live.judge import judge_messages
from mapo_jax.environment.live.limits import prompt_tokens
from mapo_jax.environment.live.user import user_messages
from mapo_jax.environment.scenario import Scenario

# Tokens of an answer without reasoning: two short sentences; six findings of two sentences; one function
# call.
ANSWER_TOKENS = {"user": 45, "judge": 420, "director": 90}
_SAMPLED_CARDS = 8


Load = Float[np.ndarray, " 3"]
"""Calls, prompt tokens and answer tokens of one role."""


def run_load(config: Config, training: Sequence[Scenario], validation: int) -> dict[str, Load]:
    """The load of a whole run by role, if every dialogue reaches its last turn and nothing fails.

    It is computed from prompts of the first cards, with messages of the maximum lengths.

    Args:
      config: the run's configuration.
      training: training cards.
      validation: number of validation cards.
    """
    steps, every = config.training.steps, config.evaluation.every
    opening, turns = _averages(config, training)
    evaluations = len({*range(0, steps, every), steps})
    evaluated = min(validation, config.evaluation.scenarios)
    openings = steps * config.rollout.scenarios + evaluations * evaluated
    trained = steps * config.rollout.scenarios * config.rollout.rollouts
    validated = evaluations * evaluated * config.evaluation.rollouts
    loads = {name: load * (trained + validated) for name, load in turns.items()}
    loads["user"] += opening * openings
    samples = config.environment.judge.samples
    if held_out(config.environment):
        loads["judge"] = turns["judge"] * trained
        loads[HELD_OUT] = turns["judge"] * (validated * config.environment.held_out_judge.samples / samples)
    for item in calibration_set():
        messages = judge_messages(item.state.scenario, item.state.turns, item.state.user, item.reply)
        loads["judge"] += _load("judge", messages) * (evaluations * samples)
    # A custom class may have no model: it is called, but uses no tokens.
    models = {name: getattr(config.environment, name).model for name in loads}
    return {name: load * (1, 0, 0) if models[name] is None else load for name, load in loads.items()}


def step_load(config: Config, training: Sequence[Scenario]) -> dict[str, Load]:
    """The load of one training step by role; arguments as for `run_load`."""
    opening, turns = _averages(config, training)
    scenarios = config.rollout.scenarios
    loads = {name: load * (scenarios * config.rollout.rollouts) for name, load in turns.items()}
    loads["user"] += opening * scenarios
    return loads


def _averages(config: Config, training: Sequence[Scenario]) -> tuple[Load, dict[str, Load]]:
    """The load of a first message, and of a dialogue by role."""
    cards = training[:_SAMPLED_CARDS]
    dialogues = [_dialogue(card, config) for card in cards]
    turns = {name: np.mean([dialogue[name] for dialogue in dialogues], axis=0) for name in ROLES}
    return np.mean([_load("user", user_messages(card, ())) for card in cards], axis=0), turns


def live_forecast(config: Config, training: Sequence[Scenario], validation: int) -> str:
    """The load of a run as a table, with its cost at the configuration's prices."""
    titles = f"{'calls':>11} {'prompt tokens':>15} {'answer tokens':>15} {'cost':>11}"
    lines = [
        "the live world, if every dialogue goes to its last turn and nothing fails",
        f"  {'role':<14} {'model':<30} {titles}",
    ]
    total_cost, total = 0.0, np.zeros(3)
    loads = run_load(config, training, validation)
    for name, load in loads.items():
        role = getattr(config.environment, name)
        cost = load[1:] @ role.prices / 1e6
        total_cost, total = total_cost + cost, total + load
        model = role.model or role.implementation or ""
        lines.append(f"  {name:<14} {model[-30:]:<30} {_figures(load, cost)}")
    lines.append(f"  {'together':<45} {_figures(total, total_cost)}")
    lines.append(
        "  tokens are estimated from the rendered prompts (about 4 characters each), with replies as long as "
        "they may be; reasoning comes on top; a repair is one more call"
    )
    for name, load in loads.items():
        role = getattr(config.environment, name)
        if not any(role.prices) and role.model is not None and not role.model.startswith(ENGINE):
            lines.append(f"  the {name} has no price: set environment.{name}.prices")
        if hours := _shortest(load, role) / 60:
            lines.append(f"  the {name}'s limits per minute let this through in {hours:,.1f} hours at best")
    limit = config.environment.step_seconds
    for name, load in step_load(config, training).items():
        # Steps under way share the limits, and the clock of each runs from its beginning.
        seconds = 60 * (1 + config.rollout.ahead) * _shortest(load, getattr(config.environment, name))
        if seconds > limit:
            lines.append(
                f"  the {name}'s limits per minute let a step through in {seconds:,.0f} seconds at best, and "
                f"environment.step_seconds={limit:g} leaves out what is unfinished then, long dialogues "
                "first: raise it"
            )
    return "\n".join(lines)


def _shortest(load: Load, role: RoleConfig) -> float:
    """Shortest time in minutes that the role's limits per minute allow for a load; 0 without limits."""
    needed = ((load[0], role.requests_per_minute), (load[1:].sum(), role.tokens_per_minute))
    return max((amount / limit for amount, limit in needed if limit), default=0.0)


def _figures(load: Load, cost: float) -> str:
    calls, prompts, answers = load
    return f"{calls:11,.0f} {prompts:15,.0f} {answers:15,.0f} {cost:11,.2f}"


def _load(role: str, messages: Sequence[dict[str, str]]) -> Load:
    return np.array([1, prompt_tokens(messages), ANSWER_TOKENS[role]], float)


def _dialogue(card: Scenario, config: Config) -> dict[str, Load]:
    message = "w " * (2 * ANSWER_TOKENS["user"])
    reply = "w " * (2 * config.rollout.max_reply_tokens)
    judgement = Judgement((0,) * 6, ("",) * 6, ("",) * 6)
    filler = Turn(message, reply, judgement, None, card.start_position, Action("continue", None, message))
    state = DialogueState(card, 0, (), message)
    loads = {name: np.zeros(3) for name in ROLES}
    max_turns = config.rollout.max_turns
    for turn in range(max_turns):
        judged = _load("judge", judge_messages(card, state.turns, message, reply))
        loads["judge"] += judged * config.environment.judge.samples
        state = replace(state, turns=(*state.turns, filler))
        if turn < max_turns - 1:
            loads["director"] += _load("director", director_messages(state, max_turns))
            loads["user"] += _load("user", user_messages(card, state.turns))
    return loads
