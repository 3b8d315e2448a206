"""What a reply does to the scripted user: levels with evidence and reasons, and the mind after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mapo_jax.environment.scenario import AXES, UNSTATED, Scenario
from mapo_jax.environment.scripted.grammar import (
    HARMFUL,
    HELPFUL,
    Reading,
    Sentence,
    bare,
    coherent,
    read,
)
from mapo_jax.environment.scripted.mind import Mind, phrases
from mapo_jax.environment.state import PROGRESS_POINTS

NEED_AXIS = {"heard": "A", "weight": "A", "meaning": "C", "way": "P"}
SLOT_OF = {
    "reflect_situation": "p",
    "name_feeling": "f",
    "name_unstated": "f",
    "affirm_strength": "s",
    "reframe": "v",
    "offer_step": "t",
}
WHAT = {
    "reflect_situation": "situation",
    "name_feeling": "feeling",
    "name_unstated": "unstated",
    "affirm_strength": "strength",
    "reframe": "value",
    "offer_step": "step",
}

LONGEST_SENTENCES, LONGEST_WORDS = 3, 45
MOST_ACTS = 2  # different helpful acts in one reply; more is scattershot
FRAME_MEMORY = 3  # replies within which a construction counts as used up
KIND_MEMORY, KIND_MOST = 6, 3  # an act in more than KIND_MOST of KIND_MEMORY replies is a routine
KIND_RUNNING = 3  # and so is one in this many replies running
EPISODE_POINTS = 4  # most points per axis and episode
CLOSED_TURNS = 2  # a careless turn closes the person for so many turns
ECHO_SHARE = 0.5  # share of word triples that stem from the user: copying

EXCERPT = 200  # most characters of a reply quoted as evidence

Pairs = Sequence[tuple[str, Sentence]]  # the sentences of a reply, each with its kind


@dataclass(frozen=True)
class Assessment:
    """A judged reply: levels with evidence and reasons, what was read, and the mind after it."""

    levels: tuple[int, int, int, int, int, int]
    evidence: tuple[str, ...]
    reasons: tuple[str, ...]
    kind: str
    acts: tuple[str, ...]
    named: tuple[tuple[str, str, bool], ...]  # (what, filler, right)
    stage: int  # highest story stage revealed when the reply came
    need: str
    after: Mind


class _Tally:
    """Best progress and worst harm per axis, with the sentence and the reason behind each."""

    def __init__(self) -> None:
        self.progress: dict[str, tuple[int, str, str]] = {}
        self.harm: dict[str, tuple[int, str, str]] = {}
        self.cancelled = False  # nothing in this reply counts as progress
        self.barred: set[str] = set()  # axes on which nothing does

    def gain(self, axis: str, level: int, evidence: str, reason: str) -> None:
        if level > self.progress.get(axis, (0, "", ""))[0]:
            self.progress[axis] = (level, evidence, reason)

    def hurt(self, levels: dict[str, int], evidence: str, reason: str, cancel: bool = False) -> None:
        for axis, level in levels.items():
            if level < self.harm.get(axis, (0, "", ""))[0]:
                self.harm[axis] = (level, evidence, reason)
        self.cancelled = self.cancelled or cancel


_HARM_OF = {
    "template": {"C": -1, "A": -1},
    "advise": {"P": -2},
    "lecture": {"A": -1, "P": -2},
    "dismiss": {"C": -1, "A": -2},
    "blame": {"A": -2, "P": -2},
    "praise": {"A": -1, "P": -1},
    "farewell": {"C": -1, "A": -1, "P": -1},
}
_WHY_HARM = {
    "template": "an empty template",
    "advise": "pushes a plan on the user",
    "lecture": "lectures",
    "dismiss": "plays the trouble down",
    "blame": "puts the blame on the user",
    "praise": "flatters without having seen anything",
    "farewell": "leaves while the user is still talking",
}
# The first of these that a reply set off decides how the user takes it.
_REACTION_ORDER = (
    "silent",
    "lost",
    "hurtful",
    "pushed",
    "empty",
    "routine",
    "misread",
    "stale",
    "early",
    "ignored",
    "shallow",
    "repaired",
    "unstated",
    "reframe",
    "step",
    "feeling",
    "strength",
    "situation",
    "asked",
)
_REACTION_TO = {
    "template": "empty",
    "praise": "empty",
    "advise": "pushed",
    "lecture": "pushed",
    "dismiss": "hurtful",
    "blame": "hurtful",
    "farewell": "hurtful",
}
# The act that names a reply's kind when it holds several: harm first, then the deepest help.
_KIND_ORDER = (
    *HARMFUL,
    "incoherent",
    "echo",
    "offer_step",
    "reframe",
    "name_unstated",
    "affirm_strength",
    "name_feeling",
    "reflect_situation",
    "repair",
    "ask",
    "presence",
    "other",
)


def _classify(mind: Mind, sentence: Sentence, clean: bool) -> str:
    """One of KINDS, or incoherent, echo, other."""
    if not clean:
        return "incoherent"
    if sentence.kind is not None:
        # A construction filled with words that are no phrase of this world is no sentence either.
        return sentence.kind if coherent(mind.scenario, sentence.words) else "incoherent"
    words = sentence.words.split()
    if len(words) < 3:
        copied = any(f" {sentence.words} " in f" {message} " for message in mind.heard_words)
    else:
        triples = _triples(words)
        theirs = set().union(*(_triples(message.split()) for message in mind.heard_words))
        copied = len(triples & theirs) >= ECHO_SHARE * len(triples)
    if copied:
        return "echo"
    return "other" if coherent(mind.scenario, sentence.words) else "incoherent"


def assess(mind: Mind, reply: str) -> Assessment:
    """Judges a reply to the user's last message."""
    reading = read(reply)
    tally = _Tally()
    reactions: set[str] = set()
    named: list[tuple[str, str, bool]] = []
    served = False
    credited: set[tuple[str, str]] = set()
    kinds = [_classify(mind, sentence, reading.clean) for sentence in reading.sentences]
    pairs = list(zip(kinds, reading.sentences, strict=True))

    if not pairs:
        again = bool(mind.kinds) and not mind.kinds[-1]
        tally.hurt({"C": -1, "A": -2 if again else -1}, _excerpt(reply), "says nothing", cancel=True)
        reactions.add("silent")
    _judge_form(reading, pairs, tally, reactions)
    _judge_repetition(mind, pairs, tally, reactions)

    # A closed person takes in nothing but an honest repair.
    repair = next((s for kind, s in pairs if kind == "repair"), None)
    if repair is not None:
        if mind.closed:
            tally.gain("A", 1, repair.text, "owns the misstep")
            reactions.add("repaired")
        elif not mind.harmed:
            tally.hurt({"A": -1}, repair.text, "apologises for nothing")
            reactions.add("lost")
    for kind, sentence in pairs:
        if kind in HELPFUL:
            right = _judge_help(mind, kind, sentence, tally, reactions, named, credited)
            served = served or right
        elif kind == "ask":
            reactions.add("asked")
            filler = dict(sentence.slots)["p"]
            if _standing(mind, "p", filler) != "right":
                tally.hurt({"C": -1}, sentence.text, f"asks about `{filler}`, which is not at hand")
                reactions.add("misread")
        elif kind == "incoherent" and sentence.kind in HELPFUL:
            # Names something that is no phrase of this world: no act, but a name that was wrong.
            filler = dict(sentence.slots)[SLOT_OF[sentence.kind]]
            named.append((WHAT[sentence.kind], filler, False))

    served = served and not tally.cancelled
    idle = mind.idle
    if mind.closed == 0 and not served and repair is None:
        idle += 1
        if idle >= 2:
            axis = NEED_AXIS[mind.episode.need]
            level = -1 if idle == 2 else -2
            tally.hurt({axis: level}, _excerpt(reply), "leaves the need of this moment unanswered")
            tally.cancelled = True
            reactions.add("shallow")
    for axis in tally.barred:
        tally.progress.pop(axis, None)
    if tally.cancelled:
        tally.progress.clear()
        credited.clear()
    elif mind.closed:
        tally.progress = {a: g for a, g in tally.progress.items() if g[2] == "owns the misstep"}
        credited.clear()
    return _conclude(mind, reply, tally, reactions, pairs, named, credited, idle)


def _triples(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(words, words[1:], words[2:], strict=False))


def _excerpt(reply: str) -> str:
    """What of a reply is quoted as evidence when no one sentence stands out."""
    return " ".join(reply.split())[:EXCERPT] or "(nothing)"


def _judge_form(reading: Reading, pairs: Pairs, tally: _Tally, reactions: set[str]) -> None:
    """Harm that lies in the form of the reply, whatever it names."""
    acts = {kind for kind, _ in pairs}
    for kind, sentence in pairs:
        if kind == "incoherent":
            tally.hurt({"C": -1, "A": -1, "P": -1}, sentence.text, "is no coherent sentence", cancel=True)
            reactions.add("lost")
        elif kind == "echo":
            own = set(sentence.words.split()) & {"i", "me", "my"}
            tally.hurt(
                {"C": -1, "A": -2 if own else -1}, sentence.text, "echoes the user's words", cancel=True
            )
            reactions.add("ignored")
        elif kind == "other":
            tally.hurt({"C": -1}, sentence.text, "says nothing to the point")
            if acts <= {"other", "presence"}:
                tally.hurt({"A": -1}, sentence.text, "passes the person by")
                reactions.add("ignored")
        elif kind in HARMFUL:
            tally.hurt(_HARM_OF[kind], sentence.text, _WHY_HARM[kind], cancel=True)
            reactions.add(_REACTION_TO[kind])
    if not pairs:
        return
    whole = _excerpt(" ".join(sentence.text for _, sentence in pairs))
    if acts == {"presence"}:
        tally.hurt({"C": -1}, whole, "is there, but takes nothing up")
        reactions.add("ignored")
    if len(pairs) > LONGEST_SENTENCES or reading.word_count > LONGEST_WORDS:
        tally.hurt({"A": -1, "P": -1}, whole, "is over-long and buries the person", cancel=True)
        reactions.add("pushed")
    helpful = [kind for kind, _ in pairs if kind in HELPFUL]
    if len(set(helpful)) > MOST_ACTS or len(set(helpful)) < len(helpful):
        tally.hurt({"C": -1, "A": -1}, whole, "fires guesses at random", cancel=True)
        reactions.add("misread")
    if reading.shouted:
        tally.hurt({"A": -2}, whole, "shouts", cancel=True)
        reactions.add("hurtful")


def _judge_repetition(mind: Mind, pairs: Pairs, tally: _Tally, reactions: set[str]) -> None:
    """Harm of sentences, constructions and acts that come again and again."""
    for i, (kind, sentence) in enumerate(pairs):
        earlier = {other.words for _, other in pairs[:i]}
        if sentence.words in mind.sentences or sentence.words in earlier:
            # Once is a slip; again, or within one reply, is a routine.
            slip = not mind.repeats and sentence.words not in earlier
            tally.hurt({"A": -1 if slip else -2}, sentence.text, "repeats an earlier sentence", cancel=True)
            reactions.add("routine")
        elif sentence.frame is not None and any(sentence.frame in frames for frames in mind.frames):
            tally.hurt({"A": -1}, sentence.text, "wears out the same wording")
            tally.barred.add("A")
            reactions.add("routine")
        recent = mind.kinds[-(KIND_MEMORY - 1) :]
        running = mind.kinds[-(KIND_RUNNING - 1) :]
        often = sum(kind in kinds for kinds in recent) >= KIND_MOST
        row = len(running) == KIND_RUNNING - 1 and all(kind in kinds for kinds in running)
        if often or row:
            tally.hurt({"A": -2}, sentence.text, "the same routine again", cancel=True)
            reactions.add("routine")
        if kind == "ask" and mind.kinds and "ask" in mind.kinds[-1]:
            tally.hurt({"A": -1}, sentence.text, "questions the user one time after another", cancel=True)
            reactions.add("routine")


def _standing(mind: Mind, letter: str, filler: str) -> str:
    """How a filler relates to what the user has said: right, stale (earlier), unsaid (not yet), or wrong."""
    content = mind.content
    if letter == "p":
        if filler in content.particulars:
            return "right" if filler in mind.said else "unsaid"
        return "stale" if filler in mind.said else "wrong"
    if letter == "f":
        if filler in UNSTATED:
            if filler == content.unstated:
                return "right" if filler in mind.said_now else "unsaid"
            return "stale" if filler in mind.hinted else "wrong"
        if filler == content.feeling:
            return "right" if filler in mind.said_now else "unsaid"
        return "stale" if filler in mind.said else "wrong"
    return "right" if filler in mind.said and filler in phrases(mind.scenario) else "wrong"


def _own_phrases(scenario: Scenario, kind: str) -> tuple[str, ...]:
    story = scenario.story
    texts = {"affirm_strength": story.strengths, "offer_step": story.steps, "reframe": (scenario.value,)}[
        kind
    ]
    return tuple(bare(text) for text in texts)


def _judge_help(
    mind: Mind,
    kind: str,
    sentence: Sentence,
    tally: _Tally,
    reactions: set[str],
    named: list[tuple[str, str, bool]],
    credited: set[tuple[str, str]],
) -> bool:
    """Scores one helpful act; returns whether it serves the need of the episode."""
    slots = dict(sentence.slots)
    letter = SLOT_OF[kind]
    filler, text, need = slots[letter], sentence.text, mind.episode.need
    standing = _standing(mind, letter, filler)
    if kind in ("affirm_strength", "offer_step", "reframe") and filler not in _own_phrases(
        mind.scenario, kind
    ):
        standing = "wrong"
    named.append((WHAT[kind], filler, standing == "right"))
    if kind == "reframe" and "p" in slots:
        beside = _standing(mind, "p", slots["p"])
        named.append(("situation", slots["p"], beside == "right"))
        if beside != "right":
            standing = "wrong" if beside != "stale" else "stale"
            filler = slots["p"]

    if standing != "right":
        _judge_misnaming(mind, kind, filler, standing, text, tally, reactions)
        return False

    def gain(axis: str, level: int, reason: str) -> bool:
        if (kind, filler) in mind.credited:
            tally.hurt({"A": -1}, text, f"`{filler}` has been named already")
            reactions.add("routine")
            return False
        credited.add((kind, filler))
        second = level == 2 and kind in ("reframe", "offer_step")
        if second and mind.delayed_opening and not mind.deep:
            level, reason = 1, reason + "; but the person was never fully heard, and opens only half way"
        tally.gain(axis, level, text, reason)
        return True

    if kind in ("reflect_situation", "name_feeling"):
        if need == "meaning":
            return False
        situation = kind == "reflect_situation"
        reactions.add("situation" if situation else "feeling")
        what = "takes up the situation" if situation else "names the stated feeling"
        fresh = gain("C" if situation else "A", 1, f"{what}: `{filler}`")
        return fresh and (need == "heard" or (need == "weight" and not mind.unstated_hinted))
    if kind == "name_unstated":
        if need == "weight":
            reactions.add("unstated")
            return gain("A", 2, f"names the feeling behind: `{filler}`")
        tally.hurt({"A": -1}, text, "digs for hidden feelings before the person feels heard")
        reactions.add("early")
        return False
    if kind == "affirm_strength":
        if need in ("meaning", "way"):
            reactions.add("strength")
            gain("P", 1, f"affirms a strength of the person's own: `{filler}`")
        return False
    if kind == "reframe":
        if need == "meaning":
            reactions.add("reframe")
            return gain("C", 2, f"ties it to what matters to the person: `{filler}`")
        tally.hurt({"C": -1}, text, "explains before the ground is laid")
        reactions.add("early")
        return False
    if need == "way":
        reactions.add("step")
        return gain("P", 2, f"offers a step as a choice: `{filler}`")
    tally.hurt({"P": -1 if mind.heard else -2}, text, "offers a way out before the time has come")
    reactions.add("pushed")
    return False


def _judge_misnaming(
    mind: Mind, kind: str, filler: str, standing: str, text: str, tally: _Tally, reactions: set[str]
) -> None:
    """A name that is not what the user said: misread, left behind, or guessed too early."""
    if kind in ("reflect_situation", "reframe"):
        harm = {"C": -1 if standing in ("stale", "unsaid") else -2}
    elif kind == "name_unstated" and standing == "unsaid":
        harm = {"A": -1}
    elif kind in ("name_feeling", "name_unstated"):
        harm = {"A": -1} if standing == "stale" else {"A": -1, "C": -1}
    elif kind == "affirm_strength":
        harm = {"C": -1, "P": -1}
    else:  # offer_step
        harm = {"P": -1 if mind.heard else -2, "C": -1}
    why = {"stale": "belongs to an earlier part", "unsaid": "has not been said yet", "wrong": "is not theirs"}
    tally.hurt(harm, text, f"`{filler}` {why[standing]}")
    reactions.add({"stale": "stale", "unsaid": "early", "wrong": "misread"}[standing])


def _conclude(
    mind: Mind,
    reply: str,
    tally: _Tally,
    reactions: set[str],
    pairs: Pairs,
    named: list[tuple[str, str, bool]],
    credited: set[tuple[str, str]],
    idle: int,
) -> Assessment:
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
    harms = levels[1::2]
    harmful, careless = min(harms) < 0, min(harms) == -2
    if careless or (harmful and mind.harmed):
        closed = CLOSED_TURNS
    elif mind.closed and "repair" in acts and not harmful:
        closed = 0
    elif mind.closed and harmful:
        closed = CLOSED_TURNS
    else:
        closed = max(0, mind.closed - 1)

    now_credited = mind.credited | credited
    met = mind.met or _met(mind, now_credited)
    first = mind.episode.origin == "stage" and mind.episode.content == 0
    kinds_credited = {kind for kind, _ in now_credited}
    deep = mind.deep or (first and {"reflect_situation", "name_feeling"} <= kinds_credited)
    present = [kind for kind in _KIND_ORDER if kind in acts]
    after = replace(
        mind,
        credited=now_credited,
        points=tuple(points),
        met=met,
        idle=idle,
        closed=closed,
        harmed=harmful,
        heard=mind.heard or met,
        deep=deep,
        sentences=mind.sentences | {sentence.words for _, sentence in pairs},
        repeats=mind.repeats + any(sentence.words in mind.sentences for _, sentence in pairs),
        frames=(*mind.frames, frozenset(s.frame for _, s in pairs if s.frame))[-FRAME_MEMORY:],
        kinds=(*mind.kinds, acts)[-KIND_MEMORY:],
        reaction=next((name for name in _REACTION_ORDER if name in reactions), None),
    )
    return Assessment(
        tuple(levels),
        tuple(evidence),
        tuple(reasons),
        present[0] if present else "silence",
        tuple(kind for kind, _ in pairs),
        tuple(named),
        mind.stage,
        mind.episode.need,
        after,
    )


def _met(mind: Mind, credited: frozenset[tuple[str, str]]) -> bool:
    """Whether the need of the episode is met."""
    need = mind.episode.need
    kinds = [kind for kind, _ in credited]
    if need == "heard":
        if mind.episode.origin == "memory" and mind.heard:
            return bool(kinds)
        situation, feeling = kinds.count("reflect_situation"), kinds.count("name_feeling")
        if mind.scenario.empathy_threshold == "low":
            return situation + feeling >= 1
        return feeling >= 1 and situation >= (1 if mind.scenario.empathy_threshold == "medium" else 2)
    wanted = {"weight": "name_unstated", "meaning": "reframe", "way": "offer_step"}[need]
    return wanted in kinds
