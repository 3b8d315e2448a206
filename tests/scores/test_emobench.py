"""Constructed answers of known accuracy; the benchmark's own files where there are any."""

import json

import pytest

from mapo_jax.errors import UserError
from mapo_jax.scores import emobench
from mapo_jax.scores.emobench import Asking

CHOICES = ["Shout", "Wait a day", "Ask how she is", "Leave"]


def ea(qid="1", language="en", label=2, **changes):
    row = {"qid": qid, "language": language, "category": "Personal-Self", "question type": "Action"}
    row |= {"scenario": "Ana is late.", "subject": "Bo", "choices": CHOICES, "label": CHOICES[label]}
    return row | changes


def eu(qid="1", language="en", emotion=0, cause=1, **changes):
    emotions, causes = ["joy", "anger", "fear", "relief", "pride", "shame"], ["rain", "luck", "work", "home"]
    row = {"qid": qid, "language": language, "coarse_category": "cues", "finegrained_category": "vocal"}
    row |= {"scenario": "Ana sighs.", "subject": "Ana", "emotion_choices": emotions, "cause_choices": causes}
    return row | {"emotion_label": emotions[emotion], "cause_label": causes[cause]} | changes


def write(folder, *rows, name="items.jsonl"):
    file = folder / name
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return file


@pytest.fixture
def items(tmp_path):
    """Two items of EA in both languages (right: C, C, B, B) and one of EU."""
    rows = [ea("1"), ea("1", "zh"), ea("2", label=1), ea("2", "zh", label=1, category="Social-Self"), eu()]
    return emobench.read_items([write(tmp_path, *rows)])


def always(items, protocol, answer):
    """The answers of a model that always gives the same one."""
    return {asking: answer for asking in emobench.askings(items, emobench.PROTOCOLS[protocol])}


def test_a_position_biased_guesser_scores_chance_under_all_orders(items):
    questions = [item for item in items if item.task == "EA"]
    current = emobench.score_answers(questions, always(questions, "current", '{"answer": "C"}'))
    assert current["EA"]["accuracy"] == 0.5  # its letter is right for the items of number 1
    permuted = emobench.score_answers(questions, always(questions, "permuted", '{"answer": "C"}'))
    assert permuted["accuracy"] == 0.25
    # C stands at C in order 0, at B, A and D in the others; B likewise.
    assert permuted["accuracy_by_order"] == [0.5, 0.0, 0.0, 0.5]
    assert permuted["agreement"] == 0


def test_right_answers_score_1_in_every_order(items):
    answers = {}
    for asking in emobench.askings(items, emobench.PROTOCOLS["permuted"]):
        letters = ["ABCDEF"[asking.shown(i).index(label)] for i, label in enumerate(asking.item.labels)]
        keys = ("answer",) if asking.item.task == "EA" else ("answer_q1", "answer_q2")
        # The letter must stand before the right text in the prompt.
        for letter, label, choices in zip(letters, asking.item.labels, asking.item.choices, strict=True):
            assert f"\n{letter}) {choices[label]}" in asking.prompt()
        answers[asking] = json.dumps(dict(zip(keys, letters, strict=True)))
    scores = emobench.score_answers(items, answers)
    assert scores["accuracy"] == 1 and scores["agreement"] == 1 and scores["answers"] == 20
    assert scores["EU"]["emotion_accuracy"] == scores["EU"]["cause_accuracy"] == 1


def test_groups_and_both_languages(items):
    answers = {Asking(item): "C" if item.qid == "1" and item.language == "en" else "B" for item in items[:4]}
    scores = emobench.score_answers(items[:4], answers)["EA"]
    assert scores["accuracy"] == 0.75
    assert {name: group["accuracy"] for name, group in scores["languages"].items()} == {"en": 1, "zh": 0.5}
    assert scores["categories"]["Social-Self"]["items"] == 1
    assert scores["details"]["Action"]["accuracy"] == 0.75


def test_emotion_and_cause_must_both_be_right(items):
    (item,) = (item for item in items if item.task == "EU")
    for answer, emotion, cause in (
        ({"answer_q1": "A", "answer_q2": "B"}, 1, 1),
        ({"answer_q1": "A", "answer_q2": "C"}, 1, 0),
        ({"answer_q1": "B", "answer_q2": "B"}, 0, 1),
    ):
        scores = emobench.score_answers([item], {Asking(item): json.dumps(answer)})["EU"]
        assert (scores["emotion_accuracy"], scores["cause_accuracy"]) == (emotion, cause)
        assert scores["accuracy"] == (emotion and cause)


def test_unparseable_answers_are_wrong_and_counted_apart(items):
    questions = items[:4]
    answers = {Asking(item): answer for item, answer in zip(questions, ("C", "D", "hm", ""), strict=True)}
    scores = emobench.score_answers(questions, answers)
    assert scores["accuracy"] == 0.25 and scores["accuracy_parseable"] == 0.5
    assert scores["unparseable"] == 2 and scores["unparseable_share"] == 0.5
    some = emobench.score_answers(questions, {Asking(questions[0]): "C"})
    assert (some["accuracy"], some["answered"], some["items"]) == (1, 1, 4)


def test_empty_answers_are_counted(items):
    said = ["<think>C", "", None, "<think>B</think>"]
    scores = emobench.score_answers(items[:4], dict(zip(map(Asking, items), said, strict=False)))
    assert scores["no_answer"] == scores["unparseable"] == 4 and scores["accuracy"] == 0
    scores = emobench.score_answers(items[:1], {Asking(items[0]): "<think>A</think>C"})
    assert scores["no_answer"] == 0 and scores["accuracy"] == 1


def test_the_majority_of_the_samples_counts_in_each_order(items):
    item = items[0]  # right: C, the third choice; order 1 shows it at B
    samples = {0: ["D", "C", "A", "C", "?"], 1: ["C", "B", "B", "C", "A"]}
    answers = {
        Asking(item, order, sample): letter
        for order, letters in samples.items()
        for sample, letter in enumerate(letters)
    }
    scores = emobench.score_answers([item], answers)
    assert scores["accuracy_by_order"] == [1, 0]  # the tie in order 1 goes to what was sampled first, C
    assert scores["unparseable"] == 0
    lost = {Asking(item, 0, sample): "?" for sample in range(5)}
    assert emobench.score_answers([item], lost)["unparseable"] == 1
    asked = emobench.askings([item], emobench.PROTOCOLS["earlier"])
    assert len(asked) == 20 == len({asking.id for asking in asked})


@pytest.mark.parametrize(
    ("answer", "picked"),
    [
        ('{"answer": "C"}', 2),
        ('Well.\n```json\n{\n  "answer": "c"\n}\n```', 2),
        ('{"reasoning": "not {A}", "answer": "(B) Wait a day"}', 1),
        ('{"answer": "A"} No: {"answer": "D"}', 3),
        ('{"reasoning": "she "sighs" first", "answer": "D"}', 3),
        ({"answer": "B"}, 1),
        ("C", 2),
        ("(C)", 2),
        ("C.", 2),
        ("B) Wait a day", 1),
        ('{"answer": "wait a day"}', 1),
        ('{"answer": "Wait a day."}', 1),
        ("{'answer': 'C'}", 2),
        ('{"Answer": "c"}', 2),
        ("Answer: C", 2),
        ("**C**", 2),
        ("Option C", 2),
        ('{"answer": "<C>"}', 2),
        ('{"answer": ["C"]}', None),
        ("{\u201canswer\u201d: \u201cC\u201d}", 2),
        ("\uff23", 2),  # a full-width C
        ("\uff08C\uff09", 2),
        ("\u7b54\u6848\uff1aC", 2),  # "the answer:"
        ('{"answer": "\u9009\u9879C"}', 2),  # "option"
        ('{"answer": "A or C"}', None),
        ('{"answer": "A day of rest"}', None),  # an article is no letter
        ('{"answer": "E"}', None),
        ('{"answer": 2}', None),
        ('{"answer": null}', None),
        ('{"choice": "C"}', None),
        ("Either A or B", None),
        ("{{{", None),
        (None, None),
        ('<think>{"answer": "A"}</think>{"answer": "C"}', 2),
        ("A, I thought.</think>\n\nC", 2),
        ("<think>A</think>\nC", 2),
        ("<think>It is C", None),
        ("<think>C</think>", None),
        ('{"answer": ' + "9" * 5000 + "}", None),
        (" " * 100_000 + "?", None),  # read once, not once from every space
    ],
)
def test_what_is_read_from_an_answer(items, answer, picked):
    assert emobench.parse(answer, Asking(items[0])) == (picked,)


def test_what_is_read_from_an_answer_to_two_questions(items):
    asking = Asking(items[4])
    assert emobench.parse('{"answer_q1": "F", "answer_q2": "A"}', asking) == (5, 0)
    assert emobench.parse("1) F\n2) A", asking) == (5, 0)
    assert emobench.parse('{"answer_q1": "F"}', asking) == (5, None)
    assert emobench.parse('{"answer_q1": "F", "answer_q2": "E"}', asking) == (5, None)  # four causes
    assert emobench.parse("F", asking) == (None, None)
    assert emobench.parse("answer_q1: F\nanswer_q2: A", asking) == (5, 0)
    assert emobench.parse("{'answer_q1': 'F', 'answer_q2': 'A'}", asking) == (5, 0)
    assert emobench.parse(["F", "A"], asking) == (5, 0)


def test_prompts_are_in_the_language_of_the_item(items):
    assert "What could Bo do" in Asking(items[0]).prompt()
    assert "Bo在这里怎么做" in Asking(items[1]).prompt()
    assert '{"answer_q1": "…", "answer_q2": "…"}' in Asking(items[4]).prompt()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"qid": "3"}, "line 2: neither an item of EA"),
        (ea("3", language="de"), "line 2: `language` is 'de'"),
        (ea("3", label=0) | {"label": "Run"}, "line 2: `label` 'Run' must be one of `choices`"),
        (ea("3", choices="ABC"), "line 2: `choices` must be a list"),
        (ea("3", scenario=None), "line 2: `scenario` must be text"),
        (ea("1"), "line 2: item 1 .* occurs twice"),
        (eu("3", cause_label="snow"), "line 2: `cause_label` 'snow'"),
    ],
)
def test_other_formats_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        emobench.read_items([write(tmp_path, ea("1"), row)])


def test_saved_answers_find_their_items(items, tmp_path):
    rows = [
        {"qid": "1", "language": "en", "task": "EA", "answer": "C"},
        {"qid": 1, "language": "en", "task": "EU", "order": 3, "sample": 4, "answer": "A B"},
    ]
    answers = emobench.read_answers(write(tmp_path, *rows, name="a.jsonl"), items)
    assert answers == {Asking(items[0]): "C", Asking(items[4], 3, 4): "A B"}
    parts = [{"type": "text", "text": "B"}, {"type": "text", "text": "."}]
    for content, answer in ((parts, "B."), ([{"type": "image_url"}], None), (["C", "D"], ["C", "D"])):
        alone = write(tmp_path, {"qid": "2", "language": "zh", "answer": content}, name="b.jsonl")
        assert emobench.read_answers(alone, items[:4]) == {Asking(items[3]): answer}
    alone = write(tmp_path, {"qid": "2", "language": "zh", "answer": "B"}, name="b.jsonl")
    assert emobench.read_answers(alone, items[:4]) == {Asking(items[3]): "B"}
    for row, message in (
        ({"qid": "1", "language": "en", "answer": "C"}, "no `task`"),
        ({"qid": "9", "language": "en", "task": "EA", "answer": "C"}, "no item 9"),
        ({"qid": "1", "language": "en", "task": "EA"}, "has no `answer`"),
        ({"qid": "1", "language": "en", "task": "EA", "answer": "C", "order": 4}, "order 4"),
        (rows[0], "second answer to item 1"),
        (rows[0] | {"order": True}, "order True"),
        (rows[0] | {"order": 1.0}, "order 1.0"),
        (rows[0] | {"language": ["en"]}, "no item 1"),
        (rows[0] | {"task": {}}, "no item 1"),
    ):
        with pytest.raises(UserError, match=f"line 3: .*{message}"):
            emobench.read_answers(write(tmp_path, *rows, row, name="c.jsonl"), items)


def test_the_published_items(shared_data):
    files = [shared_data / "emobench" / f"{task}.jsonl" for task in emobench.TASKS]
    items = emobench.read_items(files)
    assert len(items) == 800
    application = [item for item in items if item.task == "EA"]
    understanding = [item for item in items if item.task == "EU"]
    # Shares of the labels' places that are known: C in EA; A for emotion and for cause in EU.
    scores = emobench.score_answers(application, always(application, "current", '{"answer": "C"}'))
    assert scores["EA"]["accuracy"] == 148 / 400
    permuted = emobench.score_answers(application, always(application, "permuted", '{"answer": "C"}'))
    assert permuted["EA"]["accuracy"] == 0.25
    first = always(understanding, "current", '{"answer_q1": "A", "answer_q2": "A"}')
    scores = emobench.score_answers(understanding, first)["EU"]
    assert round(scores["emotion_accuracy"], 2) == 0.35 and round(scores["cause_accuracy"], 2) == 0.46
    for language in emobench.LANGUAGES:
        assert scores["languages"][language]["items"] == 200
