"""The scripted director: moves on once the need of an episode is met, and when a story is stuck."""

import random
from dataclasses import dataclass

from mapo_jax.environment.card_schema import PERIODS
from mapo_jax.environment.dialogue import Action, DialogueState
from mapo_jax.environment.scripted.fold import mind_at
from mapo_jax.environment.scripted.mind import Mind
from mapo_jax.environment.state import AXES

MEMORY_SHARE = 0.2  # share of transitions at which a memory comes up first
MOST_MEMORIES = 4
PATIENCE = 3  # replies that miss the need, after which the story moves on anyway
LAST_STAGE = 3


@dataclass(frozen=True)
class ScriptedDirector:
    """Pure given the state and its seed. Never ends a dialogue: only success does."""

    delayed_opening: bool = True

    async def act(self, state: DialogueState) -> Action:
        """One of dialogue.ACTIONS."""
        mind = mind_at(state, self.delayed_opening)
        if mind.closed:
            return Action("observe", None, "You have withdrawn; say little until you feel met again.")
        if mind.met:
            return _onward(state, mind, random.Random(f"{state.seed}:{state.turn_count}:director"))
        if mind.idle >= PATIENCE:
            if not mind.heard:
                return _memory(mind, "You were not heard yet; begin again from another side.")
            if mind.stage < LAST_STAGE:
                guidance = "Something happens that moves the story on."
                return Action("turning_point", str(mind.stage + 1), guidance)
            guidance = "Something happens that shifts what weighs on you."
            return Action("turning_point", _lacking(state), guidance)
        return Action("continue", None, "Stay with what you are telling.")


def _onward(state: DialogueState, mind: Mind, rng: random.Random) -> Action:
    """The action once the need is met."""
    allowed = mind.stage > 0 and mind.memories < MOST_MEMORIES and mind.episode.origin != "memory"
    if allowed and rng.random() < MEMORY_SHARE:
        return _memory(mind, "An earlier part of the story comes back to you.")
    if mind.stage < LAST_STAGE:
        stage = mind.stage + 1
        return Action("reveal_stage", str(stage), mind.scenario.story.stages[stage].telling)
    axis = _lacking(state)
    return Action("shift_focus", axis, f"Dwell on what you still lack on {axis}.")


def _memory(mind: Mind, guidance: str) -> Action:
    return Action("reveal_memory", PERIODS[-1 - mind.memories % len(PERIODS)], guidance)


def _lacking(state: DialogueState) -> str:
    """The axis with the largest deficit."""
    return min(AXES, key=lambda axis: state.position[AXES.index(axis)])
