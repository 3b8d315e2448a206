from dataclasses import replace

import pytest

from mapo_jax.reporting.credit import Credit
from mapo_jax.reporting.dialogues import SavedBatch
from mapo_jax.reporting.diversity import analyse, distinct, shifts, words
from mapo_jax.reporting.folder import read_run


@pytest.fixture(scope="module")
def talk(run_folder):
    """Makes a batch from replies and their rewards."""
    model = read_run(run_folder, dialogues=10).training[0].dialogues[0]
    first = model.turns[0]

    def make(dialogues, step=1):
        made = [
            replace(model, state=replace(model.state, turns=tuple(replace(first, reply=r) for r, _ in turns)))
            for turns in dialogues
        ]
        rewards = [tuple(reward for _, reward in turns) for turns in dialogues]
        return SavedBatch(step, False, tuple(made)), [Credit(entry, entry) for entry in rewards]

    return make


def test_words_keep_apostrophes_and_letters_of_all_kinds():
    assert words("I don't KNOW, Žofie… 你好!") == ["i", "don't", "know", "žofie", "你好"]


def test_distinct_n_by_hand():
    replies = [["a", "b", "a"], ["a", "b"]]
    assert distinct(replies, 1, 5) == 2 / 5
    assert distinct(replies, 2, 5) == 2 / 3  # ab, ba, ab
    assert distinct(replies, 1, 3) == 2 / 3  # the first three words
    assert distinct(replies, 1, 6) is None  # fewer words than asked for


def test_openings_and_what_they_cost_by_hand(talk):
    batch, credits = talk(
        [
            [("You are so brave today.", 1.0), ("You are so brave again.", -3.0)],
            [("I see.", 2.0), ("You are so brave.", None)],
        ]
    )
    found = analyse([batch], [credits])[0]
    top = found.openings[0]
    assert (top.text, top.count, top.share) == ("you are so brave", 3, 0.75)
    assert (top.reward, top.cost) == (-1.0, -3.0)  # mean of 1 and -3, against 2; the unscored one counts not
    assert len(found.openings) == 1  # what occurs once is no repeat
    assert found.own_repeats == 0.25  # the second reply opens like the first of its own dialogue
    assert found.own_cost == -3.0 - 1.5


def test_phrases_that_rise_and_fall(talk):
    before = talk(
        [[("I am sorry to hear that.", -1.0)], [("I am sorry to hear that.", -2.0)], [("Tell me.", 0)]]
    )
    after = talk([[("You must feel so alone now.", 2.0)]] * 3 + [[("I am sorry to hear that.", -3.0)]])
    rising, falling = shifts(before, after)
    assert rising[0].text in "you must feel so alone now" and len(rising[0].text.split()) == 5
    assert (rising[0].before, rising[0].after, rising[0].reward) == (0.0, 0.75, 2.0)
    assert falling[0].before == pytest.approx(2 / 3) and falling[0].after == 0.25
    assert falling[0].reward == -2.0
    assert len(rising) == len(falling) == 1  # one phrase of each reply, not every window of it


def test_empty_replies_and_no_dialogues(talk):
    batch, credits = talk([[("", 0.0), ("", 0.0)]])
    assert analyse([batch], [credits])[0].openings == ()
    assert analyse([], []) == []
