"""EQ-Bench v2: ratings from 0 to 10 of four emotions at the end of a short dialogue.

The items are the benchmark's (MIT licence) and come from a file. Each prompt asks for a first pass, a
critique and revised scores; without revision the last two are removed from the prompt.

Sources: Paech, EQ-Bench: An Emotional Intelligence Benchmark for Large Language Models (arXiv 2312.06281),
version 2 of the scoring (full scale); how answers are parsed: `lib/scoring.py` of the benchmark's repository.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mapo_jax.errors import UserError
from mapo_jax.json_files import read_json, read_rows
from mapo_jax.scores.bootstrap import interval_list, intervals
from mapo_jax.speech import spoken, text_of

PARSINGS = ("benchmark", "strict")
"""`benchmark`: as in the benchmark's current script. `strict`: as in its first version."""

FIRST, REVISED = "First pass scores:", "Revised scores:"
EMOTIONS = 4
MOST = 10  # highest rating
FEWEST_PARSEABLE = 0.8333  # a run with a smaller share does not count
REVISED_PARSEABLE = 0.95  # fewest parseable revised answers, relative to the first pass
_SCALE = 0.7477  # the benchmark's choice: random answers then score 0
_MOST_DIGITS = 9  # of a rating


@dataclass(frozen=True)
class Question:
    """One item."""

    id: str
    text: str  # the prompt, with the instructions for a revision
    reference: Mapping[str, float]  # emotion -> rating, 0 to 10

    def prompt(self, revision: bool) -> str:
        """The prompt.

        Raises:
          UserError: the instructions for the revision are to be removed and are not in version 2's form.
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
      UserError: the file cannot be read, or a question has another format; names the question and the key.
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
        missing = "`reference_answer_fullscale` is missing"
        raise UserError(f"{place}: {missing}; this is no question of EQ-Bench v2")
    reference = {}
    for number in range(1, EMOTIONS + 1):
        emotion, value = answer.get(f"emotion{number}"), answer.get(f"emotion{number}_score")
        try:
            rating = float(value)  # numbers and strings both occur
        except (TypeError, ValueError):
            rating = math.nan
        if not isinstance(emotion, str) or not 0 <= rating <= MOST:
            given = f"emotion{number} is {emotion!r} with the score {value!r}"
            raise UserError(f"{place}: {given}; it must be a name with a score from 0 to {MOST}")
        reference[emotion] = rating
    if len(reference) != EMOTIONS:
        raise UserError(f"{place}: it must name {EMOTIONS} different emotions")
    return Question(name, entry["prompt"], reference)


def read_answers(path: str | Path) -> dict[str, str | None]:
    """Reads saved answers: a JSON object `{question id: content}`, or JSON lines of `{"id", "answer"}`.

    The content is text or a list of text parts (`speech.text_of`); None means that there was no answer.

    Raises:
      UserError: the file cannot be read, or is neither; names the line or the id.
    """
    if Path(path).suffix == ".jsonl":
        rows = ((at, row.get("id"), row.get("answer", ...)) for at, row in read_rows(path, "answers"))
    else:
        content = read_json(path, "answers")
        if not isinstance(content, dict):
            raise UserError(f"{path} must hold an object with an answer's text under each question's id")
        given = {name: text for name, text in content.items() if text is not None}  # null: not answered
        rows = ((f"{path}, question {name}", name, text) for name, text in given.items())
    answers = {}
    for place, name, content in rows:
        try:
            if not isinstance(name, str | int):
                raise ValueError("no question id")
            answers[str(name)] = text_of(content)
        except ValueError as error:
            raise UserError(f"{place}: it needs a question's id and the answer as text") from error
    return answers


def parse(text: str, emotions: Iterable[str], parsing: str = "benchmark") -> dict[str, float] | None:
    """The ratings in an answer, or None if they are not for exactly these emotions.

    A rating is a word, a colon, white space and digits; for a repeated name the last one counts. The
    benchmark first removes `*` and `#` and ignores case (one name in two spellings is two names); `strict`
    does neither.

    Args:
      parsing: one of PARSINGS.
    """
    # Every word is matched once, rated or not: `(\w+):` alone would try every suffix of a long word.
    matches = re.findall(r"(\w+)(?::\s+(\d+))?", _plain(text, parsing))
    ratings = {name: value for name, value in matches if value}
    names = list(ratings)
    if parsing == "benchmark":
        known = {emotion.lower(): emotion for emotion in emotions}
        names = [known.get(name.lower()) for name in names]
    if len(names) != len(set(names)) or set(names) != set(emotions):
        return None
    if any(len(value) > _MOST_DIGITS for value in ratings.values()):
        return None
    return dict(zip(names, map(float, ratings.values()), strict=True))


def _plain(text: str, parsing: str) -> str:
    return text.replace("*", "").replace("#", "") if parsing == "benchmark" else text


def question_score(ratings: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """`q = 10 - 0.7477 sum_i s(|p_i - r_i|)`: 10 for the reference itself, about 0 by guessing.

    `s(0) = 0`; `s(d) = 6.5 / (1 + exp(-1.2 (d - 4)))` up to d = 5, which makes small differences cheap;
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
      questions: all questions of the evaluation.
      answers: question id -> text; reasoning in it is ignored. A missing answer counts as unparseable, as do
        None, an empty answer, and reasoning only.
      revision: whether the answers have a first pass and revised scores; None: they do if at least half of
        them have the heading of the revised scores.
      parsing: one of PARSINGS (see `parse`). With a revision the benchmark needs both headings for the first
        pass; `strict` reads from its heading to that of the revision or the end.
      seed: of the bootstrap over questions.

    Returns:
      `score`: 100 mean(q/10) over the parseable answers (None without any); `interval`: its 95 % interval;
      `counts`: whether enough answers are parseable for the score to count; `parseable` and
      `parseable_share`; `score_unparseable_zero`: the score with 0 for each unparseable answer; `questions`;
      `answered`: questions with an answer; `no_answer`: empty answers; `revision`; `parsing`; `by_question`:
      `{id: q or None}`. With a revision these figures are those of `result`: `revised` if its score is not
      lower and nearly as many answers parse, else `first_pass`; both are also given under their names.

    Raises:
      UserError: no questions, or an answer to an unknown question.
    """
    if not questions:
        raise UserError("there are no questions to score")
    known = {question.id for question in questions}
    for name in answers:
        if name not in known:
            raise UserError(f"there is an answer to question {name}, not one of the {len(known)} questions")
    replies = {name: spoken(text) for name, text in answers.items()}
    texts = {name: _plain(text, parsing) for name, text in replies.items() if text and not text.isspace()}
    if revision is None:
        revision = 2 * sum(REVISED in text for text in texts.values()) >= max(1, len(texts))
    head = {
        "questions": len(questions),
        "answered": len(texts),
        "no_answer": len(answers) - len(texts),
        "revision": revision,
        "parsing": parsing,
    }
    if not revision:
        return head | _score(questions, texts, parsing, seed)

    first, revised = {}, {}
    for name, text in texts.items():
        _, heading, after = text.partition(REVISED)
        if heading:
            revised[name] = after
        _, begun, after = text.partition(FIRST)
        scores, ended, _ = after.partition(REVISED)
        if begun and (ended or parsing == "strict"):
            first[name] = scores
    passes = {"first_pass": first, "revised": revised}
    passes = {name: _score(questions, given, parsing, seed) for name, given in passes.items()}
    result = "revised" if _revision_counts(**passes) else "first_pass"
    head |= {"result": result, **passes[result]}
    for scores in passes.values():
        del scores["by_question"]
    return head | passes


def _revision_counts(first_pass: Mapping[str, Any], revised: Mapping[str, Any]) -> bool:
    if revised["score"] is None or first_pass["score"] is None:
        return revised["score"] is not None
    enough = revised["parseable"] >= REVISED_PARSEABLE * first_pass["parseable"]
    return enough and revised["score"] >= first_pass["score"]


def _score(questions: Sequence[Question], answers: dict[str, str], parsing: str, seed: int) -> dict[str, Any]:
    ratings = {q.id: parse(answers.get(q.id, ""), q.reference, parsing) for q in questions}
    by_question = {q.id: ratings[q.id] and question_score(ratings[q.id], q.reference) for q in questions}
    scored = np.array([score for score in by_question.values() if score is not None])
    share = len(scored) / len(questions)
    ends = intervals(10 * scored[:, None], np.ones((len(scored), 1)), seed=seed)
    return {
        "score": float(10 * scored.mean()) if len(scored) else None,
        "interval": interval_list(ends)[0],
        "counts": share >= FEWEST_PARSEABLE,
        "parseable": len(scored),
        "parseable_share": share,
        "score_unparseable_zero": float(10 * scored.sum() / len(questions)),
        "by_question": by_question,
    }
