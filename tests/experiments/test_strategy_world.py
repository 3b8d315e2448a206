"""The world over kinds of reply against the scripted world: same choices, same levels, positions, ends."""

import random
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import strategy_world as fast
from mapo_jax.config import EnvironmentConfig
from mapo_jax.environment.card_schema import FEELINGS, UNSTATED
from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.environment.roles import open_dialogue, take_turn
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.scripted import scripted_roles
from mapo_jax.environment.scripted.assessment import SLOT_OF, card_phrases, routine
from mapo_jax.environment.scripted.fold import mind_at
from mapo_jax.environment.scripted.grammar import CONSTRUCTIONS, HELPFUL, KINDS, bare, realise, slots_of
from mapo_jax.environment.scripted.helper import _PLAN, _fresh_fillers
from mapo_jax.environment.scripted.lexicon import HINTS
from mapo_jax.environment.state import Limits

CARDS = load_scenarios()
DRAWS = np.array([(i & 7) | (i >> 3) << 7 for i in range(128)], np.int32)  # every message equally often


class OutOfWords(Exception):
    """No sentence is left that the scripted judge would not count as worn out or repeated."""


def pick_filler(mind, kind, wrong, rng):
    """What the fast world says that this act names."""
    content, card, others = mind.content, mind.scenario, [c for c in CARDS if c is not mind.scenario]
    other = rng.choice(others)
    if kind in ("reflect_situation", "ask"):
        pool = [p for p in content.particulars if bare(p) in mind.said] or list(content.particulars)
        foreign = other.story.stages[0].particulars[0]
    elif kind == "name_feeling":
        pool, used = [content.feeling], {stage.feeling for stage in card.story.stages}
        foreign = rng.choice([f for f in FEELINGS if f not in used])
    elif kind == "name_unstated":
        pool, used = [content.unstated], {stage.unstated for stage in card.story.stages}
        foreign = rng.choice([f for f in UNSTATED if f not in used])
    else:
        pool = [p for p in card_phrases(card, kind) if bare(p) in mind.said] or list(card_phrases(card, kind))
        foreign = rng.choice(
            [p for p in card_phrases(other, kind) if p not in card_phrases(card, kind)] or [None]
        )
        if foreign is None:
            return pick_filler(mind, kind, wrong, rng)
    if wrong:
        return foreign
    return next((p for p in pool if (kind, bare(p)) not in mind.credited), pool[0])


def word(mind, kind, wrong, rng):
    """A fresh sentence of this kind, or one that has to be repeated because its kind has no other left."""
    pools = {
        "p": [p for p in mind.content.particulars if bare(p) in mind.said],
        "f": FEELINGS,
        "t": [t for card in CARDS for t in card.story.steps],
    }
    if kind not in (*HELPFUL, "ask"):  # an act that harms may speak of anything
        pools["p"] = [p for card in CARDS for stage in card.story.stages for p in stage.particulars]
    used = frozenset().union(*mind.frames)
    filler = pick_filler(mind, kind, wrong, rng) if kind in (*HELPFUL, "ask") else None
    frames = [f for f in CONSTRUCTIONS[kind] if all(pools[s] for s in slots_of(f) if s == "p") or filler]
    for frame in rng.sample(frames, len(frames)):
        slots = slots_of(frame)
        if kind == "reframe" and "p" in slots and not pools["p"]:
            continue
        values = {slot: rng.choice(pools[slot]) for slot in slots if pools.get(slot)}
        if filler is not None:
            values[SLOT_OF.get(kind, "p")] = filler
        sentence = realise(frame, values)
        if frame not in used and bare(sentence) not in mind.known:
            return sentence
    if kind in fast.LIMITED:  # the one that was said longest ago
        ages = {words: age for age, reply in enumerate(mind.sentences) for words in reply}
        return min((realise(frame, {}) for frame in frames), key=lambda sentence: ages[bare(sentence)])
    raise OutOfWords


def choose(mind, rng, skill):
    """One or two acts: of the plan that suits the need, or any."""
    if rng.random() < skill:
        plan = [kind for kind in _PLAN[mind.episode.need] if _fresh_fillers(mind, kind)]
        plan = [kind for kind in plan if not routine(mind, kind)] or ["presence"]
        acts = ("repair",) if mind.closed else plan[:2]
    else:
        acts = rng.sample(KINDS, rng.choice((1, 1, 2)))
    return {kind: rng.random() < 0.1 * (1 - skill) for kind in acts}


def mentioned(mind):
    """What the last message said, in the terms of the fast world."""
    content, story, words = mind.content, mind.scenario.story, f" {mind.heard_words[-1]} "

    def mask(phrases):
        return sum((f" {bare(phrase)} " in words) << i for i, phrase in enumerate(phrases))

    value = f" {bare(mind.scenario.value)} " in words
    hinted = any(f" {bare(hint)} " in words for hint in HINTS[content.unstated])
    numbers = (mask(content.particulars), f" {content.feeling} " in words, hinted)
    return (*numbers, value, mask(story.strengths), mask(story.steps))


FIELDS = (
    "need",
    "content",
    "stage",
    "met",
    "idle",
    "closed",
    "harmed",
    "heard",
    "deep",
    "memories",
    "focuses",
)


def snapshot(mind):
    need = fast.NEED_NAMES.index(mind.episode.need)
    rest = (mind.stage, mind.met, mind.idle, mind.closed, mind.harmed, mind.heard, mind.deep)
    return [need, mind.episode.content, *map(int, rest), mind.memories, mind.focuses]


def hold(card, seed, limits, delayed):
    """A random dialogue of the scripted world: choices, the world's draws, and what came of them."""
    roles, rng = scripted_roles(EnvironmentConfig(delayed_opening=delayed)), random.Random(seed)
    skill, turns = rng.choice((0.0, 0.6, 0.9, 1.0)), []

    def run(step):
        try:
            step.send(None)
        except StopIteration as finished:
            return finished.value
        raise AssertionError("a scripted role waited")

    state = DialogueState(card, seed, (), run(open_dialogue(card, seed, roles)))
    mind = mind_at(state, delayed)
    opening = mentioned(mind)
    while state.outcome is None:
        acts = choose(mind, rng, skill)
        try:
            reply = " ".join(word(mind, kind, wrong, rng) for kind, wrong in acts.items())
        except OutOfWords:
            return opening, turns, "words"
        state = run(take_turn(state, reply, roles, limits))
        turn = {
            "acts": fast.bits(*acts),
            "wrong": fast.bits(*(kind for kind, wrong in acts.items() if wrong)),
            "director": random.Random(f"{seed}:{state.turn_count}:director").random(),
            "levels": state.turns[-1].judgement.levels,
            "position": state.position,
            "mention": (0, 0, 0, 0, 0, 0),
            "mind": [0] * len(FIELDS),
        }
        if state.outcome is None:
            mind = mind_at(state, delayed)
            turn |= {"mention": mentioned(mind), "mind": snapshot(mind)}
        turns.append(turn)
    return opening, turns, state.outcome


def flags(mention):
    """The single things that a message says: two particulars, feeling, hint, value, strengths, steps."""
    p, f, u, v, s, t = mention
    return jnp.stack([jnp.float32(x) for x in (p & 1, p >> 1, f, u, v, s & 1, s >> 1, t & 1, t >> 1)])


def replay(cards, openings, columns, rules):
    """The same dialogues in the fast world."""

    def one(card, opening, turns):
        state = fast.hear(fast.begin(card), fast.Mention(*opening), rules)

        def step(state, turn):
            judged = fast.judge(state, turn["acts"], turn["wrong"], rules)
            moved = fast.settle(judged.state, judged.levels, judged.levels, rules)
            state = fast.direct(moved, turn["director"], rules)
            # The messages that the fast world would have drawn here, for their frequencies.
            drawn = jax.vmap(lambda draws: flags(fast.speak(state, draws, rules)))(DRAWS)
            mention = fast.Mention(
                *(m.astype(bool) if 1 <= i <= 3 else m for i, m in enumerate(turn["mention"]))
            )
            state = fast.hear(state, mention, rules)
            mind = jnp.stack([jnp.int32(getattr(state, field)) for field in FIELDS])
            return state, (judged.levels, moved.position, moved.outcome, mind, jnp.mean(drawn, axis=0))

        return jax.lax.scan(step, state, turns)[1]

    openings = [o.astype(bool) if 1 <= i <= 3 else o for i, o in enumerate(openings)]
    return jax.jit(jax.vmap(one))(cards, openings, columns)


@pytest.mark.parametrize(
    ("limits", "delayed", "count"),
    [(Limits(5, 8), True, 1400), (Limits(5, 8), False, 400), (Limits(12, 45), True, 200)],
)
def test_same_choices_same_dialogue(limits, delayed, count):
    # Cards whose stages share an unstated feeling are left out: the fast world tells feelings apart by stage.
    usable = [c for c in CARDS if len({stage.unstated for stage in c.story.stages}) == 4]
    cards = [usable[i % len(usable)] for i in range(count)]
    dialogues = [hold(card, 7 * i + 1, limits, delayed) for i, card in enumerate(cards)]
    longest = limits.max_turns

    def column(name):
        blank = np.zeros_like(np.asarray(dialogues[0][1][0][name]))
        rows = [
            [turn[name] for turn in turns] + [blank] * (longest - len(turns)) for _, turns, _ in dialogues
        ]
        return np.asarray(rows)

    names = ("acts", "wrong", "director", "mention", "levels", "position", "mind")
    data = {name: column(name) for name in names}
    inputs = {name: jnp.asarray(data[name]) for name in ("acts", "wrong", "director")}
    inputs["mention"] = tuple(jnp.asarray(data["mention"][..., i]) for i in range(6))
    openings = tuple(jnp.asarray(np.array([o[i] for o, _, _ in dialogues], np.int32)) for i in range(6))
    rules = fast.Rules(limits.min_turns, limits.max_turns, delayed)
    levels, positions, outcomes, minds, drawn = map(
        np.asarray, replay(fast.cards(cards), openings, inputs, rules)
    )

    lengths = np.array([len(turns) for _, turns, _ in dialogues])
    exists = np.arange(longest) < lengths[:, None]
    np.testing.assert_array_equal(levels[exists], data["levels"][exists])
    np.testing.assert_array_equal(positions[exists], data["position"][exists])
    continues = np.arange(longest) < lengths[:, None] - 1
    np.testing.assert_array_equal(minds[continues], data["mind"][continues])
    # The scripted user draws again if a message is not new or too long; the fast world does not. Of up to
    # 45 messages fewer are new.
    said = np.moveaxis(np.asarray(flags(inputs["mention"])), 0, -1)
    apart = np.abs((drawn[continues] - said[continues]).mean(axis=0)).max()
    assert apart < (0.05 if longest == 8 else 0.06)
    ends = Counter()
    for i, (_, turns, outcome) in enumerate(dialogues):
        if turns:
            expected = "running" if outcome == "words" else outcome
            codes = [fast.OUTCOMES[code] for code in outcomes[i, : len(turns)]]
            assert codes == ["running"] * (len(turns) - 1) + [expected]
        ends[outcome] += 1
    # The comparison covers every end that the limits allow, late stages, and seldom stops for want of words.
    assert ends["words"] < (0.05 if longest == 8 else 0.3) * count, ends
    assert ends["failure"] > 10, ends
    assert ends["timeout" if longest == 8 else "success"] > 10, ends
    assert data["mind"][..., FIELDS.index("stage")].max() == 3
