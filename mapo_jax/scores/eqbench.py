"""EQ-Bench v2: how strongly four emotions are felt at the end of a short dialogue, each rated 0 to 10.

The items are the benchmark's own (MIT licence) and come from a file; each prompt asks for a first pass, a
critique and revised scores. Without revision those parts of the prompt are left out.

Sources: Paech, EQ-Bench: An Emotional Intelligence Benchmark for Large Language Models (arXiv 2312.06281),
version 2 of the scoring (full scale); how answers are parsed: `lib/scoring.py` of the benchmark's repository.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mapo_jax.errors import UserError
from mapo_jax.json_files import read_json, read_rows
from mapo_jax.scores.bootstrap import intervals
from mapo_jax.scores.speech import spoken, text_of

PARSINGS = ("benchmark", "strict")
"""`benchmark`: as the benchmark's own script does now. `strict`: as it did at first."""

FIRST, REVISED = "First pass scores:", "Revised scores:"
EMOTIONS = 4
MOST = 10  # of the scale
FEWEST_PARSEABLE = 0.8333  # a run with a smaller share does not count
REVISED_PARSEABLE = 0.95  # the revised scores need this many times the parseable answers of the first pass

# Chosen by the benchmark so that random answers score 0.
_SCALE = 0.7477


@dataclass(frozen=True)
class Question:
    """One item."""

    id: str
    text: str  # the prompt, with the instructions for a revision
    reference: Mapping[str, float]  # emotion -> how strongly it is felt, 0 to 10

    def prompt(self, revision: bool) -> str:
        """What the model is asked.

        Raises:
          UserError: the instructions for the revision are not where version 2 has them, and must be left out.
        """
        if revision:
            return self.text.strip()
        text, sentences = re.subn(r" Then critique your answer\b.*?\brevised scores\.", "", self.text)
        text, blocks = re.subn(
            r"\n+Critique:.*?\nRevised scores:.*?\n+(?=\[End of answer\])", "\n\n", text, flags=re.S
        )
        text, headings = re.subn(rf"\n{FIRST}\n", "\n", text)
        if (sentences, blocks, headings) != (1, 1, 1):
            raise UserError(
                f"question {self.id}: its prompt does not ask for a revision as version 2 does, so that "
                "cannot be left out; run it with --revision"
            )
        return text.strip()


def read_questions(path: str | Path) -> list[Question]:
    """Reads the benchmark's file: an object of `{id: {"prompt", "reference_answer_fullscale"}}`.

    Raises:
      UserError: the file cannot be read, or a question is not of this format; names the question and the key.
    """
    content = read_json(path, "questions")
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} must hold an object with a question under each id, as EQ-Bench v2 has it")
    return [_question(name, entry, f"{path}, question {name}") for name, entry in content.items()]


def _question(name: str, entry: Any, place: str) -> Question:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise UserError(f"{place}: `prompt` must be text; this is no question of EQ-Bench v2")
    answer = entry.get("reference_answer_fullscale")
    if not isinstance(answer, dict):
        raise UserError(
            f"{place}: `reference_answer_fullscale` is missing; this is no question of EQ-Bench v2"
        )
    reference = {}
    for number in range(1, EMOTIONS + 1):
        emotion, value = answer.get(f"emotion{number}"), answer.get(f"emotion{number}_score")
        try:
            rating = float(value)  # numbers and strings both occur
        except (TypeError, ValueError):
            rating = math.nan
        if not isinstance(emotion, str) or not 0 <= rating <= MOST:
            raise UserError(
                f"{place}: emotion{number} is {emotion!r} with the score {value!r}; it must be a name with a "
                f"score from 0 to {MOST}"
            )
        reference[emotion] = rating
    if len(reference) != EMOTIONS:
        raise UserError(f"{place}: it must name {EMOTIONS} different emotions")
    return Question(name, entry["prompt"], reference)


def read_answers(path: str | Path) -> dict[str, str | None]:
    """Reads saved answers: a JSON object `{question id: content}`, or JSON lines of `{"id", "answer"}`.

    A content is text or a list of text parts (`speech.text_of`). None: there was no answer.

    Raises:
      UserError: the file cannot be read, or is neither; names the line or the id.
    """
    if Path(path).suffix == ".jsonl":
        rows: Iterable[tuple[str, Any, Any]] = (
            (place, row.get("id"), row.get("answer", ...)) for place, row in read_rows(path, "answers")
        )
    else:
        content = read_json(path, "answers")
        if not isinstance(content, dict):
            raise UserError(f"{path} must hold an object with an answer's text under each question's id")
        rows = (
            (f"{path}, question {name}", name, text)
            for name, text in content.items()
            if text is not None  # null: not answered
        )
    answers = {}
    for place, name, content in rows:
        try:
            answer = text_of(content)
        except ValueError as error:
            raise UserError(f"{place}: it needs a question's id and the answer as text") from error
        if not isinstance(name, str | int):
            raise UserError(f"{place}: it needs a question's id and the answer as text")
        answers[str(name)] = answer
    return answers


def parse(text: str, emotions: Iterable[str], parsing: str = "benchmark") -> dict[str, float] | None:
    """The ratings that an answer gives, or None if they are not for exactly these emotions.

    A rating is a word, a colon, white space and digits; of a repeated name the last counts. The benchmark
    drops `*` and `#` first and compares names without case (the same name in two spellings is two names);
    `strict` does neither.

    Args:
      parsing: one of PARSINGS.
    """
    text = _plain(text, parsing)
    # Every word is read once, rated or not: `(\w+):` alone would try every end of a long word.
    found = {name: value for name, value in re.findall(r"(\w+)(?::\s+(\d+))?", text) if value}
    if parsing == "benchmark":
        known = {emotion.lower(): emotion for emotion in emotions}
        names = [known.get(name.lower()) for name in found]
    else:
        names = list(found)
    if len(names) != len(set(names)) or set(names) != set(emotions):
        return None
    if any(len(value) > _MOST_DIGITS for value in found.values()):
        return None
    return dict(zip(names, map(float, found.values()), strict=True))


_MOST_DIGITS = 9  # more make no rating


def _plain(text: str, parsing: str) -> str:
    return text.replace("*", "").replace("#", "") if parsing == "benchmark" else text


def question_score(ratings: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """`q = 10 - 0.7477 sum_i s(|p_i - r_i|)`: 10 for the reference itself, about 0 by guessing.

    `s(0) = 0`; `s(d) = 6.5 / (1 + exp(-1.2 (d - 4)))` up to d = 5, so that small differences cost little;
    `s(d) = d` above.
    """
    penalties = 0.0
    for emotion, value in reference.items():
        difference = abs(ratings[emotion] - value)
        if difference > 5:
            penalties += difference
        elif difference > 0:
            penalties += 6.5 / (1 + math.exp(-1.2 * (difference - 4)))
    return 10 - _SCALE * penalties


def score_answers(
    questions: Sequence[Question],
    answers: Mapping[str, str | None],
    *,
    revision: bool | None = None,
    parsing: str = "benchmark",
    seed: int = 0,
) -> dict[str, Any]:
    """Scores a set of answers.

    Args:
      questions: what was asked.
      answers: question id -> text; reasoning in it is left out. A question without an answer counts as
        unparseable, and so does an answer of None, of nothing, or of reasoning alone.
      revision: whether the answers hold a first pass and revised scores; None: they do if at least half of
        them have the heading of the revised scores.
      parsing: one of PARSINGS (see `parse`). With a revision the benchmark wants both headings for the first
        pass; `strict` takes what stands between its heading and that of the revision or the end.
      seed: of the interval's bootstrap over questions.

    Returns:
      `score`: 100 mean(q/10) over the parseable answers (None without any); `interval`, its 95 % interval;
      `counts`: whether enough answers are parseable for the score to count; `parseable` and
      `parseable_share`; `score_unparseable_zero`: the other convention, in which an unparseable answer
      has 0; `questions`; `answered`, those with an answer; `no_answer`, those asked without getting one;
      `revision`; `parsing`; `by_question`: `{id: q or None}`. With a revision all this
      is of the result, which is the revised scores if they are not lower and nearly as many parse, else the
      first pass; `result` says which, and `first_pass` and `revised` hold the scores of both.

    Raises:
      UserError: no questions, or an answer to a question that there is not.
    """
    if not questions:
        raise UserError("there are no questions to score")
    known = {question.id for question in questions}
    for name in answers:
        if name not in known:
            raise UserError(
                f"there is an answer to question {name}, which is not among the {len(known)} questions"
            )
    texts = {name: spoken(text) for name, text in answers.items()}
    said = {name: _plain(text, parsing) for name, text in texts.items() if text and not text.isspace()}
    if revision is None:
        revision = 2 * sum(REVISED in text for text in said.values()) >= max(1, len(said))
    head = {
        "questions": len(questions),
        "answered": len(said),
        "no_answer": len(answers) - len(said),
        "revision": revision,
        "parsing": parsing,
    }
    if not revision:
        return head | _score(questions, said, parsing, seed)

    first, revised = {}, {}
    for name, text in said.items():
        _, heading, after = text.partition(REVISED)
        if heading:
            revised[name] = after
        _, begun, after = text.partition(FIRST)
        scores, ended, _ = after.partition(REVISED)
        if begun and (ended or parsing == "strict"):
            first[name] = scores
    parts = {
        "first_pass": _score(questions, first, parsing, seed),
        "revised": _score(questions, revised, parsing, seed),
    }
    result = "revised" if _revision_stands(**parts) else "first_pass"
    return (
        head
        | {"result": result, **parts[result]}
        | {
            name: {key: value for key, value in part.items() if key != "by_question"}
            for name, part in parts.items()
        }
    )


def _revision_stands(first_pass: Mapping[str, Any], revised: Mapping[str, Any]) -> bool:
    if revised["score"] is None or first_pass["score"] is None:
        return revised["score"] is not None
    enough = revised["parseable"] >= REVISED_PARSEABLE * first_pass["parseable"]
    return enough and revised["score"] >= first_pass["score"]


def _score(
    questions: Sequence[Question], answers: Mapping[str, str], parsing: str, seed: int
) -> dict[str, Any]:
    by_question: dict[str, float | None] = {}
    for question in questions:
        ratings = parse(answers.get(question.id, ""), question.reference, parsing)
        by_question[question.id] = None if ratings is None else question_score(ratings, question.reference)
    scored = np.array([q for q in by_question.values() if q is not None])
    share = len(scored) / len(questions)
    ends = intervals(10 * scored[:, None], np.ones((len(scored), 1)), seed=seed)[:, 0]
    return {
        "score": float(10 * scored.mean()) if len(scored) else None,
        "interval": None if np.isnan(ends).any() else ends.tolist(),
        "counts": share >= FEWEST_PARSEABLE,
        "parseable": len(scored),
        "parseable_share": share,
        "score_unparseable_zero": float(10 * scored.sum() / len(questions)),
        "by_question": by_question,
    }
