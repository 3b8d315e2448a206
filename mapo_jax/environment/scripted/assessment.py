"""Scores a reply to the scripted user: levels with evidence and reasons, and the user's mind after it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mapo_jax.environment.card_schema import UNSTATED
from mapo_jax.environment.dialogue import Judgement
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.scripted.grammar import HARMFUL, HELPFUL, Reading, Sentence, bare, coherent, read
from mapo_jax.environment.scripted.lexicon import REACTIONS
from mapo_jax.environment.scripted.mind import Mind, phrases
from mapo_jax.environment.state import AXES, PROGRESS_POINTS

NEED_AXIS = {"heard": "A", "weight": "A", "meaning": "C", "way": "P"}
# For each helpful act: the slot that it names, and what the filler is.
SLOT_OF = dict(zip(HELPFUL, "pffsvt", strict=True))
WHAT = dict(zip(HELPFUL, ("situation", "feeling", "unstated", "strength", "value", "step"), strict=True))

LONGEST_SENTENCES, LONGEST_WORDS = 3, 45
MOST_ACTS = 2  # different helpful acts in one reply; a reply with more is guessing
FRAME_MEMORY = 3  # replies within which a construction counts as used
SENTENCE_MEMORY = 8  # replies for which the user knows a sentence again
KIND_MEMORY, KIND_MOST = 6, 3  # an act in more than KIND_MOST of KIND_MEMORY replies is a routine
KIND_RUNNING = 3  # an act in this many consecutive replies is a routine as well
EPISODE_POINTS = 4  # most points per axis and episode
CLOSED_TURNS = 2  # turns for which a harmful reply closes the user
ECHO_SHARE = 0.5  # share of word triples from the user's messages from which a sentence is a copy

EXCERPT = 200  # most characters of a reply quoted as evidence

Pairs = Sequence[tuple[str, Sentence]]  # the sentences of a reply, each with its kind


class Assessment(NamedTuple):
    """A judged reply, and the mind after it.

    The judgement's `reading` says what was recognised: `kind`; `acts`; `named`, what the reply named, and
    whether it was right; `stage`, the highest story stage revealed when the reply came; and `need`.
    """

    judgement: Judgement
    after: Mind


@dataclass
class _Tally:
    """Collects what the sentences of one reply do."""

    # Best progress and worst harm per axis: (level, evidence, reason).
    progress: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    harm: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    cancelled: bool = False  # nothing in this reply counts as progress
    barred: set[str] = field(default_factory=set)  # axes without progress
    reactions: set[str] = field(default_factory=set)  # keys of lexicon.REACTIONS
    named: list[tuple[str, str, bool]] = field(default_factory=list)  # (what, filler, right)
    credited: set[tuple[str, str]] = field(default_factory=set)  # (act, filler) that brought progress

    def gain(self, axis: str, level: int, evidence: str, reason: str) -> None:
        if level > self.progress.get(axis, (0, "", ""))[0]:
            self.progress[axis] = (level, evidence, reason)

    def hurt(
        self, levels: dict[str, int], evidence: str, reason: str, reaction: str = "", cancel: bool = False
    ) -> None:
        for axis, level in levels.items():
            if level < self.harm.get(axis, (0, "", ""))[0]:
                self.harm[axis] = (level, evidence, reason)
        if reaction:
            self.reactions.add(reaction)
        self.cancelled = self.cancelled or cancel


# For each act that always harms: levels, reason, and how the user takes it.
HARMS = {
    "template": ({"C": -1, "A": -1}, "an empty template", "empty"),
    "advise": ({"P": -2}, "pushes a plan on the user", "pushed"),
    "lecture": ({"A": -1, "P": -2}, "lectures", "pushed"),
    "dismiss": ({"C": -1, "A": -2}, "plays the trouble down", "hurtful"),
    "blame": ({"A": -2, "P": -2}, "puts the blame on the user", "hurtful"),
    "praise": ({"A": -1, "P": -1}, "flatters without having seen anything", "empty"),
    "farewell": ({"C": -1, "A": -1, "P": -1}, "leaves while the user is still talking", "hurtful"),
}


class Help(NamedTuple):
    """What a helpful act brings that names something right."""

    axis: str
    level: int
    reason: str
    reaction: str
    needs: tuple[str, ...]  # in which it brings this


_HELP = {
    "reflect_situation": Help("C", 1, "takes up the situation", "situation", ("heard", "weight", "way")),
    "name_feeling": Help("A", 1, "names the stated feeling", "feeling", ("heard", "weight", "way")),
    "name_unstated": Help("A", 2, "names the feeling behind", "unstated", ("weight",)),
    "affirm_strength": Help("P", 1, "affirms a strength of the person's own", "strength", ("meaning", "way")),
    "reframe": Help("C", 2, "ties it to what matters to the person", "reframe", ("meaning",)),
    "offer_step": Help("P", 2, "offers a step as a choice", "step", ("way",)),
}
# Reason, and how the user takes it, of acts that harm in any other need.
_EARLY = {
    "name_unstated": ("digs for hidden feelings before the person feels heard", "early"),
    "reframe": ("explains before the ground is laid", "early"),
    "offer_step": ("offers a way out before the time has come", "pushed"),
}
_MISNAMED = {
    "stale": ("belongs to an earlier part", "stale"),
    "unsaid": ("has not been said yet", "early"),
    "wrong": ("is not theirs", "misread"),
}
_REPAIRED = "owns the misstep"  # reason of the progress that a repair brings
# The first of these acts gives a reply with several acts its kind: harm first, then the most advanced help.
_HELPS = ("offer_step", "reframe", "name_unstated", "affirm_strength", "name_feeling", "reflect_situation")
_KIND_ORDER = (*HARMFUL, "incoherent", "echo", *_HELPS, "repair", "ask", "presence", "other")


def assess(mind: Mind, reply: str) -> Assessment:
    """Judges a reply to the user's last message."""
    reading = read(reply)
    tally = _Tally()
    pairs = [(_classify(mind, sentence, reading.clean), sentence) for sentence in reading.sentences]
    if not pairs:
        again = bool(mind.kinds) and not mind.kinds[-1]
        levels = {"C": -1, "A": -2 if again else -1}
        tally.hurt(levels, _excerpt(reply), "says nothing", "silent", cancel=True)
    _judge_form(reading, pairs, tally)
    _judge_repetition(mind, pairs, tally)

    # A closed user accepts nothing but a repair.
    repair = next((s for kind, s in pairs if kind == "repair"), None)
    owed = repair is not None and (mind.closed or mind.harmed)
    if owed and mind.closed:
        tally.gain("A", 1, repair.text, _REPAIRED)
        tally.reactions.add("repaired")
    elif repair is not None and not owed:
        tally.hurt({"A": -1}, repair.text, "apologises for nothing", "lost")
    served = False
    for kind, sentence in pairs:
        if kind in HELPFUL:
            served |= _judge_help(mind, kind, sentence, tally)
        elif kind == "ask":
            tally.reactions.add("asked")
            said = dict(sentence.slots)["p"]
            if _standing(mind, "p", said) != "right":
                tally.hurt({"C": -1}, sentence.text, f"asks about `{said}`, which is not at hand", "misread")
        elif kind == "incoherent" and sentence.kind in HELPFUL:
            # The filler is no phrase of this world: not an act, but a wrong name.
            filler = dict(sentence.slots)[SLOT_OF[sentence.kind]]
            tally.named.append((WHAT[sentence.kind], filler, False))

    idle = mind.idle
    if not mind.closed and not owed and (tally.cancelled or not served):
        idle += 1
        if idle >= 2:
            levels = {NEED_AXIS[mind.episode.need]: -1 if idle == 2 else -2}
            reason = "leaves the need of this moment unanswered"
            tally.hurt(levels, _excerpt(reply), reason, "shallow", cancel=True)
    for axis in tally.barred:
        tally.progress.pop(axis, None)
    if tally.cancelled or mind.closed:
        repaired = {axis: gain for axis, gain in tally.progress.items() if gain[2] == _REPAIRED}
        tally.progress = {} if tally.cancelled else repaired
        tally.credited.clear()
    return _conclude(mind, reply, tally, pairs, idle)


def _classify(mind: Mind, sentence: Sentence, clean: bool) -> str:
    """One of KINDS, or incoherent, echo, other."""
    if not clean:
        return "incoherent"
    if sentence.kind is None and _copied(mind, sentence):
        return "echo"
    # A construction filled with words that are no phrase of this world is not coherent either.
    return (sentence.kind or "other") if coherent(mind.scenario, sentence.words) else "incoherent"


def _copied(mind: Mind, sentence: Sentence) -> bool:
    words = sentence.words.split()
    if len(words) < 3:
        return any(f" {sentence.words} " in f" {message} " for message in mind.heard_words)
    triples = _triples(words)
    user_triples = set().union(*(_triples(message.split()) for message in mind.heard_words))
    return len(triples & user_triples) >= ECHO_SHARE * len(triples)


def _triples(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(words, words[1:], words[2:], strict=False))


def _excerpt(reply: str) -> str:
    """Evidence where no single sentence is to be quoted."""
    return " ".join(reply.split())[:EXCERPT] or "(nothing)"


def _judge_form(reading: Reading, pairs: Pairs, tally: _Tally) -> None:
    """Harm by the form of the reply, whatever it names."""
    acts = {kind for kind, _ in pairs}
    for kind, sentence in pairs:
        text = sentence.text
        if kind == "incoherent":
            tally.hurt({"C": -1, "A": -1, "P": -1}, text, "is no coherent sentence", "lost", cancel=True)
        elif kind == "echo":
            first_person = set(sentence.words.split()) & {"i", "me", "my"}
            levels = {"C": -1, "A": -2 if first_person else -1}
            tally.hurt(levels, text, "echoes the user's words", "ignored", cancel=True)
        elif kind == "other":
            tally.hurt({"C": -1}, text, "says nothing to the point")
            if acts <= {"other", "presence"}:
                tally.hurt({"A": -1}, text, "passes the person by", "ignored")
        elif kind in HARMFUL:
            levels, reason, reaction = HARMS[kind]
            tally.hurt(levels, text, reason, reaction, cancel=True)
    if not pairs:
        return
    whole = _excerpt(" ".join(sentence.text for _, sentence in pairs))
    if acts == {"presence"}:
        tally.hurt({"C": -1}, whole, "is there, but takes nothing up", "ignored")
    if len(pairs) > LONGEST_SENTENCES or reading.word_count > LONGEST_WORDS:
        tally.hurt({"A": -1, "P": -1}, whole, "is over-long and buries the person", "pushed", cancel=True)
    helpful = [kind for kind, _ in pairs if kind in HELPFUL]
    if len(set(helpful)) > MOST_ACTS or len(set(helpful)) < len(helpful):
        tally.hurt({"C": -1, "A": -1}, whole, "fires guesses at random", "misread", cancel=True)
    if reading.shouted:
        tally.hurt({"A": -2}, whole, "shouts", "hurtful", cancel=True)


def routine(mind: Mind, kind: str) -> bool:
    """Whether one more act of this kind is a routine."""
    last = mind.kinds[-(KIND_RUNNING - 1) :]
    running = len(last) == KIND_RUNNING - 1 and all(kind in kinds for kinds in last)
    return running or sum(kind in kinds for kinds in mind.kinds[-(KIND_MEMORY - 1) :]) >= KIND_MOST


def _judge_repetition(mind: Mind, pairs: Pairs, tally: _Tally) -> None:
    """Harm by sentences, constructions and acts that are repeated."""
    for i, (kind, sentence) in enumerate(pairs):
        text, earlier = sentence.text, {other.words for _, other in pairs[:i]}
        if sentence.words in mind.known or sentence.words in earlier:
            # The first repetition is a slip; another one, or one within a reply, is a routine.
            slip = not mind.repeats and sentence.words not in earlier
            levels = {"A": -1 if slip else -2}
            tally.hurt(levels, text, "repeats an earlier sentence", "routine", cancel=True)
        elif sentence.frame is not None and any(sentence.frame in frames for frames in mind.frames):
            tally.hurt({"A": -1}, text, "wears out the same wording", "routine")
            tally.barred.add("A")
        if routine(mind, kind):
            tally.hurt({"A": -2}, text, "the same routine again", "routine", cancel=True)
        if kind == "ask" and mind.kinds and "ask" in mind.kinds[-1]:
            tally.hurt({"A": -1}, text, "questions the user one time after another", "routine", cancel=True)


def _standing(mind: Mind, letter: str, filler: str) -> str:
    """Whether a filler is right, stale (of an earlier part), unsaid (so far), or wrong."""
    content = mind.content
    if letter not in ("p", "f"):
        return "right" if filler in mind.said and filler in phrases(mind.scenario) else "wrong"
    if letter == "p":
        current, mentioned, before = filler in content.particulars, filler in mind.said, mind.said
    elif filler in UNSTATED:
        current, mentioned, before = filler == content.unstated, filler in mind.said_now, mind.hinted
    else:
        current, mentioned, before = filler == content.feeling, filler in mind.said_now, mind.said
    if current:
        return "right" if mentioned else "unsaid"
    return "stale" if filler in before else "wrong"


def card_phrases(scenario: Scenario, kind: str) -> tuple[str, ...]:
    """The phrases of the card that affirm_strength, offer_step or reframe may name."""
    if kind == "reframe":
        return (scenario.value,)
    return scenario.story.strengths if kind == "affirm_strength" else scenario.story.steps


def _judge_help(mind: Mind, kind: str, sentence: Sentence, tally: _Tally) -> bool:
    """Scores one helpful act; returns whether it serves the need of the episode."""
    slots = dict(sentence.slots)
    filler, text, need = slots[SLOT_OF[kind]], sentence.text, mind.episode.need
    standing = _standing(mind, SLOT_OF[kind], filler)
    phrase_of_card = kind in ("affirm_strength", "offer_step", "reframe")
    if phrase_of_card and filler not in map(bare, card_phrases(mind.scenario, kind)):
        standing = "wrong"
    tally.named.append((WHAT[kind], filler, standing == "right"))
    if kind == "reframe" and "p" in slots:
        beside = _standing(mind, "p", slots["p"])
        tally.named.append(("situation", slots["p"], beside == "right"))
        if beside != "right":
            standing, filler = "stale" if beside == "stale" else "wrong", slots["p"]
    if standing != "right":
        _judge_misnaming(mind, kind, filler, standing, text, tally)
        return False

    help = _HELP[kind]
    if need not in help.needs:
        if kind in _EARLY:
            level = -2 if kind == "offer_step" and not mind.heard else -1
            tally.hurt({help.axis: level}, text, *_EARLY[kind])
        return False
    tally.reactions.add(help.reaction)
    if (kind, filler) in mind.credited:
        tally.hurt({"A": -1}, text, f"`{filler}` has been named already", "routine")
        return False
    tally.credited.add((kind, filler))
    level, reason = help.level, f"{help.reason}: `{filler}`"
    if kind in ("reframe", "offer_step") and mind.delayed_opening and not mind.deep:
        level, reason = 1, reason + "; but the person was never fully heard, and opens only half way"
    tally.gain(help.axis, level, text, reason)
    if kind in ("reflect_situation", "name_feeling"):
        return need == "heard" or (need == "weight" and not mind.unstated_hinted)
    return kind != "affirm_strength"


def _judge_misnaming(mind: Mind, kind: str, filler: str, standing: str, text: str, tally: _Tally) -> None:
    """Harm by a filler that is wrong, of an earlier part, or not said yet."""
    if kind in ("reflect_situation", "reframe"):
        levels = {"C": -2 if standing == "wrong" else -1}
    elif kind in ("name_feeling", "name_unstated"):
        mild = standing == "stale" or (kind == "name_unstated" and standing == "unsaid")
        levels = {"A": -1} if mild else {"A": -1, "C": -1}
    else:
        hasty = kind == "offer_step" and not mind.heard
        levels = {"C": -1, "P": -2 if hasty else -1}
    reason, reaction = _MISNAMED[standing]
    tally.hurt(levels, text, f"`{filler}` {reason}", reaction)


def _conclude(mind: Mind, reply: str, tally: _Tally, pairs: Pairs, idle: int) -> Assessment:
    """Levels with their reasons, and the mind after the reply."""
    acts = frozenset(kind for kind, _ in pairs)
    excerpt = _excerpt(reply)
    levels, evidence, reasons = [], [], []
    points = list(mind.points)
    for i, axis in enumerate(AXES):
        level, proof, reason = tally.progress.get(axis, (0, excerpt, f"brings nothing new on {axis}"))
        while level and points[i] + PROGRESS_POINTS[level] > EPISODE_POINTS:
            level, reason = level - 1, "more of the same; this part of the story has had its share"
        points[i] += PROGRESS_POINTS[level]
        harm, harm_proof, harm_reason = tally.harm.get(axis, (0, excerpt, f"does no harm on {axis}"))
        levels += [level, harm]
        evidence += [proof, harm_proof or excerpt]
        reasons += [reason, harm_reason]
    worst = min(levels[1::2])
    if worst == -2 or (worst < 0 and (mind.harmed or mind.closed)):
        closed = CLOSED_TURNS
    else:
        closed = 0 if "repair" in acts and worst == 0 else max(0, mind.closed - 1)

    words = frozenset(sentence.words for _, sentence in pairs)
    credited = mind.credited | tally.credited
    met = mind.met or _met(mind, credited)
    first = mind.episode.origin == "stage" and mind.episode.content == 0
    heard_fully = first and {"reflect_situation", "name_feeling"} <= {kind for kind, _ in credited}
    after = replace(
        mind,
        credited=credited,
        points=tuple(points),
        met=met,
        idle=idle,
        closed=closed,
        harmed=worst < 0,
        heard=mind.heard or met,
        deep=mind.deep or heard_fully,
        sentences=(*mind.sentences, words)[-SENTENCE_MEMORY:],
        repeats=mind.repeats + bool(words & mind.known),
        frames=(*mind.frames, frozenset(s.frame for _, s in pairs if s.frame))[-FRAME_MEMORY:],
        kinds=(*mind.kinds, acts)[-KIND_MEMORY:],
        reaction=next((name for name in REACTIONS if name in tally.reactions), None),
    )
    reading = {
        "kind": next((kind for kind in _KIND_ORDER if kind in acts), "silence"),
        "acts": [kind for kind, _ in pairs],
        "named": [{"what": what, "said": filler, "right": right} for what, filler, right in tally.named],
        "stage": mind.stage,
        "need": mind.episode.need,
    }
    return Assessment(Judgement(tuple(levels), tuple(evidence), tuple(reasons), reading), after)


def _met(mind: Mind, credited: frozenset[tuple[str, str]]) -> bool:
    """Whether the need of the episode is met."""
    need, threshold = mind.episode.need, mind.scenario.empathy_threshold
    kinds = [kind for kind, _ in credited]
    if need != "heard":
        return {"weight": "name_unstated", "meaning": "reframe", "way": "offer_step"}[need] in kinds
    if mind.episode.origin == "memory" and mind.heard:
        return bool(kinds)
    situation, feeling = kinds.count("reflect_situation"), kinds.count("name_feeling")
    if threshold == "low":
        return situation + feeling >= 1
    return feeling >= 1 and situation >= (1 if threshold == "medium" else 2)
