"""Generation and recognition use one table: its sentences are recognised, others are not."""

import random
from itertools import chain

import pytest

from mapo_jax.environment.card_schema import FEELINGS, UNSTATED
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.scripted import lexicon
from mapo_jax.environment.scripted.assessment import FRAME_MEMORY
from mapo_jax.environment.scripted.grammar import (
    CONSTRUCTIONS,
    HELPFUL,
    bare,
    coherent,
    read,
    realise,
    recognise,
    slots_of,
)

CARDS = load_scenarios()


def fillers(card):
    story = card.story
    return {
        "p": [p for stage in story.stages for p in stage.particulars],
        "f": [*FEELINGS, *UNSTATED],
        "s": story.strengths,
        "t": story.steps,
        "v": [card.value],
    }


@pytest.mark.parametrize("kind", CONSTRUCTIONS)
def test_every_construction_is_read_back(kind):
    rng = random.Random(kind)
    for frame in CONSTRUCTIONS[kind]:
        for card in CARDS:
            slots = {slot: rng.choice(fillers(card)[slot]) for slot in slots_of(frame)}
            sentence = realise(frame, slots)
            found, wording, named = recognise(bare(sentence))
            expected = kind
            if kind in ("name_feeling", "name_unstated"):
                expected = "name_feeling" if slots["f"] in FEELINGS else "name_unstated"
            assert (found, wording) == (expected, frame), sentence
            assert dict(named) == {slot: bare(text) for slot, text in slots.items()}
            assert coherent(card, bare(sentence)), sentence


def test_no_construction_is_short_of_variety():
    assert all(len(CONSTRUCTIONS[kind]) > FRAME_MEMORY for kind in HELPFUL)
    frames = [bare(frame) for frames in CONSTRUCTIONS.values() for frame in frames]
    assert len(set(frames)) == len(frames)


def user_sentences(card):
    pools = (lexicon.MESSAGES, lexicon.HINTS, lexicon.WEARY, lexicon.REACTIONS)
    for pool in chain.from_iterable(pools_of.values() for pools_of in pools):
        for frame in pool:
            yield realise(frame, {slot: texts[0] for slot, texts in fillers(card).items()})
    for stage in card.story.stages:
        yield from stage.line


def test_what_the_user_says_is_no_act_of_a_helper():
    for card in CARDS[::7]:
        for sentence in user_sentences(card):
            assert recognise(bare(sentence))[0] is None, sentence


def test_hints_and_frames_never_name_an_unstated_feeling():
    for card in CARDS:
        for sentence in user_sentences(card):
            assert not set(bare(sentence).split()) & set(UNSTATED), sentence


@pytest.mark.parametrize(
    "text",
    [
        "You feel",
        "You feel tired and the night",
        "tired you feel",
        "You feel the.",
        "And you feel tired.",
        "You feel tired the.",
        "You keep coming back to.",
        "You keep coming back to night.",
        "Underneath it you may feel.",
        "Would be something for you?",
    ],
)
def test_only_a_whole_sentence_is_an_act(text):
    assert all(sentence.kind is None for sentence in read(text).sentences)


def test_case_and_spaces_do_not_matter_but_tricks_do():
    assert read("you   feel tired").sentences[0].kind == "name_feeling"
    assert read("You feel tired. You sound sad.").clean
    assert read("YOU FEEL TIRED.").shouted
    for text in (
        "You feel tired!!!",
        "You feel tired..",
        "You feel tired . . .",
        "You feel <b>tired</b>.",
        "YoU feEl tired.",
        "You feel tired 10.",
    ):
        assert not read(text).clean, text


def test_coherence_is_about_neighbouring_words():
    card = CARDS[0]
    assert coherent(card, "you sound tired")
    for words in ("tired you of", "the feel matters", "zebra", "you you you"):
        assert not coherent(card, words), words
