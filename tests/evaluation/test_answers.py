import json

import pytest

from mapo_jax.errors import UserError
from mapo_jax.evaluation.answers import ANSWERS, Answer, Folder, Prompt, ask

PROMPTS = [Prompt(f"p{i}", f"How is {i}?", {"id": str(i)}) for i in range(6)]
SETTINGS = {"benchmark": "test", "temperature": 0.0}


class Scripted:
    """Answers in reverse order, and gives up after `patience` answers."""

    def __init__(self, patience=100):
        self.patience = patience
        self.asked = []

    def answer(self, prompts, save):
        for prompt in reversed(prompts):
            if self.patience == 0:
                raise UserError("the line is dead")
            self.patience -= 1
            self.asked.append(prompt.id)
            save(prompt, Answer(f"well: {prompt.text}\u2028{{}}", False))


def test_every_prompt_is_answered_once_though_it_takes_three_tries(tmp_path, console):
    folder = Folder(tmp_path / "out", ANSWERS)
    for count in (2, 5):
        broken = Scripted(2 if count == 2 else 3)
        with pytest.raises(
            UserError, match=rf"the line is dead; {count} of 6 answers are saved in .*answers"
        ):
            ask(lambda broken=broken: broken, PROMPTS, folder, SETTINGS, console)
    with folder.file.open("ab") as file:  # a kill in the middle of a line
        file.write(b'{"id": "0", "answer": "we')
    last = Scripted()
    ask(lambda: last, PROMPTS, folder, SETTINGS, console)
    assert last.asked == ["p0"]
    assert {row["id"]: row["answer"] for row in folder.rows()} == {
        str(i): f"well: How is {i}?\u2028{{}}" for i in range(6)
    }
    assert len(folder.rows()) == 6

    def never():
        raise AssertionError("nothing is left to be asked")

    ask(never, PROMPTS, folder, SETTINGS, console)


def test_what_save_raises_ends_it_and_what_was_saved_stays(tmp_path, console):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    folder = Folder(tmp_path, ANSWERS)
    with pytest.raises(Stop):
        ask(Scripted, PROMPTS, folder, SETTINGS, console, stop)
    assert [row["id"] for row in folder.rows()] == ["5"]


def test_answers_of_other_settings_are_left_alone(tmp_path, console):
    folder = Folder(tmp_path / "out", ANSWERS)
    ask(Scripted, PROMPTS, folder, SETTINGS, console)
    before = folder.file.read_bytes()
    with pytest.raises(
        UserError, match=r"an evaluation with temperature 0.0, not 0.5; choose another --output"
    ):
        ask(Scripted, PROMPTS, folder, SETTINGS | {"temperature": 0.5}, console)
    assert folder.file.read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ANSWERS).write_text("mine")
    with pytest.raises(UserError, match="is not ours"):
        ask(Scripted, PROMPTS, Folder(tmp_path / "other", ANSWERS), SETTINGS, console)
    assert (tmp_path / "other" / ANSWERS).read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        ask(Scripted, PROMPTS, Folder(tmp_path / "file", ANSWERS), SETTINGS, console)


def test_answers_of_version_0_1_are_added_to(tmp_path, console):
    """Its settings named keys that are gone."""
    folder = Folder(tmp_path, ANSWERS)
    ask(Scripted, PROMPTS, folder, {**SETTINGS, "rollout.top_p": 1.0, "rollout.lanes": None}, console)
    ask(Scripted, PROMPTS, folder, SETTINGS, console)
    assert len(folder.rows()) == len(PROMPTS)


def test_two_processes_do_not_share_a_folder(tmp_path, console):
    folder = Folder(tmp_path, ANSWERS)
    with folder.opened(SETTINGS), pytest.raises(UserError, match="another process is at work"):
        ask(Scripted, PROMPTS, Folder(tmp_path, ANSWERS), SETTINGS, console)


def test_progress_is_said_where_there_is_no_terminal(tmp_path, console, capsys):
    ask(Scripted, PROMPTS, Folder(tmp_path, ANSWERS), SETTINGS, console)
    assert "6 of 6 answers" in capsys.readouterr().out
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS


class Saying:
    """Answers with the contents given."""

    def __init__(self, *contents):
        self.contents = contents

    def answer(self, prompts, save):
        for prompt, content in zip(prompts, self.contents, strict=False):
            save(prompt, Answer(content, False))


def test_contents_are_saved_as_text_and_others_not_at_all(tmp_path, console):
    folder = Folder(tmp_path / "out", ANSWERS)
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    said = Saying(parts, "half \ud83d", None, 7, {"a": 1}, "")
    with pytest.raises(UserError, match=r"2 answers cannot be used .*4 of 6 answers are saved"):
        ask(lambda: said, PROMPTS, folder, SETTINGS, console)
    found = {row["id"]: row["answer"] for row in folder.rows()}
    assert found == {"0": "one two", "1": "half \ufffd", "2": None, "5": ""}
    ask(lambda: Saying("late", "later"), PROMPTS, folder, SETTINGS, console)
    assert len(folder.rows()) == 6


def test_settings_of_names_that_are_no_utf8_are_compared(tmp_path, console):
    folder, settings = Folder(tmp_path / "out", ANSWERS), SETTINGS | {"model": "mod\udce9le"}
    for _ in range(2):
        ask(Scripted, PROMPTS, folder, settings, console)


def test_a_row_that_lacks_what_it_must_hold_is_named(tmp_path):
    folder = Folder(tmp_path, ANSWERS)
    folder.file.write_text('{"case": "a", "rollout": 0}\n{"case": ["a"], "rollout": 0}\n')
    with pytest.raises(UserError, match=r"line 2, is no saved row \('case'"):
        folder.rows(case=str, rollout=int)
