"""The scripted world from outside: determinism, the user's messages, the judge's scale, long dialogues."""

import asyncio
import itertools
import json
import random
import re
import statistics
import time
from collections import Counter
from dataclasses import replace

import pytest

from mapo_jax.config import EnvironmentConfig
from mapo_jax.environment.card_schema import UNSTATED
from mapo_jax.environment.dialogue import DialogueState, from_stripped, strip_texts
from mapo_jax.environment.roles import open_dialogue, take_turn
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.scripted import scripted_roles
from mapo_jax.environment.scripted.assessment import SENTENCE_MEMORY, assess
from mapo_jax.environment.scripted.fold import mind_at
from mapo_jax.environment.scripted.grammar import bare, read
from mapo_jax.environment.scripted.helper import (
    good_helper,
    hold_dialogue,
    right_fillers,
    say,
    speaker,
    synthetic_dialogue,
)
from mapo_jax.environment.scripted.imagine import imagined_scenario
from mapo_jax.environment.scripted.lexicon import CONSTRUCTIONS, WEARY
from mapo_jax.environment.scripted.readings import reading_metrics, readings
from mapo_jax.environment.state import Limits
from mapo_jax.scores.figures import dialogue_rewards, summarize

CARDS = load_scenarios(split="validation")
ROLES = scripted_roles(EnvironmentConfig())
SHORT = Limits(5, 8)
WORDINGS = 14  # of the acts that help


def mixed(seed, skill=0.6):
    def policy(state):
        return speaker(state, random.Random(f"{seed}:{state.scenario.id}:{state.turn_count}"), skill)

    return policy


def card_with(**changes):
    return next(
        c for c in load_scenarios() if all(getattr(c, key) == value for key, value in changes.items())
    )


def test_same_seed_same_dialogue_whatever_else_goes_on():
    alone = [hold_dialogue(card, 3, mixed(1), ROLES, SHORT) for card in CARDS[:6]]

    async def together():
        roles = scripted_roles(EnvironmentConfig())

        async def hold(card):
            state = DialogueState(card, 3, (), await open_dialogue(card, 3, roles))
            while state.outcome is None:
                await asyncio.sleep(0)
                state = await take_turn(state, mixed(1)(state), roles, SHORT)
            return state

        return await asyncio.gather(*(hold(card) for card in reversed(CARDS[:6])))

    assert list(reversed(asyncio.run(together()))) == alone
    other = hold_dialogue(CARDS[0], 4, mixed(1), ROLES, SHORT)
    assert other.messages != alone[0].messages


def test_hidden_state_follows_from_the_dialogue_alone():
    state = hold_dialogue(CARDS[1], 0, mixed(2), ROLES, Limits(15, 15))
    rebuilt = DialogueState(state.scenario, state.seed, state.turns, state.user)
    assert mind_at(rebuilt) == mind_at(state)


POLICIES = {
    "helper": good_helper,
    "mixed": mixed(0),
    "silent": lambda state: "",
    "pushing": lambda state: "You should try a walk.",
    "stubborn": lambda state: "You feel tired.",
    "asking": lambda state: "Can you tell me more about the night?",
}


def words_of(message):
    """Words of a user's message, without what it is tired of."""
    for text in itertools.chain.from_iterable(WEARY.values()):
        message = message.replace(text, "")
    return len(message.split())


@pytest.mark.parametrize("name", POLICIES)
def test_user_never_repeats_a_message_and_never_names_the_unstated(name):
    limits = Limits(45, 45)
    for card in CARDS[::3]:
        for seed in range(4):
            messages = [turn.user for turn in hold_dialogue(card, seed, POLICIES[name], ROLES, limits).turns]
            assert len(messages) == 45 and len(set(messages)) == 45
            for message in messages:
                assert not set(bare(message).split()) & set(UNSTATED), message
                assert 1 <= words_of(message) <= 40, message


def test_user_messages_are_short():
    messages = [t.user for c in CARDS for t in hold_dialogue(c, 0, good_helper, ROLES, SHORT).turns]
    words = [words_of(message) for message in messages]
    assert max(words) <= 31 and 12 <= sum(words) / len(words) <= 28


@pytest.mark.parametrize("name", ["helper", "mixed"])
def test_an_open_user_says_what_it_is_tired_of_and_nothing_else(name):
    """Acts of three of the last five replies or of the last two, counted in the replies' words."""
    found = Counter()
    for card in CARDS[::4]:
        state = hold_dialogue(card, 1, POLICIES[name], ROLES, Limits(20, 20))
        acts = [{sentence.kind for sentence in read(turn.reply).sentences} for turn in state.turns]
        for t, turn in enumerate(state.turns[1:], start=1):
            before = DialogueState(state.scenario, state.seed, state.turns[:t], turn.user)
            said = {act for act, pool in WEARY.items() if any(text in turn.user for text in pool)}
            last = acts[max(0, t - 5) : t]
            tired = {
                act
                for act in WEARY
                if sum(act in reply for reply in last) >= 3
                or (t >= 2 and act in acts[t - 1] and act in acts[t - 2])
            }
            assert said == (set() if mind_at(before).closed else tired), turn.user
            found[len(said)] += 1
    assert found[0] and found[1]


def test_user_answers_what_was_just_said():
    card = card_with(empathy_threshold="medium")

    def next_message(reply):
        state = hold_dialogue(card, 0, lambda s: reply if s.turn_count == 0 else "", ROLES, Limits(2, 2))
        return mind_at(replace(state, turns=state.turns[:1], user="", outcome=None)).reaction, state.turns[
            1
        ].user

    stage = card.story.stages[0]
    cases = {
        f"You keep coming back to {stage.particulars[0]}.": "situation",
        f"You feel {stage.feeling}.": "feeling",
        "I understand how you feel.": "empty",
        "It is not that bad.": "hurtful",
        "You should try a walk with the dog.": "lost",
        "": "silent",
    }
    for reply, reaction in cases.items():
        assert next_message(reply)[0] == reaction, reply


def test_judgements_are_complete_and_in_range():
    def falls_silent(state):
        return good_helper(state) if state.turn_count < 3 else ""

    seen = set()
    for card, policy in itertools.product(CARDS, (mixed(5, 0.3), mixed(6, 0.9), falls_silent)):
        for turn in hold_dialogue(card, 1, policy, ROLES, Limits(8, 8)).turns:
            judgement = turn.judgement
            seen.update(enumerate(judgement.levels))
            assert all(judgement.evidence) and all(judgement.reasons) and len(judgement.reasons) == 6
            assert {"kind", "acts", "named", "stage"} <= set(judgement.reading)
            assert all(set(name) == {"what", "said", "right"} for name in judgement.reading["named"])
    # Every level of every axis occurs.
    assert seen == {(i, level) for i in range(6) for level in ((0, 1, 2) if i % 2 == 0 else (0, -1, -2))}


def test_careless_turn_closes_the_person_until_it_is_repaired():
    def policy(state):
        if state.turn_count == 0:
            return "You brought this on yourself."
        return good_helper(state) if state.turn_count != 1 else "I moved too fast there."

    def stubborn(state):
        if state.turn_count == 0:
            return "You brought this on yourself."
        mind = mind_at(state)
        filler = right_fillers(mind, "reflect_situation")
        return say(mind, "reflect_situation", random.Random(0), filler[0])

    for card in CARDS[:5]:
        repaired = hold_dialogue(card, 0, policy, ROLES, Limits(4, 4))
        assert repaired.turns[1].judgement.levels == (0, 0, 1, 0, 0, 0)
        assert sum(repaired.turns[2].judgement.levels[::2]) >= 1
        unmended = hold_dialogue(card, 0, stubborn, ROLES, Limits(2, 2))
        assert sum(unmended.turns[1].judgement.levels[::2]) == 0
        assert len(repaired.turns[1].user.split()) < len(repaired.turns[0].user.split())


def test_an_apology_for_nothing_leaves_the_need_unanswered():
    """As any other reply that misses it; the apology that a misstep calls for does not count as one."""
    sorry, sorry_again = "I moved too fast there.", "Let me take that back."
    for card in CARDS[:5]:
        mind = mind_at(hold_dialogue(card, 0, good_helper, ROLES, Limits(1, 1)))
        first = assess(mind, sorry)
        assert first.after.idle == mind.idle + 1
        assert "apologises for nothing" in first.judgement.reasons[3]
        assert assess(first.after, sorry_again).after.idle == first.after.idle


@pytest.mark.parametrize("gap", [1, SENTENCE_MEMORY, SENTENCE_MEMORY + 1])
def test_a_sentence_is_known_again_for_eight_replies(gap):
    def policy(state):
        return "There is no hurry." if state.turn_count in (0, gap) else good_helper(state)

    for card in CARDS[:5]:
        reason = hold_dialogue(card, 0, policy, ROLES, Limits(12, 12)).turns[gap].judgement.reasons[3]
        assert ("repeats an earlier sentence" in reason) == (gap <= 8)


def test_advice_before_being_heard_is_harm():
    for card in CARDS:

        def policy(state, card=card):
            return f"If you like, {card.story.steps[0]} could be a start."

        levels = hold_dialogue(card, 0, policy, ROLES, Limits(1, 1)).turns[0].judgement.levels
        assert levels[5] == -2 and levels[4] == 0


def test_early_good_reflection_opens_a_later_stage():
    card = card_with(empathy_threshold="low", split="validation")

    def shallow(state):
        mind = mind_at(state)
        if state.turn_count == 0:
            return f"You sound {mind.content.feeling}."
        return good_helper(state)

    def best(policy, opening):
        roles = scripted_roles(EnvironmentConfig(delayed_opening=opening))
        turns = hold_dialogue(card, 0, policy, roles, Limits(8, 8)).turns
        return max(max(t.judgement.levels[0], t.judgement.levels[4]) for t in turns)

    assert best(shallow, True) == 1
    assert best(good_helper, True) == 2
    assert best(shallow, False) == 2


def test_each_stage_wants_its_own_help():
    for card in CARDS:
        turns = hold_dialogue(card, 0, good_helper, ROLES, Limits(15, 15)).turns
        by_need = {}
        for turn in turns:
            reading, levels = turn.judgement.reading, turn.judgement.levels
            by_need.setdefault(reading["need"], []).append(levels)
        assert set(by_need) == {"heard", "weight", "meaning", "way"}
        assert max(levels[2] for levels in by_need["weight"]) == 2
        assert max(levels[0] for levels in by_need["meaning"]) == 2
        assert max(levels[4] for levels in by_need["way"]) == 2
        assert all(levels[0] < 2 and levels[2] < 2 and levels[4] == 0 for levels in by_need["heard"])


def test_order_of_needs_follows_the_strongest_axis():
    second = {}
    for card in CARDS:
        state = hold_dialogue(card, 0, good_helper, ROLES, Limits(15, 15))
        second[card.strongest_axis] = next(
            t.judgement.reading["need"]
            for t in state.turns
            if t.judgement.reading["stage"] == (2 if card.strongest_axis == "P" else 1)
            and t.judgement.reading["need"] != "heard"
        )
    assert second == {"A": "weight", "C": "meaning", "P": "way"}


def test_faults_are_injected_by_seed():
    roles = scripted_roles(EnvironmentConfig(fault_rate=0.3))
    runs = [[hold_dialogue(c, 2, mixed(3), roles, Limits(8, 8)) for c in CARDS] for _ in range(2)]
    assert runs[0] == runs[1]
    turns = [turn for state in runs[0] for turn in state.turns]
    share = sum(not turn.scored for turn in turns) / len(turns)
    assert 0.15 < share < 0.45
    assert len({turn.failure for turn in turns}) == 5


def test_director_uses_all_its_actions_but_the_end():
    kinds = set()
    for card in CARDS:
        for policy in (good_helper, mixed(1, 0.7), mixed(2, 0.4)):
            turns = hold_dialogue(card, 0, policy, ROLES, Limits(15, 15)).turns
            kinds |= {turn.action.kind for turn in turns if turn.action}
            assert all(turn.action.kind != "end" for turn in turns[:-1])
    assert kinds >= {"reveal_stage", "reveal_memory", "shift_focus", "turning_point", "continue", "observe"}


def test_metrics_of_the_helper_and_of_the_mixed_speaker():
    helped = reading_metrics([hold_dialogue(card, 0, good_helper, ROLES, SHORT) for card in CARDS])
    assert helped["stage/mean"] == 3 and helped["kind/most"] < 0.6
    assert all(
        helped[f"naming/{what}"] == 1 for what in ("situation", "feeling", "unstated", "step", "value")
    )
    states = [hold_dialogue(card, 0, mixed(4), ROLES, Limits(8, 8)) for card in CARDS]
    metrics = reading_metrics(states)
    for what in ("situation", "feeling", "unstated"):
        assert metrics[f"naming/{what}"] > 2 * metrics[f"naming/{what}_chance"]
    assert sum(
        value for key, value in metrics.items() if key.startswith("kind/") and key != "kind/most"
    ) == pytest.approx(1)
    assert reading_metrics([]) == {}


def test_synthetic_dialogues_are_of_mixed_quality():
    rng = random.Random(0)
    cards = [imagined_scenario(rng) for _ in range(10)] + load_scenarios(split="train")[:10]

    def dialogues(skill):
        policies = (good_helper if skill is None else mixed(i, skill) for i in range(len(cards)))
        held = zip(cards, policies, strict=True)
        return [
            hold_dialogue(card, i, policy, ROLES, Limits(16, 16)) for i, (card, policy) in enumerate(held)
        ]

    groups = [dialogues(skill) for skill in (0.3, 0.7, 1.0, None)]
    means = [statistics.fmean(r for state in group for r in dialogue_rewards(state)) for group in groups]
    assert means == sorted(means) and means[0] < -0.5 and means[1] > 0 and means[3] > 1.5
    turns = [turn for group in groups for state in group for turn in state.turns]
    # What it must teach besides naming: nothing is said twice, and two acts in one reply are two that fit.
    repeated = [any("repeats an earlier" in reason for reason in turn.judgement.reasons) for turn in turns]
    assert sum(repeated) < 0.01 * len(turns)
    levels = {1: [], 2: []}
    for turn in (turn for state in groups[1] for turn in state.turns):
        levels[len(turn.judgement.reading["acts"])].append(sum(turn.judgement.levels))
    assert statistics.fmean(levels[2]) > statistics.fmean(levels[1]) + 0.5
    messages = synthetic_dialogue(cards[0], 5)
    assert messages == synthetic_dialogue(cards[0], 5) and messages != synthetic_dialogue(cards[0], 6)
    assert [m["role"] for m in messages[:2]] == ["user", "assistant"] and len(messages) == 16


def test_every_reply_of_the_speaker_takes_the_next_wording():
    def places(turn):
        sentences = read(turn.reply).sentences
        return {
            CONSTRUCTIONS[s.kind].index(s.frame) for s in sentences if len(CONSTRUCTIONS[s.kind]) == WORDINGS
        }

    compared = 0
    for card in CARDS[:6]:
        turns = hold_dialogue(card, 1, mixed(1, 0.9), ROLES, Limits(24, 24)).turns
        for before, after in itertools.pairwise(map(places, turns)):
            if before and after:  # not where an act of few wordings is said
                assert after == {(max(before) + 1) % WORDINGS}
                compared += 1
    assert compared > 80
    first = [hold_dialogue(CARDS[0], seed, good_helper, ROLES, Limits(1, 1)).turns[0] for seed in range(99)]
    assert set().union(*map(places, first)) == set(range(WORDINGS))  # drawn


def test_the_helper_takes_up_what_was_said_last():
    several = 0
    for card in CARDS:
        (turn,) = hold_dialogue(card, 0, good_helper, ROLES, Limits(1, 1)).turns
        said = sorted((turn.user.find(p), p) for p in card.story.stages[0].particulars if p in turn.user)
        several += len(said) > 1
        assert said[-1][1] in turn.reply, (turn.user, turn.reply)
    assert several > 3


def test_imagined_cards_are_many_and_sound():
    rng = random.Random(1)
    cards = [imagined_scenario(rng) for _ in range(200)]
    particulars = {p for card in cards for stage in card.story.stages for p in stage.particulars}
    assert len(particulars) > 1000 and len({card.id for card in cards}) == 200
    for card in cards:
        for stage in card.story.stages:
            assert all(f" {p}" in line for p, line in zip(stage.particulars, stage.line, strict=True))
            assert all(len(line.split()) <= 10 for line in stage.line)
    again = random.Random(1)
    assert [imagined_scenario(again) for _ in range(3)] == cards[:3]


def test_thousands_of_turns_a_second():
    limits = Limits(8, 8)
    replies = {
        card: [t.reply for t in hold_dialogue(card, 9, mixed(9), ROLES, limits).turns] for card in CARDS
    }
    start = time.perf_counter()
    turns = sum(
        hold_dialogue(card, seed, lambda s: replies[s.scenario][s.turn_count], ROLES, limits).turn_count
        for card in CARDS
        for seed in range(10, 14)
    )
    # 4,000 to 5,000 measured on one busy core; the bound leaves room for a slow or loaded machine.
    assert turns / (time.perf_counter() - start) > 500


def test_stripped_dialogues_give_the_same_metrics_and_hold_no_text():
    roles = scripted_roles(EnvironmentConfig(fault_rate=0.2))
    states = [hold_dialogue(card, 3, mixed(2), roles, SHORT) for card in CARDS[:6]]
    text = json.dumps([strip_texts(state) for state in states])  # as it travels between processes
    again = [
        from_stripped(state.scenario, what) for state, what in zip(states, json.loads(text), strict=True)
    ]
    assert summarize(again, 0.85) == summarize(states, 0.85)
    assert reading_metrics(again) == reading_metrics(states)
    said = {
        word for state in states for turn in state.turns for word in (turn.user + " " + turn.reply).split()
    }
    names = {"position", "levels", "reading", "failure", "truncated", "seed", "outcome", "rule", "turns"}
    words = {word for word in re.findall(r"[A-Za-z]+", text)} - names
    labels = {r["kind"] for r in readings(states)} | {n["what"] for r in readings(states) for n in r["named"]}
    allowed = {part for label in labels for part in re.findall(r"[A-Za-z]+", label)}
    allowed |= {"named", "what", "right", "kind", "stage", "null", "true", "false", "max"}
    allowed |= {state.outcome for state in states} | {
        "timeout",
        "transport",
        "malformed",
        "out",
        "of",
        "range",
    }
    assert words <= allowed | set(re.findall(r"[A-Za-z]+", " ".join(str(s.rule) for s in states))), (
        words - allowed
    )
    assert len(said) > 100
