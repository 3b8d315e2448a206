"""Scripted dialogues written as transcripts; a judge of our own where no card is known."""

import asyncio
import json

import pytest

from mapo_jax.config import EnvironmentConfig
from mapo_jax.environment.dialogue import Judgement, RoleFailure
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.scripted import scripted_roles
from mapo_jax.environment.scripted.helper import good_helper, hold_dialogue
from mapo_jax.environment.state import Limits
from mapo_jax.errors import UserError
from mapo_jax.evaluate import main
from mapo_jax.evaluation import transcripts
from mapo_jax.evaluation.answers import Folder

CARDS = load_scenarios(split="test")[:2]


def write(folder, *rows):
    file = folder / "chats.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def chat(*texts, **changes):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]} | changes


class LengthJudge:
    """Harm for a reply of one word, progress for others; fails on an empty one."""

    def __init__(self):
        self.seen = []

    async def score(self, state, reply):
        self.seen.append((state.scenario.id, state.turn_count, state.user, reply))
        if not reply.strip():
            raise RoleFailure("timeout")
        harm = -1 if len(reply.split()) == 1 else 0
        levels = (0, harm, 1 + harm, 0, 0, 0)
        return Judgement(levels, ("e",) * 6, tuple(f"reason {i}" for i in range(6)))


def judge(folder, chats, judge, console):
    folder = Folder(folder, transcripts.JUDGED)
    with folder.opened({"a": 1}) as file:
        done = {row["case"] for row in transcripts.saved_rows(folder)}
        missing = [chat for chat in chats if chat.id not in done]
        asyncio.run(transcripts.judge_all(missing, judge, file, console, 2))
    return transcripts.saved_rows(folder)


def test_the_scripted_judge_finds_in_a_transcript_what_it_found_in_the_dialogue(tmp_path, console):
    # Of one stage: the director's later choices are not in a transcript, its first reveals nothing yet.
    roles, limits = scripted_roles(EnvironmentConfig()), Limits(1, 1)
    states = [hold_dialogue(card, seed, good_helper, roles, limits) for card in CARDS for seed in range(3)]
    rows = [{"messages": s.messages, "scenario": s.scenario.id, "id": i} for i, s in enumerate(states)]
    chats = transcripts.read_transcripts(write(tmp_path, *rows), CARDS, need_card=True)
    found = judge(tmp_path / "out", chats, roles.judge, console)
    assert [row["levels"] for row in found] == [[list(s.turns[0].judgement.levels)] for s in states]
    assert any(any(row["levels"][0]) for row in found)


def test_messages_become_turns(tmp_path):
    row = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "I am late."},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": "Oh."},
            {"role": "user", "content": "Well?"},
        ],
        "start": {key: 1 for key in transcripts.INDICATORS},
    }
    (one,) = transcripts.read_transcripts(write(tmp_path, row), [], need_card=False)
    assert one.turns == (("I am late.\nAgain.", "Oh."),)
    assert one.scenario.start_position == (-7, -9, -9) and one.given == "row"
    (unknown,) = transcripts.read_transcripts(write(tmp_path, chat("Hi", "Ho")), [], need_card=False)
    assert unknown.scenario.start_position == (-17, -19, -19) and unknown.given == "unknown"


def test_failures_leave_turns_unscored_and_positions_where_they_were(tmp_path, console):
    chats = transcripts.read_transcripts(
        write(tmp_path, chat("a", "Two words", "b", "", "c", "Short", id="x"), chat("a", " ", id="y")),
        [],
        need_card=False,
    )
    found = judge(tmp_path / "out", chats, LengthJudge(), console)
    (row,) = found  # of the other no turn could be judged: it is tried again next time
    assert row["levels"] == [[0, 0, 1, 0, 0, 0], None, [0, -1, 0, 0, 0, 0]]
    assert row["failures"] == [None, "timeout", None]

    again = LengthJudge()
    judge(tmp_path / "out", chats, again, console)
    assert [reply for _, _, _, reply in again.seen] == [" "]


def test_reasoning_is_not_judged_and_reasoning_alone_is_no_reply(tmp_path, console):
    row = chat("a", "<think>Hm.</think>Two words", "b", "<think>Hm.", "c", None, "d", "Hm.</think>Short")
    row["messages"][0]["content"] = [{"type": "text", "text": "a "}, {"type": "text", "text": "\ud83d"}]
    chats = transcripts.read_transcripts(write(tmp_path, row), [], need_card=False)
    assert chats[0].turns == (("a \ufffd", "Two words"), ("b", None), ("c", None), ("d", "Short"))
    listening = LengthJudge()
    (row,) = judge(tmp_path / "out", chats, listening, console)
    assert [reply for _, _, _, reply in listening.seen] == ["Two words", "Short"]
    assert row["levels"] == [[0, 0, 1, 0, 0, 0], None, None, [0, -1, 0, 0, 0, 0]]
    assert row["failures"] == [None, "no answer", "no answer", None]
    assert [message["content"] for message in row["messages"]][1::2] == ["Two words", "", "", "Short"]


def test_the_worst_turns_come_first(tmp_path, console):
    chats = transcripts.read_transcripts(
        write(tmp_path, chat("a", "Two words", "b", "Short", id="x"), chat("c", "No", id="y")),
        [],
        need_card=False,
    )
    worst = transcripts.worst_turns(judge(tmp_path / "out", chats, LengthJudge(), console), 2)
    # From (-17, -18, -19) after a step on A, or from the start: C falls by 2 to -19 in both.
    start = (16**2 + 18**2 + 18**2) ** 0.5 - (18**2 + 18**2 + 18**2) ** 0.5
    later = (16**2 + 17**2 + 18**2) ** 0.5 - (18**2 + 17**2 + 18**2) ** 0.5
    assert [(turn["case"], turn["turn"]) for turn in worst] == [("x", 2), ("y", 1)]
    assert [turn["reward"] for turn in worst] == pytest.approx([later, start])
    assert worst[0]["user"] == "b" and worst[0]["reply"] == "Short"
    assert worst[0]["findings"] == [("C harm", -1, "e", "reason 1")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 2: `messages` must be a list"),
        ({"messages": ["x"]}, "line 2, message 1: needs a `role`"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 2, message 1"),
        ({"messages": [{"role": "user", "content": None}]}, "line 2, message 1"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}, "line 2, message 2"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "line 2, message 1"),
        (chat("a", "b", start=[0] * 9), "line 2: `start`: at least one level"),
        (chat("a", "b", scenario=["x"]), "line 2: there is no card"),
        (chat("only me"), "line 2: there is no reply to a user"),
        (chat("a", "b", start=[1, 2]), "line 2: `start`: .*nine|line 2: `start`: a start state has 9"),
        (chat("a", "b", start={"C1": 9}), "line 2: `start`: "),
        (chat("a", "b", scenario="nowhere"), "line 2: there is no card 'nowhere'"),
        (chat("a", "b", id="1"), "line 2: the id 1 occurs a second time"),
    ],
)
def test_lines_that_are_no_conversations_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        transcripts.read_transcripts(write(tmp_path, chat("a", "b"), row), CARDS, need_card=False)


def test_the_command_writes_scores_and_a_page(tmp_path, capsys):
    rows = [
        chat("I am tired.", "<b>Oh</b> & well.", "Hm.", "[bold]I hear you.", scenario=CARDS[0].id, id="x<y")
    ]
    file, out = write(tmp_path, *rows), tmp_path / "out"
    assert main(["dialogues", "--transcripts", str(file), "--output", str(out)]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["dialogues"] == 1 and len(scores["worst"]) == 2
    page = (out / "report.html").read_text()
    assert "&lt;b&gt;Oh&lt;/b&gt; &amp; well." in page and "<b>Oh" not in page
    assert "[bold]I hear you." in capsys.readouterr().out

    rows = [chat("Hm.", "<think>Oh", "a", "Oh \ud83d", scenario=CARDS[0].id, id="[/x]\x1b[2J")]
    assert main(["dialogues", "--transcripts", str(write(tmp_path, *rows)), "--output", f"{out}2"]) == 0
    shown = capsys.readouterr().out
    assert "1 replies are no answers" in shown and "[/x]\\x1b[2J, 2" in shown and "\x1b" not in shown

    assert main(["dialogues", "--transcripts", str(write(tmp_path, chat("a", "b")))]) == 2
    assert "names no `scenario`" in capsys.readouterr().err
