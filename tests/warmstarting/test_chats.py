import json

import pytest

from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.errors import UserError
from mapo_jax.warmstarting.chats import read_chats, synthetic_chats, write_chats

USER = {"role": "user", "content": "I feel tired."}
REPLY = {"role": "assistant", "content": "You sound tired."}


def test_chats_are_read_and_written(tmp_path):
    chats = [
        [{"role": "system", "content": "Be kind."}, USER, REPLY, USER],
        [USER, {"role": "assistant", "content": "Müde? 疲れた?"}],
    ]
    write_chats(tmp_path / "chats.jsonl", chats)
    assert read_chats(tmp_path / "chats.jsonl") == chats


def test_other_keys_and_empty_lines_are_ignored(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"id": 3, "messages": [{**USER, "name": "x"}, REPLY]}) + "\n\n")
    assert read_chats(file) == [[USER, REPLY]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: `messages` must be a list"),
        ('{"messages": []}', "line 2: `messages` must be a list"),
        ('{"messages": ["hello"]}', "line 2, message 1: must be an object"),
        (
            json.dumps({"messages": [USER, {"role": "assistant"}]}),
            "2: `content` must be text, not None",
        ),
        (json.dumps({"messages": [USER, {**REPLY, "content": " "}]}), "message 2: `content` must be text"),
        (json.dumps({"messages": [{**USER, "role": "tool"}, REPLY]}), "message 1: the role is 'tool'"),
        (
            json.dumps({"messages": [REPLY, USER]}),
            "1: the role is 'assistant', but it must be 'user'",
        ),
        (json.dumps({"messages": [USER, USER]}), "message 2: the role is 'user', but it must be 'assistant'"),
        (json.dumps({"messages": [USER]}), "line 2: there is no reply"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [USER, REPLY]}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"chats\.jsonl, ") as caught:
        read_chats(file)
    assert message in str(caught.value)


def test_a_missing_empty_or_binary_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the chats .*nowhere"):
        read_chats(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="empty holds no chats"):
        read_chats(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_chats(tmp_path / "binary")


def test_synthetic_chats_follow_from_the_seed_and_can_be_read_back(tmp_path):
    cards = load_scenarios(split="train")[:3]
    chats = synthetic_chats(cards, 12, 5, turns=3)
    assert chats == synthetic_chats(cards, 12, 5, turns=3)
    assert chats[:6] == synthetic_chats(cards, 6, 5, turns=3)
    assert chats != synthetic_chats(cards, 12, 6, turns=3)
    assert all([m["role"] for m in chat] == ["user", "assistant"] * 3 for chat in chats)
    write_chats(tmp_path / "chats.jsonl", chats)
    assert read_chats(tmp_path / "chats.jsonl") == chats
