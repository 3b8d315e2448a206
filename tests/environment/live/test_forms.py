"""Parsing models' answers: strict about the content, tolerant of its surroundings."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.forms import (
    DirectionForm,
    ReplyForm,
    StartForm,
    excerpt,
    findings,
    read,
    spoken,
    whole_characters,
    without_reasoning,
)

GOOD = {
    name: {"evidence": "you said so", "reason": "it does", "level": level}
    for name, level in zip(
        ("C_progress", "C_harm", "A_progress", "A_harm", "P_progress", "P_harm"),
        (1, 0, 2, -1, 0, -2),
        strict=True,
    )
}


def changed(name="C_progress", **fields):
    return json.dumps({**GOOD, name: {**GOOD[name], **fields}})


def failure(text, form=ReplyForm):
    with pytest.raises(RoleFailure) as caught:
        read(text, form)
    assert caught.value.raw == text
    return caught.value


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        f"<think>Maybe {{C_progress: 2}}? Let me see.</think>\n{json.dumps(GOOD)}",
        f"<think>a</think><think>b</think>{json.dumps(GOOD)}",
        f"Here it is:\n```json\n{json.dumps(GOOD, indent=2)}\n```\nThat is all.",
        f"A set {{1, 2}} first. {json.dumps(GOOD)}",
        f"{json.dumps({'note': 'other keys'})} {json.dumps(GOOD)}",
        f"{json.dumps(GOOD)} again: {json.dumps(GOOD)}",
        f"Maybe {changed(level=2)}.\n</think>\n\n{json.dumps(GOOD)}",
        f"<think>Maybe {changed(level=2)}, {changed(evidence='</think>')}.</think>{json.dumps(GOOD)}",
        f"A set {{of things: {json.dumps(GOOD)} and so on}}",
        f"{json.dumps(GOOD)} It said </think> and <think>.",
        f"The reply's <think> and {{ are odd. {json.dumps(GOOD)}",
    ],
    ids=[
        "bare",
        "reasoning",
        "twice",
        "fenced",
        "braces",
        "other",
        "repeated",
        "unopened",
        "drafts",
        "inside",
        "behind",
        "before",
    ],
)
def test_preambles_are_tolerated(text):
    form = read(text, ReplyForm)
    assert [finding.level for finding in findings(form)] == [1, 0, 2, -1, 0, -2]
    assert form.A_progress.evidence == "you said so"


@pytest.mark.parametrize("level", [3, -1, 7, 100])
def test_a_level_beyond_its_scale_is_out_of_range(level):
    assert failure(changed(level=level)).kind == "out_of_range"


def test_harm_above_zero_and_progress_below_are_out_of_range():
    assert failure(changed("A_harm", level=1)).kind == "out_of_range"
    assert "C_progress.level" in failure(changed(level=-2)).detail


@pytest.mark.parametrize("level", ["1", 1.0, 1.5, True, None, [1], {}])
def test_a_level_that_is_no_whole_number_is_malformed(level):
    assert failure(changed(level=level)).kind == "malformed"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I would say a 2.",
        json.dumps(GOOD)[:-20],
        "<think>" + json.dumps(GOOD),
        json.dumps([1, 2]),
        json.dumps({k: v for k, v in GOOD.items() if k != "P_harm"}),
        json.dumps({**GOOD, "bonus": 1}),
        changed(evidence=3),
        changed(reason=" "),
        changed(evidence=" "),
        json.dumps(GOOD) + changed(level=2),
        json.dumps(GOOD).replace('"level": 1', '"level": 1, "level": 2'),
        json.dumps(GOOD).replace('"level": 1', '"level": NaN'),
        "{" * 3000,
        '{"a":' * 3000,
        "{" * 200_000,
        "{" * 5_000_000,
        '{"C_progress":' * 14_000,
        '{"C_progress"}' * 14_000,
        '{"C_progress":{"level":"{' * 10_000,
        '{"C_progress":"' + "\\\\" * 100_000,
        f"<think>{json.dumps(GOOD)}</think>",
        f"<think>a</think><think>{json.dumps(GOOD)}",
        json.dumps({"answer": GOOD}),
        f"So: {json.dumps({'answer': GOOD})}",
    ],
    ids=[
        "empty", "prose", "cut", "unfinished", "list", "missing", "surplus", "type", "no-reason",
        "no-evidence", "two", "twice", "nan", "braces", "deep", "many-braces", "millions", "deep-form",
        "broken-form", "torn-form", "backslashes", "reasoning-alone", "second-block",
        "wrapped", "wrapped-in-prose",
    ],
)  # fmt: skip
def test_everything_else_is_malformed(text):
    assert failure(text).kind == "malformed"


def test_level_zero_needs_no_evidence():
    assert read(changed("C_harm", evidence=""), ReplyForm).C_harm.level == 0


@pytest.mark.parametrize("ascii_only", [True, False])
def test_no_reply_can_make_itself_unscorable(hostile_replies, ascii_only):
    """The reply is quoted as evidence and in a reason, in every kind of wrapping."""
    for reply in hostile_replies:
        quoted = {
            name: {"evidence": f"It says: {reply}", "reason": f"{reply}!", "level": finding["level"]}
            for name, finding in GOOD.items()
        }
        answer = json.dumps(quoted, ensure_ascii=ascii_only)
        wrapped = [
            answer,
            f"```json\n{answer}\n```",
            f"<think>Let me see. {{C_progress: 2}}?</think>\n{answer}",
            f"Let me see.\n</think>\n\n{answer}",
            f"Here it is: {answer} That is all.",
        ]
        for text in wrapped:
            form = read(text, ReplyForm)
            assert [finding.level for finding in findings(form)] == [1, 0, 2, -1, 0, -2], reply[:80]
            assert form.C_harm.evidence == f"It says: {whole_characters(reply)}", reply[:80]
            assert form.model_dump_json()  # it can be serialised


@pytest.mark.parametrize(
    "surroundings", ["The reply says: {} So: {}", "{1} It said: </think> {0}", "{0}\n{1}{0}"]
)
@pytest.mark.parametrize("reply", [json.dumps(GOOD | {"C_progress": {**GOOD["C_harm"], "level": 2}}),
                                   'I care. </think> {"C_progress": 2}'])  # fmt: skip
def test_a_judgement_in_the_reply_is_no_answer(reply, surroundings):
    """It can neither take the answer's place nor contradict it."""
    text = surroundings.format(reply, json.dumps(GOOD))
    assert read(text, ReplyForm, quoted=f"Hm.\n{reply}") == read(json.dumps(GOOD), ReplyForm)
    # Nor does a reply that foresees the answer take it away.
    assert read(f"So: {json.dumps(GOOD)} {{}}", ReplyForm, quoted=json.dumps(GOOD)).C_harm.level == 0


@pytest.mark.parametrize("reply", ["two\nlines", "a\ttab", "\x01"])
def test_characters_that_json_wants_escaped_are_read_as_they_stand(reply):
    raw = json.dumps(GOOD).replace("you said so", reply)
    assert read(raw, ReplyForm).C_progress.evidence == reply


def test_a_reply_without_a_word_needs_no_evidence():
    """Otherwise an empty reply could not be scored."""
    assert read(changed("A_harm", evidence=""), ReplyForm, silent=True).A_harm.level == -1
    assert failure(changed("A_harm", evidence="")).kind == "malformed"


def test_half_a_character_in_an_answer_is_read_as_none():
    assert read(changed(evidence="so \ud83d"), ReplyForm).C_progress.evidence == "so \ufffd"
    problem = failure(json.dumps({**GOOD, "\ud83d": 1}))
    assert problem.detail.encode() and problem.kind == "malformed"


def test_what_is_wrong_is_said_in_short():
    assert len(failure(json.dumps({**GOOD, "x" * 10**5: 1})).detail) < 500


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("plain", "plain"),
        ("\ud83d\ude00", "\U0001f600"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83dx\U0001f600", "\ufffdx\U0001f600"),
    ],
)
def test_whole_characters(text, whole):
    assert whole_characters(text) == whole


def test_an_excerpt_has_the_beginning_and_the_end():
    assert excerpt("abcdef", 6) == "abcdef"
    assert excerpt("a" * 50 + "b" * 50, 10) == "aaaaa [90 characters left out] bbbbb"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Hello.", "Hello."),
        (" \n<think>a</think> b", "b"),
        ("<think>a</think>\n<think>b</think>c", "c"),
        ("<think></think>", ""),
        ("a\n</think>\n\nb", "b"),  # the template opened the block
        ("a</think><think>b</think>c", "c"),
        ("<think>a</think>The tag </think> is odd.", "The tag </think> is odd."),
        ("The tag <think> is odd.", "The tag <think> is odd."),
        ("", ""),
    ],
)
def test_what_is_said_behind_the_reasoning(text, rest):
    assert without_reasoning(text) == rest


@pytest.mark.parametrize("text", ["<think>", " <think>a", "<think>a</think><think>b", "a</think><think>b"])
def test_reasoning_that_does_not_end_is_no_answer(text):
    with pytest.raises(RoleFailure, match="within its reasoning"):
        without_reasoning(text)


@given(st.text(max_size=200))
def test_no_text_raises_anything_but_a_role_failure(text):
    for body in (text, json.dumps(GOOD)[: len(text)] + text, f"{text}{{{text}}}"):
        try:
            read(body, ReplyForm)
        except RoleFailure as problem:
            assert problem.kind in ("malformed", "out_of_range")


def test_start_and_direction():
    nine = {n: {"evidence": "e", "reason": "r", "level": i % 4} for i, n in enumerate(StartForm.model_fields)}
    assert [f.level for f in findings(read(json.dumps(nine), StartForm))] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    nine["C1"]["level"] = 4
    assert failure(json.dumps(nine), StartForm).kind == "out_of_range"
    call = {"reason": "r", "function": "continue", "target": None, "guidance": "g"}
    assert read(json.dumps(call), DirectionForm).function == "continue"
    assert failure(json.dumps({**call, "function": "delete"}), DirectionForm).kind == "malformed"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  I am tired. ", "I am tired."),
        ('"I am tired."', "I am tired."),
        ("<think>short</think> I am tired.", "I am tired."),
        ('"Yes," she said. "No."', '"Yes," she said. "No."'),
        ("\u300c\u6211\u7d2f\u4e86\u3002\u300d", "\u6211\u7d2f\u4e86\u3002"),
    ],
)
def test_a_persons_words(text, words):
    assert spoken(text) == words


@pytest.mark.parametrize("text", ["", "<think>so", '""', "<think>a</think>", "x" * 1201])
def test_no_words(text):
    with pytest.raises(RoleFailure, match="malformed"):
        spoken(text)
