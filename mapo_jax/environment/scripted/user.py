"""The scripted user: speaks from the card by stage, mood, the last reply, and the director's guidance."""

import random
from dataclasses import dataclass

from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.scripted.assessment import routine
from mapo_jax.environment.scripted.fold import mind_at
from mapo_jax.environment.scripted.grammar import bare, realise
from mapo_jax.environment.scripted.lexicon import HINTS, MESSAGES, REACTIONS, WEARY
from mapo_jax.environment.scripted.mind import Mind, begin

_DISTRACT = 0.25  # share of new stages in which the user also dismisses an earlier matter
FEELING_TOO = 0.5  # share of weight and way messages that also state the feeling
_ATTEMPTS = 40  # draws for a message that is new; the second half adds an idle sentence
_LONGEST = 30  # words that a message should stay below, what it is tired of apart, as long as draws are left


@dataclass(frozen=True)
class ScriptedUser:
    """Pure given the state and its seed; never repeats a message within a dialogue."""

    delayed_opening: bool = True

    async def open(self, scenario: Scenario, seed: int) -> str:
        """The first message."""
        rng = random.Random(f"{seed}:{scenario.id}:open")
        return _speak(rng, begin(scenario, self.delayed_opening), ())

    async def reply(self, state: DialogueState) -> str:
        """The next message after a finished turn."""
        mind = mind_at(state, self.delayed_opening)
        rng = random.Random(f"{state.seed}:{state.turn_count}:user")
        return _speak(rng, mind, tuple(turn.user for turn in state.turns))


def _speak(rng: random.Random, mind: Mind, earlier: tuple[str, ...]) -> str:
    """A message that is not among the earlier ones."""
    spoken = " ".join(earlier)
    tired = [pool for act, pool in WEARY.items() if routine(mind, act) and not mind.closed]
    weary = [_fresh(rng, pool, spoken) for pool in tired]
    for attempt in range(_ATTEMPTS):
        sentences = _compose(rng, mind, spoken)
        late = attempt >= _ATTEMPTS // 2
        if late:  # every sentence that fits has been said
            sentences.insert(rng.randrange(len(sentences) + 1), _fresh(rng, MESSAGES["idle"], spoken))
        message = " ".join(sentences + weary)
        if message not in earlier and (late or " ".join(sentences).count(" ") < _LONGEST):
            return message
    sentences += [*weary, *rng.choices(MESSAGES["idle"], k=2)]
    while " ".join(sentences) in earlier:
        sentences.append(rng.choice(MESSAGES["idle"]))
    return " ".join(sentences)


def _fresh(rng: random.Random, pool: tuple[str, ...], spoken: str, **slots: str) -> str:
    """A sentence of the pool, one not yet spoken if any is left."""
    sentences = [realise(frame, slots) for frame in pool]
    return rng.choice([sentence for sentence in sentences if sentence not in spoken] or sentences)


def _compose(rng: random.Random, mind: Mind, spoken: str) -> list[str]:
    content, episode, story = mind.content, mind.episode, mind.scenario.story
    first, new_stage = mind.messages == 0, mind.messages == 0 and episode.origin == "stage"
    guarded = mind.scenario.empathy_threshold == "high"

    def sentence(purpose: str, **slots: str) -> str:
        return _fresh(rng, MESSAGES[purpose], spoken, **slots)

    def situation(which: int) -> str:
        line = content.line[which]
        return line if line not in spoken else sentence("particular", p=content.particulars[which])

    def feeling() -> str:
        return sentence("feeling", f=content.feeling)

    def alternative() -> int:
        """Which of the card's two strengths or steps."""
        return (episode.variant + (0 if first else rng.randrange(2))) % 2

    opening = []
    if mind.reaction is not None:
        opening.append(_fresh(rng, REACTIONS[mind.reaction], spoken))
    if mind.closed:
        if rng.random() < 0.5:
            return [*opening, sentence("curt_particular", p=rng.choice(content.particulars))]
        return [*opening, sentence("curt")]

    which = 0 if new_stage else rng.randrange(2)
    if episode.need == "heard":
        if episode.origin == "memory" and first and mind.heard:
            body = [sentence("memory", p=content.particulars[which]), feeling()]
        elif first:
            body = [situation(0), situation(1)]
            if not guarded:  # a guarded person tells what happened first, and the feeling later
                body.append(feeling())
        else:
            body = [situation(which), feeling()]
    elif episode.need == "weight":
        hint = _fresh(rng, HINTS[content.unstated], spoken)
        if new_stage and guarded:
            body = [situation(0), situation(1), feeling()]
        else:
            body = [situation(which), hint]
            if rng.random() < FEELING_TOO:
                body.append(feeling())
    elif episode.need == "meaning":
        strength = story.strengths[alternative()]
        body = [situation(which), sentence("value", v=mind.scenario.value), sentence("strength", s=strength)]
    else:
        index = alternative()
        body = [situation(which), sentence("step", t=story.steps[index])]
        too = rng.random() < FEELING_TOO
        body.append(feeling() if too else sentence("strength", s=story.strengths[1 - index]))
    if new_stage and mind.reaction is not None and rng.random() < _DISTRACT and episode.content:
        past = story.stages[rng.randrange(episode.content)].particulars
        said = [p for p in past if bare(p) in mind.said]
        if said:
            opening[-1:] = [sentence("aside", p=rng.choice(said))]
    if mind.last_action == "turning_point" and first:
        opening = [sentence("turning")]
    if not first:
        rng.shuffle(body)
    return opening + body
