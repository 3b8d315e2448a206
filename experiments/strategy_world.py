"""The scripted world over kinds of reply instead of words, as pure JAX.

A reply is a set of at most two acts of `grammar.KINDS`, a bit mask; another mask says which of them name
something wrong. The rules are those of `mapo_jax/environment/scripted/` and `environment/state.py`: stages,
needs, openings and closings, routines, saturation, delayed effects, ends. A test
(`tests/experiments/test_strategy_world.py`) compares the two turn by turn.

Every function is of one dialogue, without a batch axis; use `jax.vmap`. Left out, because a policy over kinds
has no words: replies that are no sentence, that echo, or that are too long; worn-out constructions. A
sentence with a slot never has to be repeated; those without a slot run out as in the scripted world, where of
several worn ones the oldest is said again.

An act names the first thing that is right and fresh, else one that is right, else one not said yet.

What only this module has: noise of the judge, and a trap (`Trap`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from mapo_jax.environment.card_schema import THRESHOLDS
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.scripted.assessment import (
    CLOSED_TURNS,
    EPISODE_POINTS,
    HARMS,
    KIND_MEMORY,
    KIND_MOST,
    KIND_RUNNING,
    NEED_AXIS,
    SENTENCE_MEMORY,
)
from mapo_jax.environment.scripted.director import LAST_STAGE, MEMORY_SHARE, MOST_MEMORIES, PATIENCE
from mapo_jax.environment.scripted.grammar import CONSTRUCTIONS, HARMFUL, KINDS, slots_of
from mapo_jax.environment.scripted.mind import FOCUS, NEEDS
from mapo_jax.environment.scripted.user import FEELING_TOO
from mapo_jax.environment.state import (
    AXES,
    COLLAPSE_WINDOW,
    HARM_POINTS,
    PROGRESS_POINTS,
    REGRESSION_ENERGY,
    REGRESSION_SHARE,
    REGRESSION_WINDOW,
    STAGNATION_DEVIATION,
    STAGNATION_WINDOW,
)

assert (KIND_MEMORY, KIND_MOST, KIND_RUNNING) == (6, 3, 3), "`_routines` is written for these"
assert REGRESSION_ENERGY == -1.0, "`_ends` is written for this"

NEED_NAMES = tuple(NEED_AXIS)  # heard, weight, meaning, way
HEARD, WEIGHT, MEANING, WAY = range(4)
STAGE, MEMORY, FOCUSED = range(3)  # origin of an episode
RUNNING, SUCCESS, FAILURE, TIMEOUT = range(4)
OUTCOMES = ("running", "success", "failure", "timeout")

# Kinds whose sentences have no slot, and how many there are: one more in SENTENCE_MEMORY replies repeats one.
LIMITED = {k: len(c) for k, c in CONSTRUCTIONS.items() if not any(map(slots_of, c))}


def bits(*kinds: str) -> int:
    """The mask of these kinds."""
    return sum(1 << KINDS.index(kind) for kind in kinds)


_TABLE = jnp.array([[NEED_NAMES.index(need) for need in NEEDS[axis]] for axis in AXES])
_FOCUS = jnp.array([NEED_NAMES.index(FOCUS[axis]) for axis in AXES])
_NEED_AXIS = jnp.array([AXES.index(NEED_AXIS[need]) for need in NEED_NAMES])
_PROGRESS = jnp.array([PROGRESS_POINTS[level] for level in range(3)], jnp.float32)
_HARM = jnp.array([[HARM_POINTS[axis][-level] for level in range(3)] for axis in AXES], jnp.float32)

Scalar = Int[Array, ""] | int
Flag = Bool[Array, ""] | bool


@partial(jax.tree_util.register_dataclass, data_fields=["wait", "turns"], meta_fields=["kind", "level"])
@dataclass(frozen=True)
class Trap:
    """A reply that pays at once and closes the person later."""

    kind: str = "praise"  # the act, which then does none of its usual harm
    level: int = 2  # progress on A at once, beyond what an episode can give
    wait: int = 0  # turns before the person closes
    turns: int = 3  # turns for which nothing helps, not even a repair, and every reply harms A by one level


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["min_turns", "max_turns", "delayed_opening", "judge_noise", "naming_error", "trap"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Rules:
    """Switches of the world. A pytree, so that worlds that differ in numbers share a compiled program."""

    min_turns: int = 5
    max_turns: int = 8
    delayed_opening: bool = True
    judge_noise: float = (
        0.0  # deviation of each of the judge's levels, in levels, before rounding and clipping
    )
    naming_error: float = 0.0  # chance that an act names something wrong
    trap: Trap | None = None


class Card(NamedTuple):
    """What the rules use of a scenario card."""

    start: Float[Array, " 3"]  # P_0
    axis: Scalar  # strongest axis: index into AXES
    threshold: Scalar  # 0 low, 1 medium, 2 high


class Mention(NamedTuple):
    """What a message of the user says; particulars, strengths and steps are masks of two bits."""

    particulars: Scalar  # of the episode's content
    feeling: Flag  # the stated feeling of the episode's content
    hint: Flag  # of the unstated one
    value: Flag
    strengths: Scalar
    steps: Scalar


class Credited(NamedTuple):
    """What has brought progress in this episode."""

    situation: Scalar  # two bits
    feeling: Flag
    unstated: Flag
    strengths: Scalar  # two bits
    value: Flag
    steps: Scalar  # two bits


class State(NamedTuple):
    """A dialogue that awaits a reply: the fields of `mind.Mind`, the position, windows of the end rules."""

    card: Card
    # The story.
    need: Scalar
    content: Scalar
    origin: Scalar
    variant: Scalar
    stage: Scalar
    memories: Scalar
    focuses: Scalar
    first: Flag  # the user has not spoken in this episode
    # What was said, and what was given.
    message: Mention  # the last message
    curt: Flag  # it was that of a closed user
    said: Scalar  # particulars, two bits for each stage
    said_feeling: Flag  # in this episode
    said_hint: Flag
    said_value: Flag
    said_strengths: Scalar
    said_steps: Scalar
    credited: Credited
    points: Int[Array, " 3"]
    met: Flag
    idle: Scalar
    closed: Scalar
    sealed: Scalar  # turns until a trap is over
    harmed: Flag
    heard: Flag
    deep: Flag
    kinds: tuple[Scalar, ...]  # masks of the last eight replies, newest first
    repeated: Flag
    # The calculator.
    turn: Scalar  # finished turns
    position: Float[Array, " 3"]  # by the judge's levels, noise included
    true_position: Float[Array, " 3"]  # by the levels without noise
    gains: Float[Array, " 8"]  # v_t . P_0 of the last turns, newest first (an energy gain is negative)
    lengths: Float[Array, " 5"]  # |P| of the last turns, newest first
    outcome: Scalar  # RUNNING, SUCCESS, FAILURE or TIMEOUT


class Judged(NamedTuple):
    """What the judge and the user's mind make of a reply."""

    levels: Int[Array, " 6"]  # in the order of dialogue.LEVEL_NAMES
    state: State


def cards(scenarios: Sequence[Scenario]) -> Card:
    """The scenarios' cards, stacked."""
    return Card(
        jnp.array([scenario.start_position for scenario in scenarios], jnp.float32),
        jnp.array([AXES.index(scenario.strongest_axis) for scenario in scenarios]),
        jnp.array([THRESHOLDS.index(scenario.empathy_threshold) for scenario in scenarios]),
    )


def begin(card: Card) -> State:
    """A dialogue before the user's first message."""
    zero, no = jnp.int32(0), jnp.bool_(False)
    return State(
        card,
        need=_TABLE[card.axis, 0],
        content=zero,
        origin=jnp.int32(STAGE),
        variant=zero,
        stage=zero,
        memories=zero,
        focuses=zero,
        first=jnp.bool_(True),
        message=Mention(zero, no, no, no, zero, zero),
        curt=no,
        said=zero,
        said_feeling=no,
        said_hint=no,
        said_value=no,
        said_strengths=zero,
        said_steps=zero,
        credited=Credited(zero, no, no, zero, no, zero),
        points=jnp.zeros(3, jnp.int32),
        met=no,
        idle=zero,
        closed=zero,
        sealed=zero,
        harmed=no,
        heard=no,
        deep=no,
        kinds=(zero,) * SENTENCE_MEMORY,
        repeated=no,
        turn=zero,
        position=card.start,
        true_position=card.start,
        gains=jnp.zeros(REGRESSION_WINDOW),
        lengths=jnp.zeros(STAGNATION_WINDOW),
        outcome=jnp.int32(RUNNING),
    )


# --- The user. ---


def withdrawn(state: State, rules: Rules) -> Flag:
    """Whether the user is closed."""
    if rules.trap is None:
        return state.closed > 0
    return (state.closed > 0) | ((state.sealed > 0) & (state.sealed <= rules.trap.turns))


def speak(state: State, draws: Int[Array, ""], rules: Rules) -> Mention:
    """What the next message says.

    Args:
      state: between the director's action and the user's message.
      draws: random bits, of which the lowest twelve are used.
      rules: switches of the world.
    """
    one, other, coin = ((draws >> i) & 1 for i in range(3))
    too = ((draws >> 3) & 255) < round(FEELING_TOO * 256)
    new_stage = state.first & (state.origin == STAGE)
    guarded = state.card.threshold == 2
    situation = jnp.where(new_stage, 1, 1 << one)
    index = (state.variant + jnp.where(state.first, 0, other)) % 2
    heard, weight, meaning, way = (state.need == need for need in range(4))

    told = heard & state.first & ~((state.origin == MEMORY) & state.heard)  # both particulars
    unhinted = weight & new_stage & guarded
    feeling = jnp.where(heard, ~(told & guarded), (weight & (unhinted | too)) | (way & too))
    strengths = jnp.where(meaning, 1 << index, jnp.where(way & ~too, 2 >> index, 0))

    closed = withdrawn(state, rules)
    return Mention(
        jnp.where(closed, jnp.where(coin == 1, 1 << one, 0), jnp.where(told | unhinted, 3, situation)),
        feeling & ~closed,
        weight & ~unhinted & ~closed,
        meaning & ~closed,
        jnp.where(closed, 0, strengths),
        jnp.where(way & ~closed, 1 << index, 0),
    )


def hear(state: State, mention: Mention, rules: Rules) -> State:
    """The state after the user's message."""
    return state._replace(
        message=mention,
        curt=withdrawn(state, rules),
        first=jnp.bool_(False),
        said=state.said | mention.particulars << (2 * state.content),
        said_feeling=state.said_feeling | mention.feeling,
        said_hint=state.said_hint | mention.hint,
        said_value=state.said_value | mention.value,
        said_strengths=state.said_strengths | mention.strengths,
        said_steps=state.said_steps | mention.steps,
    )


# --- The judge. ---


def _routines(kinds: tuple[Scalar, ...]) -> Scalar:
    """The kinds of which one more act is a routine: in the last two replies, or in three of the last five."""
    once = twice = thrice = 0
    for mask in kinds:
        once, twice, thrice = once | mask, twice | (once & mask), thrice | (twice & mask)
    return (kinds[0] & kinds[1]) | thrice


def _spent(kinds: tuple[Scalar, ...]) -> Scalar:
    """The kinds of which one more act says a sentence again that the user still knows."""
    counts = {kind: sum((mask & bits(kind)) > 0 for mask in kinds) for kind in LIMITED}
    return sum(jnp.where(counts[kind] >= most, bits(kind), 0) for kind, most in LIMITED.items())


def _lowest(mask: Scalar) -> Scalar:
    """The lowest bit of a mask."""
    return mask & -mask


def _worst(*harms: tuple[Flag, Scalar]) -> Scalar:
    """The largest level among those whose condition holds."""
    worst = jnp.int32(0)
    for condition, level in harms:
        worst = jnp.maximum(worst, jnp.where(condition, level, 0))
    return worst


def _capped(level: Scalar, points: Scalar) -> Scalar:
    """The level, lowered to what is left of an axis in this episode."""
    for _ in range(2):
        level = jnp.where((level > 0) & (points + _points_of(level) > EPISODE_POINTS), level - 1, level)
    return level


def _points_of(level: Scalar) -> Scalar:
    return jnp.where(level == 2, PROGRESS_POINTS[2], jnp.where(level == 1, PROGRESS_POINTS[1], 0))


def judge(state: State, acts: Scalar, wrong: Scalar, rules: Rules) -> Judged:
    """Levels of a reply, without noise, and the mind after it.

    Args:
      state: awaits a reply.
      acts: mask of one or two kinds.
      wrong: mask of those that name something that is not the user's.
      rules: switches of the world.
    """
    s, trap = state, rules.trap

    def act(kind: str) -> Flag:
        return (acts & bits(kind)) > 0

    def any_of(kinds: Sequence[str]) -> Flag:
        return (acts & bits(*kinds)) > 0

    def misses(kind: str, right: Flag) -> tuple[Flag, Flag]:
        """Whether the act names something, and the thing is wrong; whether what it names is not said yet."""
        named_wrong = (wrong & bits(kind)) > 0
        return act(kind) & named_wrong, act(kind) & ~named_wrong & ~right

    closed, sealed = withdrawn(s, rules), jnp.bool_(False)
    if trap is not None:
        sealed = closed & (s.sealed > 0) & (s.sealed <= trap.turns)
    harmful = [kind for kind in HARMFUL if trap is None or kind != trap.kind]
    heard, weight, meaning, way = (s.need == need for need in range(4))
    said = (s.said >> (2 * s.content)) & 3

    # Names: wrong, not said yet, or right; of the right ones, fresh or named already in this episode.
    situation_wrong, situation_unsaid = misses("reflect_situation", said > 0)
    feeling_wrong, feeling_unsaid = misses("name_feeling", s.said_feeling)
    unstated_wrong, unstated_unsaid = misses("name_unstated", s.said_hint)
    strength_wrong, strength_unsaid = misses("affirm_strength", s.said_strengths > 0)
    value_wrong, value_unsaid = misses("reframe", s.said_value)
    step_wrong, step_unsaid = misses("offer_step", s.said_steps > 0)
    ask_wrong, ask_unsaid = misses("ask", said > 0)
    situation = act("reflect_situation") & ~situation_wrong & ~situation_unsaid
    feeling = act("name_feeling") & ~feeling_wrong & ~feeling_unsaid
    unstated = act("name_unstated") & ~unstated_wrong & ~unstated_unsaid
    strength = act("affirm_strength") & ~strength_wrong & ~strength_unsaid
    value = act("reframe") & ~value_wrong & ~value_unsaid
    step = act("offer_step") & ~step_wrong & ~step_unsaid

    # In its time a right name gains, if it is fresh.
    timely_situation, timely_feeling = situation & ~meaning, feeling & ~meaning
    timely_strength = strength & (meaning | way)
    timely_unstated, timely_value, timely_step = unstated & weight, value & meaning, step & way
    done = s.credited
    fresh_particular = said & ~done.situation
    fresh_strength = s.said_strengths & ~done.strengths
    fresh_step = s.said_steps & ~done.steps
    gains_situation = timely_situation & (fresh_particular > 0)
    gains_feeling = timely_feeling & ~done.feeling
    gains_unstated = timely_unstated & ~done.unstated
    gains_strength = timely_strength & (fresh_strength > 0)
    gains_value = timely_value & ~done.value
    gains_step = timely_step & (fresh_step > 0)
    again = (
        (timely_situation & ~gains_situation)
        | (timely_feeling & ~gains_feeling)
        | (timely_unstated & ~gains_unstated)
        | (timely_strength & ~gains_strength)
        | (timely_value & ~gains_value)
        | (timely_step & ~gains_step)
    )
    served = ((gains_situation | gains_feeling) & (heard | (weight & ~s.said_hint))) | (
        gains_unstated | gains_value | gains_step
    )
    opened = jnp.where(s.deep | jnp.logical_not(rules.delayed_opening), 2, 1)

    # Repetition.
    routine = (acts & _routines(s.kinds[: KIND_MEMORY - 1])) > 0
    repeats = (acts & _spent(s.kinds)) > 0
    asks_again = act("ask") & ((s.kinds[0] & bits("ask")) > 0)
    cancelled = any_of(harmful) | routine | repeats | asks_again

    repair = act("repair")
    repaired = repair & closed & ~sealed
    trapped = jnp.bool_(False)
    if trap is not None:
        trapped = act(trap.kind) & ~closed & ~cancelled
        served |= trapped
    owed = repair & (closed | s.harmed)
    idle = jnp.where(~closed & ~owed & (cancelled | ~served), s.idle + 1, s.idle)
    missed = (idle >= 2) & (idle > s.idle)
    missed_level, missed_axis = jnp.where(idle == 2, 1, 2), _NEED_AXIS[s.need]
    cancelled |= missed
    effective = ~cancelled & ~closed

    def table(axis: str, level: int) -> Flag:
        return any_of([kind for kind in harmful if HARMS[kind][0].get(axis) == -level])

    early_step = jnp.where(s.heard, 1, 2)
    harm_c = _worst(
        (table("C", 1), 1),
        (table("C", 2), 2),
        (acts == bits("presence"), 1),
        (situation_wrong | value_wrong | value_unsaid, 2),
        (situation_unsaid | feeling_wrong | feeling_unsaid | unstated_wrong, 1),
        (strength_wrong | strength_unsaid | step_wrong | step_unsaid | ask_wrong | ask_unsaid, 1),
        (value & ~meaning, 1),
        (missed & (missed_axis == 0), missed_level),
    )
    harm_a = _worst(
        (table("A", 1), 1),
        (table("A", 2), 2),
        (routine, 2),
        (repeats, jnp.where(s.repeated, 2, 1)),
        (asks_again | again, 1),
        (repair & ~closed & ~s.harmed, 1),
        (feeling_wrong | feeling_unsaid | unstated_wrong | unstated_unsaid, 1),
        (unstated & ~weight, 1),
        (sealed, 1),
        (missed & (missed_axis == 1), missed_level),
    )
    harm_p = _worst(
        (table("P", 1), 1),
        (table("P", 2), 2),
        (strength_wrong | strength_unsaid, 1),
        (step_wrong | step_unsaid | (step & ~way), early_step),
        (missed & (missed_axis == 2), missed_level),
    )

    # The scripted judge keeps one entry per axis: a name for the unstated feeling displaces the repair.
    relieved = repaired & ~cancelled & ~gains_unstated
    progress_c = _worst((effective & gains_situation, 1), (effective & gains_value, opened))
    progress_a = _worst((effective & gains_feeling, 1), (effective & gains_unstated, 2), (relieved, 1))
    progress_p = _worst((effective & gains_strength, 1), (effective & gains_step, opened))
    progress = [_capped(level, s.points[i]) for i, level in enumerate((progress_c, progress_a, progress_p))]
    points = jnp.stack([s.points[i] + _points_of(level) for i, level in enumerate(progress)])
    if trap is not None:
        progress[1] = jnp.where(trapped & effective, jnp.maximum(progress[1], trap.level), progress[1])
    levels = jnp.stack([progress[0], -harm_c, progress[1], -harm_a, progress[2], -harm_p])

    worst = jnp.maximum(jnp.maximum(harm_c, harm_a), harm_p)
    shut = (worst == 2) | ((worst > 0) & (s.harmed | closed))
    reopened = repair & (worst == 0)
    credited = Credited(
        done.situation | jnp.where(effective & gains_situation, _lowest(fresh_particular), 0),
        done.feeling | (effective & gains_feeling),
        done.unstated | (effective & gains_unstated),
        done.strengths | jnp.where(effective & gains_strength, _lowest(fresh_strength), 0),
        done.value | (effective & gains_value),
        done.steps | jnp.where(effective & gains_step, _lowest(fresh_step), 0),
    )
    met = s.met | _met(s, credited)
    fully = (s.origin == STAGE) & (s.content == 0) & (credited.situation > 0) & credited.feeling
    sealed_turns = jnp.maximum(s.sealed - 1, 0)
    if trap is not None:
        sealed_turns = jnp.where(trapped & effective, trap.wait + trap.turns, sealed_turns)
    after = s._replace(
        credited=credited,
        points=points,
        met=met,
        idle=idle,
        closed=jnp.where(shut, CLOSED_TURNS, jnp.where(reopened, 0, jnp.maximum(s.closed - 1, 0))),
        sealed=sealed_turns,
        harmed=worst > 0,
        heard=s.heard | met,
        deep=s.deep | fully,
        kinds=(acts, *s.kinds[:-1]),
        repeated=s.repeated | repeats,
    )
    return Judged(levels, after)


def _met(state: State, credited: Credited) -> Flag:
    """Whether the need of the episode is met."""
    situations = (credited.situation & 1) + (credited.situation >> 1)
    feeling = credited.feeling
    resumed = (state.origin == MEMORY) & state.heard
    enough = feeling & (situations >= state.card.threshold)  # medium: one particular, high: both
    anything = (situations > 0) | feeling
    heard = jnp.where(resumed | (state.card.threshold == 0), anything, enough)
    return jnp.select(
        [state.need == HEARD, state.need == WEIGHT, state.need == MEANING],
        [heard, credited.unstated, credited.value],
        credited.steps > 0,
    )


def disturb(levels: Int[Array, " 6"], noise: Float[Array, " 6"], rules: Rules) -> Int[Array, " 6"]:
    """The levels that a noisy judge gives; `noise` is standard normal, or empty for a judge without noise."""
    if not noise.size:
        return levels
    noisy = jnp.round(levels + rules.judge_noise * noise).astype(levels.dtype)
    lowest, highest = jnp.array([0, -2] * 3), jnp.array([2, 0] * 3)
    return jnp.clip(noisy, lowest, highest)


# --- The calculator. ---


def points(levels: Int[Array, " 6"]) -> Float[Array, " 3"]:
    """The movement `v_t`."""
    return jnp.stack([_PROGRESS[levels[2 * i]] + _HARM[i, -levels[2 * i + 1]] for i in range(3)])


def settle(state: State, levels: Int[Array, " 6"], true_levels: Int[Array, " 6"], rules: Rules) -> State:
    """The state after its position has moved: the turn counts, and the dialogue may have ended."""
    start, movement = state.card.start, points(levels)
    position = state.position + movement
    turn = state.turn + 1
    gains = jnp.concatenate([jnp.sum(movement * start)[None], state.gains[:-1]])
    lengths = jnp.concatenate([jnp.sqrt(jnp.sum(position**2))[None], state.lengths[:-1]])
    outcome = _ends(position, start, gains, lengths, turn, rules)
    return state._replace(
        turn=turn,
        position=position,
        true_position=state.true_position + points(true_levels),
        gains=gains,
        lengths=lengths,
        outcome=jnp.where(state.outcome == RUNNING, outcome, state.outcome),
    )


def _ends(position, start, gains, lengths, turn, rules: Rules) -> Scalar:
    """The outcome, by the rules of `state.ending`; whole numbers are compared wherever it does so."""
    success = jnp.sum(position * start) <= 0
    collapse = (turn >= COLLAPSE_WINDOW) & (jnp.min(gains[:COLLAPSE_WINDOW]) > 0)
    stagnant = jnp.std(lengths, ddof=1) < STAGNATION_DEVIATION
    losing = jnp.mean(gains > 0) > REGRESSION_SHARE
    lost = jnp.sum(gains)
    regression = stagnant & losing & (lost > 0) & (lost**2 > jnp.sum(start**2))
    failure = collapse | ((turn >= REGRESSION_WINDOW) & regression)
    decided = turn >= rules.min_turns
    return jnp.select(
        [decided & success, decided & failure, turn >= rules.max_turns], [SUCCESS, FAILURE, TIMEOUT], RUNNING
    )


# --- The director. ---


def direct(state: State, draw: Float[Array, ""], rules: Rules) -> State:
    """The state after the director's action; `draw`, uniform in [0, 1), decides whether a memory comes up."""
    s = state
    closed = withdrawn(s, rules)
    may_remember = (s.stage > 0) & (s.memories < MOST_MEMORIES) & (s.origin != MEMORY)
    stuck = ~s.met & (s.idle >= PATIENCE)
    moves = ~closed & (s.met | stuck)
    memory = moves & jnp.where(s.met, may_remember & (draw < MEMORY_SHARE), ~s.heard)
    staged = moves & ~memory & (s.stage < LAST_STAGE)
    focused = moves & ~memory & ~staged

    stage = s.stage + staged
    lacking = jnp.argmin(s.position)

    def pick(remembered, revealed, shifted, stays):
        return jnp.where(memory, remembered, jnp.where(staged, revealed, jnp.where(focused, shifted, stays)))

    def kept(flag):
        return flag & ~moves

    def kept_mask(mask):
        return jnp.where(moves, 0, mask)

    done = s.credited
    return s._replace(
        need=pick(HEARD, _TABLE[s.card.axis, stage], _FOCUS[lacking], s.need),
        content=pick(jnp.minimum(s.memories, s.stage), stage, s.focuses % 4, s.content),
        origin=pick(MEMORY, STAGE, FOCUSED, s.origin),
        variant=pick(s.memories, 0, s.focuses // 4 + 1, s.variant),
        stage=stage,
        memories=s.memories + memory,
        focuses=s.focuses + focused,
        first=s.first | moves,
        said_feeling=kept(s.said_feeling),
        said_hint=kept(s.said_hint),
        credited=Credited(
            kept_mask(done.situation),
            kept(done.feeling),
            kept(done.unstated),
            kept_mask(done.strengths),
            kept(done.value),
            kept_mask(done.steps),
        ),
        points=jnp.where(moves, 0, s.points),
        met=kept(s.met),
        idle=jnp.where(moves, jnp.where(s.met, 0, 1), s.idle),
    )


# --- A dialogue. ---


class Draws(NamedTuple):
    """Random numbers of one turn."""

    user: Int[Array, ""]  # random bits
    director: Float[Array, ""]  # uniform
    naming: Float[Array, " 16"]  # uniform; empty if no names are missed
    judge: Float[Array, " 6"]  # standard normal; empty if the judge has no noise


def open_dialogue(card: Card, rules: Rules) -> State:
    """A dialogue that awaits its first reply. What the user's first message says follows from the card."""
    state = begin(card)
    return hear(state, speak(state, jnp.int32(0), rules), rules)


def take_turn(state: State, acts: Scalar, draws: Draws, rules: Rules) -> State:
    """One turn of the loop. After the end of the dialogue only `outcome` still has a meaning."""
    wrong = jnp.int32(0)
    if draws.naming.size:
        missed = draws.naming < rules.naming_error
        wrong = jnp.sum(jnp.where(missed, 1 << jnp.arange(len(KINDS)), 0))
    judged = judge(state, acts, wrong, rules)
    moved = settle(judged.state, disturb(judged.levels, draws.judge, rules), judged.levels, rules)
    followed = direct(moved, draws.director, rules)
    return hear(followed, speak(followed, draws.user, rules), rules)
