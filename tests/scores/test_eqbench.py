"""Scores worked out by hand or taken from the benchmark's definition; its own file where there is one."""

import json

import pytest

from mapo_jax.errors import UserError
from mapo_jax.scores import eqbench

NAMES = ("Remorseful", "Indifferent", "Affectionate", "Annoyed")
TEXT = """
How does Robert feel at the end?

Robert: Fine, keep it.
[End dialogue]

Rate each from 0-10. Then critique your answer step by step. Finally, give your revised scores.

Answer like this:

First pass scores:
Remorseful: <score>

Critique: <your critique here>

Revised scores:
Remorseful: <revised score>

[End of answer]

Zero is a score too.
"""


def entry(ratings=(0, "6", 0, "7"), names=NAMES):
    answer = {f"emotion{i}": name for i, name in enumerate(names, start=1)}
    answer |= {f"emotion{i}_score": rating for i, rating in enumerate(ratings, start=1)}
    return {"prompt": TEXT, "reference_answer": {}, "reference_answer_fullscale": answer}


@pytest.fixture
def questions(tmp_path):
    """Three questions with one reference: 0, 6, 0, 7."""
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({name: entry() for name in "123"}))
    return eqbench.read_questions(file)


def answer(*ratings, names=NAMES):
    return "\n".join(f"{name}: {rating}" for name, rating in zip(names, ratings, strict=True))


@pytest.mark.parametrize(
    ("ratings", "expected"), [((0, 6, 0, 7), 10), ((2, 4, 0, 8), 9.062290), ((8, 0, 5, 7), -4.202869)]
)
def test_worked_values_of_the_first_question(questions, ratings, expected):
    scores = eqbench.score_answers(questions, {"1": answer(*ratings)})
    assert scores["by_question"]["1"] == pytest.approx(expected, abs=1e-6)
    assert scores["score"] == pytest.approx(10 * expected, abs=1e-5)
    assert scores["by_question"]["2"] is None


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (answer(1, 2, 3, 4), True),
        ("Sure!\n" + answer(1, 2, 3, 4) + "\n[End of answer]", True),
        ("Annoyed: 9\n" + answer(1, 2, 3, 4), True),  # the last one counts
        (answer(1, 2, 3, 4).replace("Annoyed: 4", "Annoyed:\n  4"), True),
        (answer(1, 2, 3, 4).lower(), False),
        (answer(1, 2, 3, 4).replace(": ", ":"), False),
        (answer(1, 2, 3, "high"), False),
        (answer(1, 2, 3, 4) + "\nCalm: 2", False),
        ("\n".join(answer(1, 2, 3, 4).split("\n")[:3]), False),
        ("", False),
    ],
)
def test_what_is_parseable_strictly(text, parsed):
    found = eqbench.parse(text, NAMES, "strict")
    assert found == (dict(zip(NAMES, (1, 2, 3, 4), strict=True)) if parsed else None)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (answer(1, 2, 3, 4), True),
        ("\n".join(f"**{line.replace(':', '**:')}" for line in answer(1, 2, 3, 4).split("\n")), True),
        ("\n".join(f"- **{line.replace(':', ':**')}" for line in answer(1, 2, 3, 4).split("\n")), True),
        ("\n".join(f"### {line.replace(': ', ': **')}**" for line in answer(1, 2, 3, 4).split("\n")), True),
        (answer(1, 2, 3, 4).lower(), True),
        (answer(1, 2, 3, 4).upper(), True),
        (answer(1, 2, 3, "4/10"), True),
        (answer(1, 2, 3, 4).replace(": ", ":"), False),
        (answer(1, 2, 3, 4) + "\nannoyed: 4", False),  # two spellings are two names
        (answer(1, 2, 3, 4) + "\nCalm: 2", False),
        (answer(1, 2, 3, "9" * 5000), False),
        ("x" * 300_000, False),  # read once, not once from every letter
    ],
)
def test_what_the_benchmark_parses(text, parsed):
    found = eqbench.parse(text, NAMES)
    assert found == (dict(zip(NAMES, (1, 2, 3, 4), strict=True)) if parsed else None)


def test_the_rule_is_named_and_strict_is_another(questions):
    marked = {name: "\n".join(f"**{line}**" for line in BEST.split("\n")).lower() for name in "123"}
    scores = eqbench.score_answers(questions, marked)
    assert scores["score"] == pytest.approx(100) and scores["parsing"] == "benchmark"
    strict = eqbench.score_answers(questions, marked, parsing="strict")
    assert strict["parseable"] == 0 and strict["parsing"] == "strict"


def test_the_benchmark_wants_both_headings_for_a_first_pass(questions):
    cut = {name: f"{eqbench.FIRST}\n{BEST}\n\nCritique: hm." for name in "123"}
    assert eqbench.score_answers(questions, cut, revision=True)["parseable"] == 0
    assert eqbench.score_answers(questions, cut, revision=True, parsing="strict")["score"] == 100
    marked = {name: text.replace("scores:", "scores**:") for name, text in cut.items()}
    marked = {name: f"{text}\n**Revised scores**:\n{FAIR}" for name, text in marked.items()}
    scores = eqbench.score_answers(questions, marked)
    assert scores["revision"] and scores["first_pass"]["score"] == pytest.approx(100)
    assert scores["revised"]["score"] == pytest.approx(90.62290, abs=1e-4)


def test_reasoning_is_no_answer(questions):
    answers = {"1": f"<think>\n{WORST}\n</think>\n\n{BEST}", "2": f"<think>\n{BEST}", "3": None}
    scores = eqbench.score_answers(questions, answers)
    assert scores["by_question"] == {"1": pytest.approx(10), "2": None, "3": None}
    assert scores["no_answer"] == 2 and scores["answered"] == 1


def test_both_conventions_for_what_cannot_be_parsed(questions):
    scores = eqbench.score_answers(
        questions, {"1": answer(0, 6, 0, 7), "2": answer(8, 0, 5, 7), "3": "I pass."}
    )
    assert scores["score"] == pytest.approx((100 - 42.02869) / 2, abs=1e-4)
    assert scores["score_unparseable_zero"] == pytest.approx((100 - 42.02869) / 3, abs=1e-4)
    assert scores["parseable"] == 2 and scores["answered"] == 3
    assert not scores["counts"]  # two of three are less than 83.33 %
    assert eqbench.score_answers(questions, {"1": "nothing"})["score"] is None


def test_the_share_from_which_a_run_counts(tmp_path):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({name: entry() for name in "123456"}))
    questions = eqbench.read_questions(file)
    answers = {name: answer(0, 6, 0, 7) for name in "12345"}
    assert eqbench.score_answers(questions, answers)["counts"]  # 5/6 = 83.33 %
    del answers["1"]
    assert not eqbench.score_answers(questions, answers)["counts"]


def revision(first, revised):
    return f"{eqbench.FIRST}\n{first}\n\nCritique: hm.\n\n{eqbench.REVISED}\n{revised}\n[End of answer]"


BEST, FAIR, WORST = answer(0, 6, 0, 7), answer(2, 4, 0, 8), answer(8, 0, 5, 7)


def test_the_revision_is_the_result_if_it_is_not_worse(questions):
    scores = eqbench.score_answers(questions, {name: revision(FAIR, BEST) for name in "123"})
    assert scores["revision"] and scores["result"] == "revised"
    assert scores["score"] == pytest.approx(100)
    assert scores["first_pass"]["score"] == pytest.approx(90.62290, abs=1e-4)
    scores = eqbench.score_answers(questions, {name: revision(FAIR, WORST) for name in "123"})
    assert scores["result"] == "first_pass"
    assert scores["score"] == pytest.approx(90.62290, abs=1e-4)
    assert scores["revised"]["score"] == pytest.approx(-42.02869, abs=1e-4)
    same = eqbench.score_answers(questions, {name: revision(FAIR, FAIR) for name in "123"})
    assert same["result"] == "revised"


def test_a_revision_that_hardly_parses_is_no_result(questions):
    answers = {"1": revision(FAIR, BEST), "2": revision(FAIR, BEST), "3": revision(FAIR, "better, I think")}
    scores = eqbench.score_answers(questions, answers)
    assert scores["result"] == "first_pass" and scores["revised"]["parseable"] == 2
    # Without the headings there is neither a first pass nor a revision.
    lost = eqbench.score_answers(questions, {name: BEST for name in "123"}, revision=True)
    assert lost["score"] is None and lost["parseable"] == 0


def test_prompts_with_and_without_the_revision(questions):
    question = questions[0]
    assert question.prompt(True) == TEXT.strip()
    assert question.prompt(False) == (
        "How does Robert feel at the end?\n\nRobert: Fine, keep it.\n[End dialogue]\n\n"
        "Rate each from 0-10.\n\nAnswer like this:\n\nRemorseful: <score>\n\n[End of answer]\n\n"
        "Zero is a score too."
    )
    other = eqbench.Question("7", "How do they feel?", question.reference)
    with pytest.raises(UserError, match=r"question 7: .*--revision"):
        other.prompt(False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "an object with a question under each id"),
        ({"7": {"prompt": "x"}}, "question 7: `reference_answer_fullscale` is missing"),
        ({"7": {"text": "x"}}, "question 7: `prompt` must be text"),
        ({"7": entry((1, 2, 3, 11))}, "question 7: emotion4 is 'Annoyed' with the score 11"),
        ({"7": entry((1, 2, "high", 4))}, "question 7: emotion3 .* with the score 'high'"),
        ({"7": entry(names=("Sad", "Sad", "Glad", "Calm"))}, "4 different emotions"),
    ],
)
def test_other_formats_are_named(tmp_path, content, message):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        eqbench.read_questions(file)


def test_answers_are_read_from_both_formats(tmp_path, questions):
    (tmp_path / "a.json").write_text(json.dumps({"1": "one", "2": "two"}))
    (tmp_path / "a.jsonl").write_text('{"id": "1", "answer": "one"}\n{"id": 2, "answer": "two"}\n')
    assert eqbench.read_answers(tmp_path / "a.json") == eqbench.read_answers(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"id": "1", "answer": "one"}\n{"id": "2"}\n')
    with pytest.raises(UserError, match="line 2: it needs"):
        eqbench.read_answers(tmp_path / "b.jsonl")
    (tmp_path / "b.json").write_text('["one"]')
    with pytest.raises(UserError, match="must hold an object"):
        eqbench.read_answers(tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{"1": null, "2": "two"}')
    assert eqbench.read_answers(tmp_path / "c.json") == {"2": "two"}
    (tmp_path / "d.jsonl").write_text(
        '{"id": "1", "answer": [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]}\n'
        '{"id": "2", "answer": null}\n{"id": "3", "answer": "half \\ud83d"}\n'
    )
    assert eqbench.read_answers(tmp_path / "d.jsonl") == {"1": "one", "2": None, "3": "half \ufffd"}
    for content in ('{"a": 1}', "[1]", "7", '[{"type": "image_url", "text": "x"}]'):
        (tmp_path / "e.jsonl").write_text(f'{{"id": "1", "answer": {content}}}')
        with pytest.raises(UserError, match="line 1: it needs"):
            eqbench.read_answers(tmp_path / "e.jsonl")
    with pytest.raises(UserError, match="answer to question 9"):
        eqbench.score_answers(questions, {"9": "x"})


def test_the_published_questions(shared_data):
    questions = eqbench.read_questions(shared_data / "eqbench" / "eq_bench_v2_questions_171.json")
    assert len(questions) == 171
    for question in questions:
        for asked in (question.prompt(False), question.prompt(True)):
            assert asked.count("[End of answer]") == 1
            for name in question.reference:
                assert f"\n{name}: <score>" in asked
        assert "evis" not in question.prompt(False).split("[End dialogue]")[1]
        assert "ritique" not in question.prompt(False).split("[End dialogue]")[1]
    perfect = {
        question.id: answer(*map(int, question.reference.values()), names=question.reference)
        for question in questions
    }
    assert eqbench.score_answers(questions, perfect)["score"] == 100
    marked = {
        name: text.replace(":", "**:").replace("\n", "\n- **").lower() for name, text in perfect.items()
    }
    assert eqbench.score_answers(questions, marked)["parseable"] == 171
    assert eqbench.score_answers(questions, marked, parsing="strict")["parseable"] == 0
