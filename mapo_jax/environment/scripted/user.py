"""The scripted user: speaks from the card, by stage, mood, what was just said, and guidance."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.scripted import lexicon
from mapo_jax.environment.scripted.fold import mind_at
from mapo_jax.environment.scripted.grammar import bare, realise
from mapo_jax.environment.scripted.mind import Mind, begin

_DISTRACT = 0.25  # share of fresh stages in which the user also waves an earlier matter aside
_FEELING_TOO = 0.5  # share of weight and way messages that also state the feeling
_ATTEMPTS = 40  # draws for a message that is new; the later ones add an idle sentence
_LONGEST = 30  # words that a message should not exceed, as long as other words are left


class ScriptedUser:
    """Pure given the state and its seed; never says the same message twice in a dialogue."""

    def __init__(self, delayed_opening: bool = True) -> None:
        self._delayed_opening = delayed_opening

    async def open(self, scenario: Scenario, seed: int) -> str:
        """The first message."""
        rng = random.Random(f"{seed}:{scenario.id}:open")
        return _speak(rng, begin(scenario, self._delayed_opening), "", frozenset())

    async def reply(self, state: DialogueState) -> str:
        """The next message after a finished turn."""
        mind = mind_at(state, self._delayed_opening)
        earlier = frozenset(turn.user for turn in state.turns)
        rng = random.Random(f"{state.seed}:{state.turn_count}:user")
        return _speak(rng, mind, " ".join(turn.user for turn in state.turns), earlier)


def _speak(rng: random.Random, mind: Mind, spoken: str, earlier: frozenset[str]) -> str:
    for attempt in range(_ATTEMPTS):
        sentences = _compose(rng, mind, spoken)
        if attempt >= _ATTEMPTS // 2:
            # Everything near has been said: time passes, and the person says so.
            sentences.insert(rng.randrange(len(sentences) + 1), _fresh(rng, lexicon.IDLE, spoken))
        message = " ".join(sentences)
        if message not in earlier and (attempt >= _ATTEMPTS // 2 or message.count(" ") < _LONGEST):
            return message
    extra = [rng.choice(lexicon.IDLE) for _ in range(2)]
    while " ".join([*sentences, *extra]) in earlier:
        extra.append(rng.choice(lexicon.IDLE))
    return " ".join([*sentences, *extra])


def _fresh(rng: random.Random, pool: Sequence[str], spoken: str, **slots: str) -> str:
    """A sentence of the pool, one not yet spoken if there is any left."""
    sentences = [realise(frame, slots) for frame in pool]
    unspoken = [sentence for sentence in sentences if sentence not in spoken]
    return rng.choice(unspoken or sentences)


def _compose(rng: random.Random, mind: Mind, spoken: str) -> list[str]:
    content, episode, first = mind.content, mind.episode, mind.messages == 0
    opening = []
    if mind.reaction is not None:
        opening.append(_fresh(rng, lexicon.REACTIONS[mind.reaction], spoken))
    if mind.closed:
        if rng.random() < 0.5:
            opening.append(_fresh(rng, lexicon.CURT_PARTICULAR, spoken, p=rng.choice(content.particulars)))
        else:
            opening.append(_fresh(rng, lexicon.CURT, spoken))
        return opening

    def situation(which: int) -> str:
        line = content.line[which]
        if line not in spoken:
            return line
        return _fresh(rng, lexicon.PARTICULAR, spoken, p=content.particulars[which])

    def feeling() -> str:
        return _fresh(rng, lexicon.FEELING, spoken, f=content.feeling)

    which = rng.randrange(2) if not first or episode.origin != "stage" else 0
    body: list[str]
    if episode.need == "heard":
        if episode.origin == "memory" and first and mind.heard:
            body = [_fresh(rng, lexicon.MEMORY, spoken, p=content.particulars[which]), feeling()]
        elif first:
            body = [situation(0), situation(1)]
            # A guarded person tells what happened first, and what it does to them later.
            if mind.scenario.empathy_threshold != "high":
                body.append(feeling())
        else:
            body = [situation(which), feeling()]
    elif episode.need == "weight":
        hint = _fresh(rng, lexicon.HINTS[content.unstated], spoken)
        if first and episode.origin == "stage" and mind.scenario.empathy_threshold == "high":
            body = [situation(0), situation(1), feeling()]
        else:
            body = [situation(which), hint]
            if rng.random() < _FEELING_TOO:
                body.append(feeling())
    elif episode.need == "meaning":
        strengths = mind.scenario.story.strengths
        strength = strengths[(episode.variant + (0 if first else rng.randrange(2))) % 2]
        body = [
            situation(which),
            _fresh(rng, lexicon.VALUE, spoken, v=mind.scenario.value),
            _fresh(rng, lexicon.STRENGTH, spoken, s=strength),
        ]
    else:
        story = mind.scenario.story
        index = (episode.variant + (0 if first else rng.randrange(2))) % 2
        body = [situation(which), _fresh(rng, lexicon.STEP, spoken, t=story.steps[index])]
        if rng.random() < _FEELING_TOO:
            body.append(feeling())
        else:
            body.append(_fresh(rng, lexicon.STRENGTH, spoken, s=story.strengths[1 - index]))
    if first and mind.reaction is not None and episode.origin == "stage" and rng.random() < _DISTRACT:
        past = (
            mind.scenario.story.stages[rng.randrange(episode.content)].particulars if episode.content else ()
        )
        said = [p for p in past if bare(p) in mind.said]
        if said:
            opening[-1:] = [_fresh(rng, lexicon.ASIDE, spoken, p=rng.choice(said))]
    if mind.last_action == "turning_point" and first:
        opening = [_fresh(rng, lexicon.TURNING, spoken)]
    if not first:
        rng.shuffle(body)
    return opening + body
