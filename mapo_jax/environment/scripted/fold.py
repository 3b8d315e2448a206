"""The mind of a dialogue, computed turn by turn and cached, so that a new turn costs one step."""

from functools import lru_cache

from mapo_jax.environment.dialogue import Action, DialogueState
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.scripted.assessment import Assessment, assess
from mapo_jax.environment.scripted.mind import Mind, begin, follow, hear

Exchanges = tuple[tuple[str, str, Action | None], ...]  # (user, reply, action) of each turn


def _exchanges(state: DialogueState) -> Exchanges:
    return tuple((turn.user, turn.reply, turn.action) for turn in state.turns)


def mind_at(state: DialogueState, delayed_opening: bool = True) -> Mind:
    """The mind that awaits the next reply or, between judge and user, the next action or message."""
    mind = _after(state.scenario, delayed_opening, _exchanges(state))
    return hear(mind, state.user) if state.user else mind


@lru_cache(maxsize=16384)
def _after(scenario: Scenario, opening: bool, turns: Exchanges) -> Mind:
    if not turns:
        return begin(scenario, opening)
    user, reply, action = turns[-1]
    if action is not None:
        return follow(_after(scenario, opening, (*turns[:-1], (user, reply, None))), action)
    return _assessed(scenario, opening, turns[:-1], user, reply).after


@lru_cache(maxsize=16384)
def _assessed(scenario: Scenario, opening: bool, turns: Exchanges, user: str, reply: str) -> Assessment:
    return assess(hear(_after(scenario, opening, turns), user), reply)


def assess_reply(state: DialogueState, reply: str, delayed_opening: bool = True) -> Assessment:
    """Judges `reply` to the user's last message."""
    return _assessed(state.scenario, delayed_opening, _exchanges(state), state.user, reply)
