"""Scripted policies: the good helper, an upper bound, and a speaker of mixed quality for synthetic data."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random

from mapo_jax.environment.card_schema import FEELINGS, UNSTATED
from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.environment.roles import Roles, open_dialogue, take_turn
from mapo_jax.environment.scenario import Scenario, load_scenarios
from mapo_jax.environment.scripted.assessment import SLOT_OF, card_phrases, routine
from mapo_jax.environment.scripted.director import ScriptedDirector
from mapo_jax.environment.scripted.fold import mind_at
from mapo_jax.environment.scripted.grammar import (
    CONSTRUCTIONS,
    HARMFUL,
    HELPFUL,
    bare,
    realise,
    recognise,
    slots_of,
)
from mapo_jax.environment.scripted.judge import ScriptedJudge
from mapo_jax.environment.scripted.mind import Mind
from mapo_jax.environment.scripted.user import ScriptedUser
from mapo_jax.environment.state import Limits

Policy = Callable[[DialogueState], str]


def right_fillers(mind: Mind, kind: str) -> list[str]:
    """The fillers that are right for this act now; empty if the user has said none of the kind yet."""
    content = mind.content
    if kind in ("reflect_situation", "ask"):
        return _said(mind, content.particulars)
    if kind == "name_feeling":
        return [content.feeling] if content.feeling in mind.said_now else []
    if kind == "name_unstated":
        return [content.unstated] if content.unstated in mind.said_now else []
    return _said(mind, card_phrases(mind.scenario, kind))


def _said(mind: Mind, texts: Sequence[str]) -> list[str]:
    """Those of the phrases that the user has said."""
    return [text for text in texts if bare(text) in mind.said]


def _latest(mind: Mind, texts: Sequence[str]) -> str:
    """The one that the user said last; the first of several that were never said in these words."""
    heard = f" {' '.join(mind.heard_words)} "
    return max(texts, key=lambda text: heard.rfind(f" {bare(text)} "))


def _fresh_fillers(mind: Mind, kind: str) -> list[str]:
    return [filler for filler in right_fillers(mind, kind) if (kind, bare(filler)) not in mind.credited]


_PLACES = {frame: i for frames in CONSTRUCTIONS.values() for i, frame in enumerate(frames)}


def _next_place(mind: Mind, rng: Random) -> int:
    """The place, in each act's list, of the wording to use next: one further than in the last reply.

    So a speaker that remembers only its last reply repeats no wording before a list is used up. Policies that
    were shown random unused wordings did not learn to avoid the used ones (docs/evidence.md).
    """
    for reply in reversed(mind.sentences):
        for words in sorted(reply):
            if (place := _PLACES.get(recognise(words)[1])) is not None:
                return place + 1
    return rng.randrange(max(map(len, CONSTRUCTIONS.values())))


def say(mind: Mind, kind: str, rng: Random, filler: str | None = None, place: int | None = None) -> str:
    """A sentence of this kind.

    Args:
      mind: the hidden state, for the fillers that are right and the constructions that are used up.
      kind: one of grammar.KINDS.
      rng: source of the choice of words.
      filler: what to name; None: something the user has said, if the slots of any construction allow it.
      place: of the construction to try first, then its list is taken around; None: drawn.
    """
    story, content = mind.scenario.story, mind.content
    pools: dict[str, Sequence[str]] = {
        "p": content.particulars,
        "f": (content.feeling,),
        "s": story.strengths,
        "t": story.steps,
        "v": (mind.scenario.value,),
    }
    used = frozenset().union(*mind.frames)
    frames = list(CONSTRUCTIONS[kind])
    start = rng.randrange(len(frames)) if place is None else place % len(frames)
    frames = frames[start:] + frames[:start]
    if filler is None:  # prefer constructions whose slots the user's phrases can fill
        frames = [f for f in frames if all(_said(mind, pools[slot]) for slot in slots_of(f))] or frames
    for frame in frames:
        slots = {slot: _latest(mind, pools[slot]) for slot in slots_of(frame)}
        if filler is not None:
            slots[SLOT_OF.get(kind, "p")] = filler
        sentence = realise(frame, slots)
        if frame not in used and bare(sentence) not in mind.known:
            break
    return sentence


# For each need: the acts that serve it, best first, and those that fit beside them.
_PLAN = {
    "heard": ("reflect_situation", "name_feeling"),
    "weight": ("name_unstated", "reflect_situation", "name_feeling"),
    "meaning": ("reframe", "affirm_strength"),
    "way": ("offer_step", "name_feeling", "reflect_situation", "affirm_strength"),
}


def _fitting_acts(mind: Mind) -> list[str]:
    """The acts that serve the user now, best first: two, or one where no other is left."""
    if mind.closed:
        return ["repair"]
    plan = _PLAN[mind.episode.need]
    if acts := [kind for kind in plan if _fresh_fillers(mind, kind) and not routine(mind, kind)][:2]:
        return acts
    return ["ask"] if right_fillers(mind, "ask") and not routine(mind, "ask") else ["presence"]


def good_helper(state: DialogueState, delayed_opening: bool = True) -> str:
    """A reply that uses the card and the hidden mind: the upper bound of this world."""
    mind = mind_at(state, delayed_opening)
    rng = Random(f"{state.seed}:{state.turn_count}:helper")
    place = _next_place(mind, rng)
    return " ".join(_word_act(mind, kind, place, rng) for kind in _fitting_acts(mind))


def _word_act(mind: Mind, kind: str, place: int, rng: Random) -> str:
    """A sentence that names something right, if the act names anything."""
    fillers = _fresh_fillers(mind, kind) or right_fillers(mind, kind) if kind in (*HELPFUL, "ask") else ()
    return say(mind, kind, rng, _latest(mind, fillers) if fillers else None, place)


# Weights of the acts that the mixed speaker draws when it does not choose by the need.
RANDOM_ACTS = {
    **dict.fromkeys(HELPFUL, 3.0),
    "ask": 2.0,
    "repair": 1.5,
    "presence": 1.5,
    **dict.fromkeys(HARMFUL, 0.8),
}
_BOTH = 0.8  # chance that the mixed speaker says both of two acts that fit
_RIGHT = 0.92  # chance that it names something right where it can
_UNFOUNDED = 0.05  # chance that it names something although the user has said nothing of the kind
_HASTY = 0.25  # the same for a step, which is then one of a few stock steps
_STOCK_STEPS = 12
_SKILL = (0.7, 1.0)  # range from which the speaker of a synthetic dialogue draws its skill


def speaker(state: DialogueState, rng: Random, skill: float = 0.5, delayed_opening: bool = True) -> str:
    """A reply of mixed quality, for synthetic dialogues.

    Args:
      state: a dialogue that awaits a reply.
      rng: source of every choice.
      skill: chance that the acts are those that fit, as the good helper chooses them; otherwise it is one at
        random. Fillers are mostly right at any skill, so that naming can be learnt from these dialogues even
        where timing cannot.
      delayed_opening: the world's switch.
    """
    mind = mind_at(state, delayed_opening)
    if rng.random() < skill:
        kinds = _fitting_acts(mind)
        if rng.random() >= _BOTH:
            kinds = [rng.choice(kinds)]
    else:
        kinds = [_random_act(mind, rng)]
    place = _next_place(mind, rng)
    return " ".join(_word_carelessly(mind, kind, place, rng) for kind in kinds)


def _random_act(mind: Mind, rng: Random) -> str:
    while True:
        kind = rng.choices(list(RANDOM_ACTS), list(RANDOM_ACTS.values()))[0]
        unfounded = rng.random() < (_HASTY if kind == "offer_step" else _UNFOUNDED)
        if kind not in (*HELPFUL, "ask") or right_fillers(mind, kind) or unfounded:
            return kind


def _word_carelessly(mind: Mind, kind: str, place: int, rng: Random) -> str:
    """A sentence that names something right most of the time."""
    if kind not in (*HELPFUL, "ask"):
        return say(mind, kind, rng, place=place)
    fillers = right_fillers(mind, kind)
    if kind == "offer_step" and not fillers:
        return say(mind, kind, rng, rng.choice(_stock_steps()), place)
    if not fillers or rng.random() >= _RIGHT:
        return say(mind, kind, rng, rng.choice(_any_fillers(mind, kind)), place)
    return _word_act(mind, kind, place, rng)


@lru_cache(maxsize=1)
def _stock_steps() -> tuple[str, ...]:
    """The shortest steps of the training cards, offered to anyone."""
    steps = {step for card in load_scenarios(split="train") for step in card.story.steps}
    return tuple(sorted(steps, key=lambda step: (len(step), step))[:_STOCK_STEPS])


def _any_fillers(mind: Mind, kind: str) -> Sequence[str]:
    """Fillers of a careless reply: mostly from other parts of the dialogue."""
    if kind in ("reflect_situation", "ask"):
        pool = [p for stage in mind.scenario.story.stages for p in stage.particulars]
    elif kind in ("name_feeling", "name_unstated"):
        pool = FEELINGS if kind == "name_feeling" else UNSTATED
    else:
        pool = card_phrases(mind.scenario, kind)
    said = _said(mind, pool)
    return said if len(said) > 2 else pool


def hold_dialogue(card: Scenario, seed: int, policy: Policy, roles: Roles, limits: Limits) -> DialogueState:
    """A whole dialogue with a scripted policy (any function from the state to a reply).

    Scripted roles never wait, so this needs no event loop and also runs inside one.
    """

    async def run() -> DialogueState:
        state = DialogueState(card, seed, (), await open_dialogue(card, seed, roles))
        while state.outcome is None:
            state = await take_turn(state, policy(state), roles, limits)
        return state

    dialogue = run()
    try:
        dialogue.send(None)
    except StopIteration as finished:
        return finished.value
    dialogue.close()
    raise RuntimeError("a role waited for something; hold_dialogue is for scripted roles")


def synthetic_dialogue(
    scenario: Scenario, seed: int, turns: int = 8, delayed_opening: bool = True
) -> list[dict[str, str]]:
    """A dialogue of mixed quality as chat messages, for the warm start.

    Args:
      scenario: a card, real or imagined.
      seed: of all random choices.
      turns: most turns; failure may end it sooner.
      delayed_opening: the world's switch.
    """
    rng = Random(f"{seed}:{scenario.id}:speaker")
    level = rng.uniform(*_SKILL)
    roles = Roles(*(role(delayed_opening) for role in (ScriptedUser, ScriptedJudge, ScriptedDirector)))
    limits = Limits(turns, turns)  # nothing ends it before its last turn, so that the data holds late stages

    def policy(state: DialogueState) -> str:
        return speaker(state, rng, level, delayed_opening)

    return hold_dialogue(scenario, seed, policy, roles, limits).messages
