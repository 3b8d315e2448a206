"""The journal: what comes back from it is what was written, and a torn or failed end is held anew."""

import os
from dataclasses import replace

import pytest

from mapo_jax.environment.dialogue import Action, DialogueState, Judgement, Turn
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.rollout.journal import Journal, journal_files, prune

CARD = load_scenarios()[0]
JUDGED = Judgement((1, 0, 0, -1, 2, 0), ("e",) * 6, ("r",) * 6, {"kind": "x"})


def opened(seed=7):
    return DialogueState(CARD, seed, (), "First.")


def held(state, *, judgement=JUDGED, user="Next.", **end):
    """The dialogue one turn later."""
    turn = Turn(
        state.user,
        "R \u2028 \u4f60",
        judgement,
        None if judgement else "timeout",
        (-1.5, -2.25, -0.1),
        Action("reveal_stage", "1", "Go."),
        True,
    )
    return replace(state, turns=(*state.turns, turn), user=user, **end)


def write(file, *states):
    with Journal(file) as journal:
        for state in states:
            journal.note(state, (5, 6, 2), (-0.1, -1 / 3, -2e-8))


def taken_up(file, state=None):
    with Journal(file) as journal:
        return list(journal.turns(state or opened()))


def test_turns_come_back_equal(tmp_path):
    one = held(opened())
    two = held(one, user="", outcome="timeout", rule="max_turns")
    write(tmp_path / "j", one, two)
    (first, after_one), (second, after_two) = taken_up(tmp_path / "j")
    assert after_one == one and after_two == two
    assert first.ids == (5, 6, 2) and first.logprobs == (-0.1, -1 / 3, -2e-8) and second.index == 1
    assert taken_up(tmp_path / "j", opened(seed=8)) == []


def test_openings(tmp_path):
    with Journal(tmp_path / "j") as journal:
        assert journal.opening("a", 1) is None
        journal.note_opening("a", 1, "Hello\n")
    with Journal(tmp_path / "j") as journal:
        assert journal.opening("a", 1) == "Hello\n" and journal.opening("a", 2) is None


@pytest.mark.parametrize("cut", [2, 30, 200])
def test_a_torn_line_is_a_turn_that_was_not_finished(tmp_path, cut):
    file = tmp_path / "j"
    one = held(opened())
    write(file, one, held(one))
    file.write_bytes(file.read_bytes()[:-cut])
    assert [state for _, state in taken_up(file)] == [one]
    again = held(one, user="Another.")
    write(file, again)
    assert [state for _, state in taken_up(file)] == [one, again]


NO_TURNS = (
    b"null", b"3", b'"opening"', b"[]", b"{}", b'{"opening": "a"}', b"[" * 10**5, b"\xff\x00",
    b'{"opening": 1, "scenario": [], "seed": 1}',
)  # fmt: skip


@pytest.mark.parametrize("line", NO_TURNS)
def test_a_line_that_is_no_turn_is_left_out_and_said(tmp_path, line, caplog):
    file = tmp_path / "j"
    one = held(opened())
    two = held(one)
    write(file, one)
    assert [state for _, state in taken_up(file)] == [one] and not caplog.text
    file.write_bytes(line + b"\n" + file.read_bytes() + line + b"\n")
    write(file, two)
    assert [state for _, state in taken_up(file)] == [one, two]
    assert f"{file}: lines left out because they are no finished turns: 2" in caplog.text


def test_a_full_disk_tears_no_line(tmp_path, monkeypatch):
    one = held(opened())
    with Journal(tmp_path / "j") as journal:
        journal.note(one, (5, 2), (-0.1, -0.2))
        write_part = os.write
        monkeypatch.setattr(os, "write", lambda handle, data: write_part(handle, data[:7]))
        with pytest.raises(OSError, match="No space left") as full:
            journal.note(held(one), (5, 2), (-0.1, -0.2))
        assert full.value.filename == str(tmp_path / "j")
    monkeypatch.undo()
    assert [state for _, state in taken_up(tmp_path / "j")] == [one]


def test_a_failed_end_is_held_anew_and_a_failure_in_the_middle_stays(tmp_path):
    one = held(opened(), judgement=None)
    two = held(one)
    three = held(two, judgement=None)
    broken = held(three, user="", outcome="error", failure="transport")
    write(tmp_path / "j", one, two, three, broken)
    assert [state for _, state in taken_up(tmp_path / "j")] == [one, two]
    # Held anew, the turn replaces what followed the old one.
    better = held(two, user="Better.")
    write(tmp_path / "j", better)
    assert [state for _, state in taken_up(tmp_path / "j")] == [one, two, better]


def test_a_journal_of_another_dialogue_is_not_taken_up(tmp_path):
    write(tmp_path / "j", held(opened()))
    assert taken_up(tmp_path / "j", replace(opened(), user="Something else.")) == []


def test_journals_that_a_checkpoint_covers_are_removed(tmp_path):
    for step in (3, 4, 5):
        for stream in ("train", "evaluation"):
            Journal(*journal_files(tmp_path, stream, step)).close()
    prune(tmp_path, 4)
    assert sorted(file.name for file in (tmp_path / "journal").iterdir()) == [
        "evaluation_000004.jsonl",
        "evaluation_000005.jsonl",
        "train_000004.jsonl",
        "train_000005.jsonl",
    ]


def test_what_other_processes_wrote_of_a_collection_is_taken_up(tmp_path):
    """The run had two processes; one goes on with the turns of both."""
    one, other = held(opened(1)), held(opened(2))
    for index, state in enumerate((one, other)):
        file, *others = journal_files(tmp_path, "train", 12, f"-0000{index}-of-00002")
        assert len(others) == index
        write(file, state)
    file, *others = journal_files(tmp_path, "train", 12)
    assert file.name == "train_000012.jsonl" and len(others) == 2
    with Journal(file, *others) as journal:
        assert [after for _, after in journal.turns(opened(1))] == [one]
        assert [after for _, after in journal.turns(opened(2))] == [other]
        journal.note(held(one), (5, 2), (-0.1, -0.2))
    with Journal(*journal_files(tmp_path, "train", 12)) as journal:
        assert [after for _, after in journal.turns(opened(1))] == [one, held(one)]
    prune(tmp_path, 13)
    assert not list((tmp_path / "journal").iterdir())
