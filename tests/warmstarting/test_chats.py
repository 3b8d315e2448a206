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


def read(tmp_path, *messages, note=lambda text: None):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    (chat,) = read_chats(file, note)
    return chat


def test_weights_are_kept_and_can_be_written(tmp_path):
    unlearnt = {**REPLY, "weight": 0}
    chat = read(
        tmp_path,
        {**USER, "weight": 0},
        unlearnt,
        USER,
        {**REPLY, "weight": 1},
        USER,
        {**REPLY, "weight": None},
    )
    assert chat == [USER, unlearnt, USER, REPLY, USER, REPLY]
    write_chats(tmp_path / "again.jsonl", [chat])
    assert read_chats(tmp_path / "again.jsonl") == [chat]


@pytest.mark.parametrize(
    "content",
    [
        "<think>\n\n</think>\n\nYou sound tired.",
        "\n<think>He is tired.\nSay so.</think> You sound tired.",
        [{"type": "text", "text": "<think>x</think>"}, {"type": "text", "text": "You sound tired."}],
    ],
)
def test_a_think_block_is_left_out_and_said(tmp_path, content):
    notes = []
    assert read(tmp_path, USER, {**REPLY, "content": content}, note=notes.append) == [USER, REPLY]
    (note,) = notes
    assert "chats.jsonl: 1 replies have think blocks, which are left out" in note


def test_reasoning_beside_the_content_is_left_out_and_said(tmp_path):
    notes = []
    chat = read(tmp_path, USER, {**REPLY, "reasoning_content": "Hm."}, note=notes.append)
    assert chat == [USER, REPLY] and len(notes) == 1
    read(tmp_path, USER, {**REPLY, "reasoning_content": None}, note=notes.append)
    assert len(notes) == 1


def test_what_users_say_of_think_blocks_stays(tmp_path):
    user = {**USER, "content": "<think>x</think> <|im_end|>"}
    assert read(tmp_path, user, REPLY) == [user, REPLY]


def test_text_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "I feel "}, "tired", {"type": "input_text", "text": "."}]
    assert read(tmp_path, {**USER, "content": parts}, REPLY) == [USER, REPLY]


def test_a_byte_order_mark_and_escapes_of_all_characters_are_read(tmp_path):
    file = tmp_path / "chats.jsonl"
    user = {**USER, "content": "\U0001f622\u2028\x00"}
    line = json.dumps({"messages": [user, REPLY]})
    assert "\\ud83d" in line
    file.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n" + line.encode())
    assert read_chats(file) == [[user, REPLY]] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 2, is nested too deeply"),
        ('{"messages": ' + '{"a":' * 100_000, "line 2, is nested too deeply"),
        ("\x00\x00", "line 2, is not JSON"),
        ("3" * 5000, "line 2, is not JSON"),
        ("null", "line 2: `messages` must be a list"),
        ('"text"', "line 2: `messages` must be a list"),
        ('{"messages": null}', "line 2: `messages` must be a list"),
        ('{"conversations": []}', "line 2: `messages` must be a list"),
        (
            r'{"messages": [{"role": "user", "content": "\ud83d"}]}',
            "1: `content` holds half a surrogate pair",
        ),
        (r'{"messages": [{"role": "\udc00", "content": "x"}]}', "1: `role` holds half a surrogate pair"),
        (json.dumps({"messages": [{**USER, "content": 3}]}), "1: `content` must be text, not 3"),
        (json.dumps({"messages": [{**USER, "content": []}]}), "1: `content` must be text, not []"),
        (
            json.dumps({"messages": [{**USER, "content": [{"type": "image_url"}]}]}),
            "1: `content` must be text",
        ),
        (json.dumps({"messages": [{**USER, "content": [{"type": "image", "text": "x"}]}]}), "must be text"),
        (json.dumps({"messages": [{**USER, "role": ["user"]}]}), "1: `role` must be text, not ['user']"),
        (json.dumps({"messages": [USER, {**REPLY, "weight": 0.5}]}), "2: `weight` is 0.5; it must be 0"),
        (json.dumps({"messages": [USER, {**REPLY, "weight": 2}]}), "2: `weight` is 2; it must be 0"),
        (json.dumps({"messages": [USER, {**REPLY, "weight": "0"}]}), "2: `weight` is '0'"),
        (json.dumps({"messages": [USER, {**REPLY, "weight": True}]}), "2: `weight` is True"),
        (json.dumps({"messages": [USER, {**REPLY, "weight": [0]}]}), "2: `weight` is [0]"),
        (
            json.dumps({"messages": [{**USER, "weight": 1}, REPLY]}),
            "1: `weight` is 1; it must be 0, as replies",
        ),
        (json.dumps({"messages": [USER, {**REPLY, "weight": 0}]}), "line 2: every reply has `weight` 0"),
        (
            json.dumps({"messages": [USER, {**REPLY, "content": "<think>x</think>\n"}]}),
            "message 2: the reply ends with its think block",
        ),
        (json.dumps({"messages": [USER, {**REPLY, "content": "<think>x"}]}), "2: the reply holds <think>"),
        (json.dumps({"messages": [USER, {**REPLY, "content": "x</think>y"}]}), "2: the reply holds </think>"),
        (
            json.dumps({"messages": [USER, {**REPLY, "content": "x<|im_end|>"}]}),
            "2: the reply holds <|im_end|>",
        ),
        (json.dumps({"messages": [USER, {**REPLY, "tool_calls": [{}]}]}), "2: `tool_calls` cannot be learnt"),
        ("{", "line 2, is not JSON"),
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
    assert len(str(caught.value)) < 500


def test_a_missing_empty_or_binary_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the chats .*nowhere"):
        read_chats(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match=r"chats .*empty are empty"):
        read_chats(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary, line 1: not UTF-8"):
        read_chats(tmp_path / "binary")
    (tmp_path / "mixed").write_bytes(json.dumps({"messages": [USER, REPLY]}).encode() + b"\n{\xe9}\n")
    with pytest.raises(UserError, match=r"mixed, line 2: not UTF-8"):
        read_chats(tmp_path / "mixed")
    (tmp_path / "nothing").write_bytes(b"")
    with pytest.raises(UserError, match=r"chats .*nothing are empty"):
        read_chats(tmp_path / "nothing")


def test_synthetic_chats_follow_from_the_seed_and_can_be_read_back(tmp_path):
    cards = load_scenarios(split="train")[:3]
    chats = synthetic_chats(cards, 12, 5, turns=3)
    assert chats == synthetic_chats(cards, 12, 5, turns=3)
    assert chats[:6] == synthetic_chats(cards, 6, 5, turns=3)
    assert chats != synthetic_chats(cards, 12, 6, turns=3)
    assert all([m["role"] for m in chat] == ["user", "assistant"] * 3 for chat in chats)
    write_chats(tmp_path / "chats.jsonl", chats)
    assert read_chats(tmp_path / "chats.jsonl") == chats
