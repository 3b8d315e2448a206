"""The hidden state of the scripted world: what the user has said, was given, and needs now.

`Mind` is what judge, user and director know beyond the text. It is never stored: `fold.mind_at` computes it
from the dialogue's turns, so a dialogue stays a plain value.

The story is told in episodes. The first four are the card's stages, in order; each has a need:

  need      what helps                                                    progress
  heard     take up the situation; name the stated feeling              C +1; A +1
  weight    name the unstated feeling; the situation; the stated feeling  A +2; C +1; A +1
  meaning   tie it to what the person values; affirm a strength           C +2; P +1
  way       offer a step as a choice; a strength; situation, feeling      P +2; P +1; C +1, A +1

After them the director stays with memories (heard) or the axis that lacks most (weight, meaning or way).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from mapo_jax.environment.dialogue import Action
from mapo_jax.environment.scenario import Scenario, Stage
from mapo_jax.environment.scripted.grammar import bare
from mapo_jax.environment.scripted.lexicon import HINTS
from mapo_jax.environment.state import AXES

# Needs of the four stages by strongest axis: who lacks most on C or P needs meaning or a way sooner.
NEEDS = {
    "A": ("heard", "weight", "meaning", "way"),
    "C": ("heard", "meaning", "weight", "way"),
    "P": ("heard", "weight", "way", "meaning"),
}
FOCUS = {"C": "meaning", "A": "weight", "P": "way"}  # need when the director shifts the focus to an axis


@dataclass(frozen=True)
class Episode:
    """One part of the story, with one need."""

    need: str  # heard, weight, meaning or way
    content: int  # current story stage: its situation and feelings
    origin: str  # stage, memory or focus
    variant: int = 0  # counts revisits, to choose other strengths and steps


@dataclass(frozen=True)
class Mind:
    """What the user has said, was given, and how open they are."""

    scenario: Scenario
    delayed_opening: bool
    episode: Episode
    stage: int = 0  # highest story stage revealed
    messages: int = 0  # user messages in this episode
    said: frozenset[str] = frozenset()  # phrases of the card said so far, in bare form
    said_now: frozenset[str] = frozenset()  # those said in this episode, hinted feelings included
    hinted: frozenset[str] = frozenset()  # unstated feelings hinted at so far
    heard_words: tuple[str, ...] = ()  # the user's messages in bare form
    credited: frozenset[tuple[str, str]] = frozenset()  # (act, filler) that brought progress in this episode
    points: tuple[int, int, int] = (0, 0, 0)  # points per axis earned in this episode
    met: bool = False  # the episode's need is met
    idle: int = 0  # replies in this episode that did not serve its need
    closed: int = 0  # turns for which the user still stays closed
    harmed: bool = False  # the last reply did harm
    heard: bool = False  # the first need has been met
    deep: bool = False  # in the first stage both situation and feeling were named right
    sentences: tuple[frozenset[str], ...] = ()  # sentences of recent replies, newest last
    repeats: int = 0  # replies that repeated one of them
    frames: tuple[frozenset[str], ...] = ()  # constructions of recent replies, newest last
    kinds: tuple[frozenset[str], ...] = ()  # acts of recent replies, newest last
    memories: int = 0
    focuses: int = 0
    last_action: str | None = None
    reaction: str | None = None  # how the user takes the last reply: a key of lexicon.REACTIONS

    @property
    def content(self) -> Stage:
        """The current story stage."""
        return self.scenario.story.stages[self.episode.content]

    @property
    def needs(self) -> tuple[str, str, str, str]:
        """The needs of this person's four stages."""
        return NEEDS[self.scenario.strongest_axis]

    @property
    def known(self) -> frozenset[str]:
        """The sentences that the user would know again."""
        return frozenset().union(*self.sentences)

    @property
    def unstated_hinted(self) -> bool:
        """Whether the user has hinted at the stage's unstated feeling in this episode."""
        return self.content.unstated in self.said_now


@lru_cache(maxsize=4096)
def phrases(scenario: Scenario) -> frozenset[str]:
    """Every phrase of the card that the user may say, in bare form, feelings included."""
    story = scenario.story
    particulars = [p for stage in story.stages for p in stage.particulars]
    texts = map(bare, (*particulars, *story.strengths, *story.steps, scenario.value))
    return frozenset([*texts, *(stage.feeling for stage in story.stages)])


_HINTS = {bare(hint): feeling for feeling, hints in HINTS.items() for hint in hints}


def hear(mind: Mind, message: str) -> Mind:
    """The mind after the user's message."""
    words = bare(message)
    padded = f" {words} "
    said = {phrase for phrase in phrases(mind.scenario) if f" {phrase} " in padded}
    hints = {feeling for hint, feeling in _HINTS.items() if f" {hint} " in padded}
    return replace(
        mind,
        messages=mind.messages + 1,
        said=mind.said | said,
        said_now=mind.said_now | said | hints,
        hinted=mind.hinted | hints,
        heard_words=(*mind.heard_words, words),
    )


def begin(scenario: Scenario, delayed_opening: bool) -> Mind:
    """The mind before the first message."""
    return Mind(scenario, delayed_opening, Episode("heard", 0, "stage"))


def follow(mind: Mind, action: Action) -> Mind:
    """The mind after the director's action."""
    mind = replace(mind, last_action=action.kind)
    if action.kind == "reveal_memory":
        # A memory stays with an earlier stage; before the first need is met, with the first stage again.
        content = min(mind.memories, mind.stage)
        return _enter(mind, Episode("heard", content, "memory", mind.memories), memories=mind.memories + 1)
    if action.kind == "reveal_stage" or (action.kind == "turning_point" and action.target not in AXES):
        stage = min(mind.stage + 1, 3)
        return _enter(mind, Episode(mind.needs[stage], stage, "stage"), stage=stage)
    if action.kind in ("shift_focus", "turning_point"):
        content, variant = mind.focuses % 4, mind.focuses // 4 + 1
        episode = Episode(FOCUS[str(action.target)], content, "focus", variant)
        return _enter(mind, episode, focuses=mind.focuses + 1)
    return mind


def _enter(mind: Mind, episode: Episode, **changes: int) -> Mind:
    return replace(
        mind,
        episode=episode,
        messages=0,
        said_now=frozenset(),
        credited=frozenset(),
        points=(0, 0, 0),
        met=False,
        idle=0 if mind.met else 1,  # less patience after an episode whose need was not met
        **changes,
    )
