"""The terminal chat: a person or the scripted user, with the judge beside the text."""

import re

import pytest

from mapo_jax import chat
from mapo_jax.environment.scenario import load_scenarios

SETTINGS = [
    "rollout.max_reply_tokens=8",
    "rollout.max_tokens=256",
    "rollout.max_turns=3",
    "rollout.min_turns=1",
]


@pytest.fixture
def talk(model_folder, monkeypatch, capsys):
    """`talk(*options, typed=())`: (exit status, what was shown)."""

    def run(*options, typed=()):
        lines = iter(typed)

        def read(self, prompt="", **_):
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("rich.console.Console.input", read)
        status = chat.main(["--model", str(model_folder), *options, *SETTINGS])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def test_a_free_talk(talk):
    status, out, _ = talk(typed=["Hello.", "", "And \udcff\x00\x1b[2J now?"])
    assert status == 0 and out.count("model> ") >= 2
    assert "energy" not in out


def test_a_person_plays_a_card(talk):
    card = load_scenarios()[0]
    status, out, _ = talk("--scenario", card.id, typed=["Hello.", "And now?"])
    assert status == 0
    assert f"You are {card.person.name}" in out
    assert len(re.findall(r"energy -?\d", out)) >= 2 and "distance" in out


def test_the_scripted_user(talk):
    card = load_scenarios()[0]
    status, out, _ = talk("--scenario", card.id, "--user", "scripted")
    assert status == 0
    assert out.count("you> ") == 3
    assert "the conversation is over: timeout (max_turns)" in out
    assert talk("--scenario", card.id, "--user", "scripted")[1] == out  # by the seed


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--user", "scripted"], "--scenario"), (["--scenario", "nobody"], "no scenario 'nobody'")],
)
def test_what_cannot_be(talk, options, message):
    status, _, err = talk(*options)
    assert status == 2 and message in err
