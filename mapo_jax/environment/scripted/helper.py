"""Scripted speakers: the good helper, who marks the ceiling, and one of mixed quality for synthetic data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.environment.roles import Roles, open_dialogue, take_turn
from mapo_jax.environment.scenario import FEELINGS, UNSTATED, Scenario, load_scenarios
from mapo_jax.environment.scripted.assessment import KIND_MEMORY, KIND_MOST, KIND_RUNNING, SLOT_OF
from mapo_jax.environment.scripted.director import ScriptedDirector
from mapo_jax.environment.scripted.fold import mind_at
from mapo_jax.environment.scripted.grammar import CONSTRUCTIONS, HARMFUL, HELPFUL, bare, realise, slots_of
from mapo_jax.environment.scripted.judge import ScriptedJudge
from mapo_jax.environment.scripted.mind import Mind
from mapo_jax.environment.scripted.user import ScriptedUser
from mapo_jax.environment.state import Limits

Policy = Callable[[DialogueState], str]


def right_fillers(mind: Mind, kind: str) -> list[str]:
    """What this act may name now and be right; empty if nothing of the kind has been said yet."""
    story, content = mind.scenario.story, mind.content
    if kind in ("reflect_situation", "ask"):
        return [p for p in content.particulars if p in mind.said]
    if kind == "name_feeling":
        return [content.feeling] if content.feeling in mind.said_now else []
    if kind == "name_unstated":
        return [content.unstated] if content.unstated in mind.said_now else []
    pool = {"affirm_strength": story.strengths, "offer_step": story.steps, "reframe": (mind.scenario.value,)}
    return [phrase for phrase in pool[kind] if bare(phrase) in mind.said]


def _fresh_fillers(mind: Mind, kind: str) -> list[str]:
    return [filler for filler in right_fillers(mind, kind) if (kind, bare(filler)) not in mind.credited]


def _worn(mind: Mind, kind: str) -> bool:
    """Whether one more act of the kind would be a routine."""
    recent, running = mind.kinds[-(KIND_MEMORY - 1) :], mind.kinds[-(KIND_RUNNING - 1) :]
    row = len(running) == KIND_RUNNING - 1 and all(kind in kinds for kinds in running)
    return row or sum(kind in kinds for kinds in recent) >= KIND_MOST


def say(mind: Mind, kind: str, rng: random.Random, filler: str | None = None, worn: bool = False) -> str:
    """A sentence of this kind.

    Args:
      mind: the hidden state, for what may be named and which wordings are used up.
      kind: one of grammar.KINDS.
      rng: source of the choice of words.
      filler: what to name; empty: something the user has said, if there is any for a wording's slot.
      worn: choose among all wordings, not only those that are still fresh.
    """
    used = frozenset().union(*mind.frames)
    frames = list(CONSTRUCTIONS[kind])
    if filler is None:  # wordings about what has been said, if there are any
        frames = [frame for frame in frames if all(_said(mind, slot) for slot in slots_of(frame))] or frames
    rng.shuffle(frames)
    for frame in frames:
        slots = {slot: rng.choice(_said(mind, slot) or _fillers(mind, slot)) for slot in slots_of(frame)}
        if filler is not None:
            slots[SLOT_OF.get(kind, "p")] = filler
        sentence = realise(frame, slots)
        if worn or (frame not in used and bare(sentence) not in mind.sentences):
            break
    return sentence


def _said(mind: Mind, slot: str) -> Sequence[str]:
    return [phrase for phrase in _fillers(mind, slot) if bare(phrase) in mind.said]


def _fillers(mind: Mind, slot: str) -> Sequence[str]:
    """What the card holds for a slot."""
    story, content = mind.scenario.story, mind.content
    pools: dict[str, Sequence[str]] = {
        "p": content.particulars,
        "f": (content.feeling,),
        "s": story.strengths,
        "t": story.steps,
        "v": (mind.scenario.value,),
    }
    return pools[slot]


# For each need: the acts that serve it, best first, and those that go well beside.
_PLAN = {
    "heard": ("reflect_situation", "name_feeling"),
    "weight": ("name_unstated", "reflect_situation", "name_feeling"),
    "meaning": ("reframe", "affirm_strength"),
    "way": ("offer_step", "name_feeling", "reflect_situation", "affirm_strength"),
}


def good_helper(state: DialogueState, delayed_opening: bool = True) -> str:
    """A reply by one who knows the card and the hidden stage: the ceiling of this world."""
    mind = mind_at(state, delayed_opening)
    rng = random.Random(f"{state.seed}:{state.turn_count}:helper")
    if mind.closed:
        return say(mind, "repair", rng)
    replies = []
    for kind in _PLAN[mind.episode.need]:
        fillers = _fresh_fillers(mind, kind)
        if fillers and len(replies) < 2 and not _worn(mind, kind):
            replies.append(say(mind, kind, rng, rng.choice(fillers)))
    if not replies:
        fillers = right_fillers(mind, "ask")
        if fillers and not _worn(mind, "ask"):
            return say(mind, "ask", rng, rng.choice(fillers))
        return say(mind, "presence", rng)
    return " ".join(replies)


# How often the mixed speaker picks an act when it does not pick by the need.
_STRAY = {
    **dict.fromkeys(HELPFUL, 3.0),
    "ask": 2.0,
    "repair": 1.5,
    "presence": 1.5,
    **dict.fromkeys(HARMFUL, 0.8),
}


_RIGHT = 0.92  # chance that the mixed speaker names something right where it could
_WORN = 0.1  # chance that it takes any wording, used up or not
_UNFOUNDED = 0.05  # chance that it names something although nothing of the kind has been said
_HASTY = 0.25  # and that it offers a step then: one of a few that it has for everybody
_STOCK_STEPS = 12


def speaker(
    state: DialogueState, rng: random.Random, skill: float = 0.5, delayed_opening: bool = True
) -> str:
    """A reply of mixed quality, for synthetic dialogues.

    Args:
      state: a dialogue that awaits a reply.
      rng: source of every choice.
      skill: chance that an act is chosen by the user's need rather than at random. What it names is mostly
        right at any skill, so that naming can be learnt from these dialogues even where timing can not.
      delayed_opening: the world's switch.
    """
    mind = mind_at(state, delayed_opening)
    most = 2 if rng.random() < 0.6 else 1
    kinds: list[str] = []
    for _ in range(most):
        kind = _choose(mind, rng, skill)
        if kind not in kinds:
            kinds.append(kind)
    return " ".join(_word(mind, kind, rng) for kind in kinds)


def _choose(mind: Mind, rng: random.Random, skill: float) -> str:
    if rng.random() < skill:
        if mind.closed:
            return "repair"
        plan = [kind for kind in _PLAN[mind.episode.need] if _fresh_fillers(mind, kind)]
        if plan:
            return rng.choice(plan)
    while True:
        kind = rng.choices(list(_STRAY), list(_STRAY.values()))[0]
        unfounded = rng.random() < (_HASTY if kind == "offer_step" else _UNFOUNDED)
        if kind not in (*HELPFUL, "ask") or right_fillers(mind, kind) or unfounded:
            return kind


def _word(mind: Mind, kind: str, rng: random.Random) -> str:
    worn = rng.random() < _WORN
    if kind not in (*HELPFUL, "ask"):
        return say(mind, kind, rng, worn=worn)
    fillers = _fresh_fillers(mind, kind) or right_fillers(mind, kind)
    if kind == "offer_step" and not fillers:
        return say(mind, kind, rng, rng.choice(_stock_steps()), worn)
    if not fillers or rng.random() >= _RIGHT:
        fillers = _any_fillers(mind, kind)
    return say(mind, kind, rng, rng.choice(fillers), worn)


@lru_cache(maxsize=1)
def _stock_steps() -> tuple[str, ...]:
    """The shortest steps of the training cards: for anyone, whatever they have said."""
    steps = {step for card in load_scenarios(split="train") for step in card.story.steps}
    return tuple(sorted(steps, key=lambda step: (len(step), step))[:_STOCK_STEPS])


def _any_fillers(mind: Mind, kind: str) -> Sequence[str]:
    """What one who has not listened well may name: mostly things from elsewhere in the dialogue."""
    story = mind.scenario.story
    particulars = [p for stage in story.stages for p in stage.particulars]
    pools: dict[str, Sequence[str]] = {
        "reflect_situation": particulars,
        "ask": particulars,
        "name_feeling": FEELINGS,
        "name_unstated": UNSTATED,
        "affirm_strength": story.strengths,
        "offer_step": story.steps,
        "reframe": (mind.scenario.value,),
    }
    said = [phrase for phrase in pools[kind] if bare(phrase) in mind.said]
    return said if len(said) > 2 else pools[kind]


def hold_dialogue(
    scenario: Scenario, seed: int, policy: Policy, roles: Roles, limits: Limits
) -> DialogueState:
    """A whole dialogue with a scripted policy (any function from the state to a reply).

    Scripted roles never wait, so this needs no event loop and also runs inside one.
    """

    async def hold() -> DialogueState:
        state = DialogueState(scenario, seed, (), await open_dialogue(scenario, seed, roles))
        while state.outcome is None:
            state = await take_turn(state, policy(state), roles, limits)
        return state

    dialogue = hold()
    try:
        dialogue.send(None)
    except StopIteration as finished:
        return finished.value
    dialogue.close()
    raise RuntimeError("a role waited for something; hold_dialogue is for scripted roles")


def synthetic_dialogue(
    scenario: Scenario,
    seed: int,
    turns: int = 8,
    skill: tuple[float, float] = (0.5, 1.0),
    delayed_opening: bool = True,
) -> list[dict[str, str]]:
    """A dialogue of mixed quality as chat messages, for the warm start.

    Args:
      scenario: a card, real or imagined.
      seed: everything random follows from it.
      turns: most turns; failure may end it sooner.
      skill: range from which this dialogue's speaker draws its skill.
      delayed_opening: the world's switch.
    """
    rng = random.Random(f"{seed}:{scenario.id}:speaker")
    level = rng.uniform(*skill)
    roles = Roles(
        ScriptedUser(delayed_opening), ScriptedJudge(delayed_opening), ScriptedDirector(delayed_opening)
    )
    # Nothing ends it before its last turn, so that late stages are in the data too.
    limits = Limits(turns, turns)
    state = hold_dialogue(
        scenario, seed, lambda state: speaker(state, rng, level, delayed_opening), roles, limits
    )
    return state.messages
