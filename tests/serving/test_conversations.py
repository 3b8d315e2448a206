"""Conversations that are kept: whole lines, feedback, who does not agree, a full disk; reading them again."""

import errno
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from mapo_jax.chat_log import ChatLog, is_chat_log, read_chats
from mapo_jax.errors import UserError
from mapo_jax.evaluation.transcripts import read_transcripts
from mapo_jax.files import append_line
from mapo_jax.serving.limits import Limits

HELLO = [{"role": "user", "content": "Hello, it is me."}]


@pytest.fixture
def kept(serving, tmp_path):
    return serving(chats=ChatLog(tmp_path / "kept"))


@pytest.fixture
def say(kept):
    """`say(messages, **options)`: (reply's id, messages with it)."""
    with openai.OpenAI(base_url=f"{kept.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        def ask(messages, **options):
            answer = client.chat.completions.create(model="tiny", messages=messages, **options)
            return answer.id, [
                *messages,
                {"role": "assistant", "content": answer.choices[0].message.content},
            ]

        yield ask


def rate(server, reply, rating, comment="", status=200):
    answer = httpx2.post(
        f"{server.url}/v1/feedback", json={"reply": reply, "rating": rating, "comment": comment}
    )
    assert answer.status_code == status
    return answer.json()


def user(text):
    return {"role": "user", "content": text}


def test_conversations_with_feedback(kept, say):
    """Two that go on, one of them twice from one place; ratings, one taken back."""
    first, chat = say(HELLO)
    other, another = say([user("Another one.")])
    second, longer = say([*chat, user("And now?")])
    again, fork = say([*chat, user("Or else?")])
    rate(kept, first, 1, "kind")
    rate(kept, second, -1)
    rate(kept, second, 0)
    rate(kept, again, -1, 'says "so"\nand so')
    folder = kept.service.chats.folder
    assert is_chat_log(folder)
    (file,) = folder.iterdir()
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert len(file.read_text().splitlines()) == 4 + 4
    chats = read_chats(folder)
    assert [chat["messages"] for chat in chats] == [
        longer,
        another,
        fork,
    ]
    assert [chat["replies"] for chat in chats] == [[first, second], [other], [again]]
    assert chats[0]["feedback"] == {first: {"rating": 1, "comment": "kind"}}
    assert chats[2]["feedback"] == {again: {"rating": -1, "comment": 'says "so"\nand so'}}


def test_who_does_not_agree_is_not_kept(kept, say):
    reply, _ = say(HELLO, store=False)
    assert not list(kept.service.chats.folder.iterdir())
    assert rate(kept, reply, 1, status=404)["error"]["param"] == "reply"


def test_a_rate_covers_feedback(serving, tmp_path):
    server = serving(chats=ChatLog(tmp_path / "kept"), limits=Limits(requests_per_minute=2))
    for status in (404, 404, 429):
        rate(server, "chatcmpl-1", 1, status=status)


def test_without_a_folder_nothing_is_kept(server):
    rate(server, "chatcmpl-1", 1, status=404)


@pytest.mark.parametrize(
    "content", [{"reply": "x", "rating": 5}, {"rating": 1}, {"reply": "x", "rating": "good"}]
)
def test_malformed_feedback(kept, content):
    assert httpx2.post(f"{kept.url}/v1/feedback", json=content).status_code == 400


def test_a_full_disk_stops_keeping_and_not_serving(kept, say, monkeypatch):
    first, chat = say(HELLO)

    def full(path, line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("mapo_jax.chat_log.append_line", full)
        _, chat = say([*chat, user("And now?")])
        health = httpx2.get(f"{kept.url}/health")
        assert health.status_code == 200 and health.json()["status"] == "degraded"
        assert "is full" in health.json()["conversations"] and health.json()["lost_lines"] == 1
        rate(kept, first, 1, status=507)
    _, longer = say([*chat, user("Well.")])
    health = httpx2.get(f"{kept.url}/health").json()
    assert health["status"] == "ok" and health["lost_lines"] == 2
    (file,) = kept.service.chats.folder.iterdir()
    assert [json.loads(line)["kind"] for line in file.read_text().splitlines()] == ["turn", "turn"]
    assert [chat["messages"] for chat in read_chats(kept.service.chats.folder)] == [chat[:2], longer]


def test_a_disk_that_fills_up_in_a_line_leaves_the_lines_of_others(tmp_path, monkeypatch):
    """Two servers on one folder: one writes between the other's opening of the file and its failed write."""
    one, other = ChatLog(tmp_path), ChatLog(tmp_path)
    row = {"conversation": "c", "model": "m", "scenario": None, "messages": HELLO}
    write = os.write

    def fills_up(handle, data):
        monkeypatch.setattr(os, "write", write)
        assert other.add("turn", row | {"reply": "other"})
        return write(handle, data[:20])

    assert one.add("turn", row | {"reply": "first"})
    monkeypatch.setattr(os, "write", fills_up)
    assert not one.add("turn", row | {"reply": "lost"}) and "is full" in one.problem
    assert one.add("turn", row | {"reply": "last"})
    assert [chat["replies"] for chat in read_chats(tmp_path)] == [["first", "other", "last"]]
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_restart_goes_on_after_a_cut_line_and_takes_feedback_on_what_was_kept(tmp_path):
    row = {"conversation": "c", "model": "m", "scenario": None, "messages": HELLO}
    assert ChatLog(tmp_path).add("turn", row | {"reply": "first"})
    (file,) = tmp_path.iterdir()
    with file.open("a") as torn:
        torn.write('[1]\n{"kind": "tu')
    chats = ChatLog(tmp_path)
    assert chats.has("first") and not chats.has("tu")
    assert chats.add("turn", row | {"reply": "last"})
    with pytest.raises(UserError, match="line 2"):
        read_chats(tmp_path)
    file.write_text("".join(file.read_text().splitlines(True)[::3]))
    assert [chat["replies"] for chat in read_chats(tmp_path)] == [["first", "last"]]


def test_a_folder_that_is_gone_is_a_problem_and_its_return_ends_it(tmp_path):
    chats = ChatLog(tmp_path / "kept")
    (tmp_path / "kept").rmdir()
    row = {"conversation": "c", "reply": "r", "model": "m", "scenario": None, "messages": HELLO}
    assert not chats.add("turn", row) and str(tmp_path / "kept") in chats.problem and chats.lost == 1
    (tmp_path / "kept").mkdir()
    assert chats.add("turn", row) and chats.problem is None


def test_a_slow_disk_holds_up_no_other_reply(kept, say, monkeypatch):
    release = threading.Event()

    def slow(path, line):
        assert release.wait(60)
        append_line(path, line)

    monkeypatch.setattr("mapo_jax.chat_log.append_line", slow)
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(say, HELLO)
        _, chat = say([user("Not me.")], store=False)
        assert not writing.done() and len(chat) == 2
        release.set()
        _, chat = writing.result()
    assert [kept["messages"] for kept in read_chats(kept.service.chats.folder)] == [chat]


def test_who_agrees_later_has_the_conversation_kept_whole(kept, say):
    _, chat = say(HELLO, store=False)
    _, chat = say([*chat, user("And now?")])
    _, chat = say([*chat, user("Well.")])
    assert [kept["messages"] for kept in read_chats(kept.service.chats.folder)] == [chat]


def test_replies_that_a_stop_text_ends_stay_one_conversation(kept, say):
    letters, chat = list("aeiou "), []
    for text in ("One.", "Two.", "Three."):
        _, chat = say([*chat, user(text)], stop=letters[:4])
    assert [kept["messages"] for kept in read_chats(kept.service.chats.folder)] == [chat]


def test_two_replies_to_one_message_are_two_conversations(kept, say):
    _, chat = say(HELLO)
    say([*chat, user("And now?")], n=2)
    kept_chats = [kept["messages"] for kept in read_chats(kept.service.chats.folder)]
    assert [len(messages) for messages in kept_chats] == [4, 4]
    assert all(messages[:3] == [*chat, user("And now?")] for messages in kept_chats)


HUGE = {"type": "text", "text": "part", "x": 10**30}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "developer", "content": "Be kind."}, *HELLO],
        [*HELLO, {"role": "assistant", "content": [HUGE]}, user("More.")],
        [
            *HELLO,
            {"role": "assistant", "content": "x"},
            {"role": "tool", "tool_call_id": "1", "content": "y"},
        ],
        [{"role": "user", "content": []}],
        [{"role": "system", "content": "Only this."}],
    ],
)
def test_what_clients_may_send_is_kept_as_text_and_can_be_read(kept, say, messages):
    """Numbers that are too large, parts, other roles: none of them spoils the folder for all others."""
    say(HELLO)
    content = json.dumps({"model": "tiny", "messages": messages})
    headers = {"content-type": "application/json"}
    url = f"{kept.url}/v1/chat/completions"
    assert httpx2.post(url, content=content, headers=headers, timeout=60).status_code == 200
    assert httpx2.get(f"{kept.url}/health").json()["conversations"] == "on"
    folder = kept.service.chats.folder
    for transcript in read_transcripts(folder, [], need_card=False):
        assert all(isinstance(text, str) for turn in transcript.turns for text in turn)
    for chat in read_chats(folder):
        assert all(isinstance(message["content"], str) for message in chat["messages"])


def test_after_a_restart_a_conversation_is_kept_whole(kept, say, serving, tmp_path):
    """Its beginning is not known any more, so all of it is written."""
    _, chat = say(HELLO)
    kept.model._remembered.clear()
    _, longer = say([*chat, user("And now?")])
    assert [chat["messages"] for chat in read_chats(kept.service.chats.folder)] == [chat, longer]


def test_what_is_kept_can_be_judged(kept, say):
    _, chat = say(HELLO)
    say([*chat, user("And now?")])
    (transcript,) = read_transcripts(kept.service.chats.folder, [], need_card=False)
    assert [user for user, _ in transcript.turns] == ["Hello, it is me.", "And now?"]
    assert transcript.id == read_chats(kept.service.chats.folder)[0]["id"]


def test_a_folder_without_conversations(tmp_path):
    assert not is_chat_log(tmp_path)
    with pytest.raises(UserError, match="no conversations"):
        read_chats(tmp_path)
    (tmp_path / "2026-01-31.jsonl").write_text('{"kind": "turn"}\n')
    with pytest.raises(UserError, match="line 1"):
        read_chats(tmp_path)
