"""EmoBench: emotional application (EA: what helps best) and understanding (EU: which emotion, and why).

The items are the benchmark's (MIT licence, English and Chinese) and come from a file; the prompts are ours.
The positions of the right choices are biased (answering C is right in 37 % of EA), so a protocol can ask in
several orders: order k rotates the choices, and over four orders each of four choices has every letter once.

Source: Sabour et al., EmoBench: Evaluating the Emotional Intelligence of Large Language Models (ACL 2024).
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, starmap
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mapo_jax.errors import UserError
from mapo_jax.json_files import read_rows
from mapo_jax.scores.bootstrap import interval_list, intervals
from mapo_jax.scores.emobench_prompts import KEYS, LETTERS, render
from mapo_jax.speech import spoken, text_of

TASKS = ("EA", "EU")
LANGUAGES = ("en", "zh")
ORDERS = 4  # rotations of the choices


class AskingProtocol(NamedTuple):
    """How often each item is asked."""

    orders: int  # orders of the choices
    samples: int  # samples per order; the majority counts
    temperature: float


PROTOCOLS = {
    "current": AskingProtocol(1, 1, 0.0),
    "permuted": AskingProtocol(ORDERS, 1, 0.0),
    "earlier": AskingProtocol(ORDERS, 5, 0.6),
}
"""`current`: once, in the given order. `permuted`: once in each order. `earlier`: five samples in each order,
at the temperature of the benchmark's first release. Scores are means over orders."""


@dataclass(frozen=True)
class Item:
    """One scenario with its one (EA) or two (EU) questions."""

    task: str
    qid: str
    language: str
    category: str
    detail: str  # EA: question type, Action or Response; EU: the finer category
    scenario: str
    subject: str
    choices: tuple[tuple[str, ...], ...]  # EA: one list; EU: emotions, then causes
    labels: tuple[int, ...]  # the right choice of each list

    @property
    def key(self) -> tuple[str, str, str]:
        """Unique among the items: task, qid and language."""
        return self.task, self.qid, self.language


@dataclass(frozen=True)
class Asking:
    """An item asked once."""

    item: Item
    order: int = 0  # 0: the given order
    sample: int = 0

    @property
    def id(self) -> str:
        """Unique within a run, and the same in every run."""
        return "/".join((*self.item.key, str(self.order), str(self.sample)))

    def shown(self, question: int) -> list[int]:
        """Index of the choice at each letter."""
        count = len(self.item.choices[question])
        shift = self.order * count // ORDERS
        return [(place + shift) % count for place in range(count)]

    def prompt(self) -> str:
        """The prompt."""
        item = self.item
        choices = [[texts[choice] for choice in self.shown(i)] for i, texts in enumerate(item.choices)]
        return render(item.task, item.language, item.detail, item.scenario, item.subject, choices)


def askings(items: Iterable[Item], protocol: AskingProtocol) -> list[Asking]:
    """All prompts of a protocol."""
    return list(starmap(Asking, product(items, range(protocol.orders), range(protocol.samples))))


# --- Files ---


def read_items(paths: Sequence[str | Path]) -> list[Item]:
    """Reads items of EA, EU or both from the benchmark's JSON-lines files.

    Raises:
      UserError: a file cannot be read, a line is no item (names file, line and key), or an item occurs twice.
    """
    items: dict[tuple[str, str, str], Item] = {}
    for path in paths:
        for place, row in read_rows(path, "items"):
            item = _item(row, place)
            if item.key in items:
                raise UserError(f"{place}: item {item.qid} ({item.task}, {item.language}) occurs twice")
            items[item.key] = item
    return list(items.values())


def _item(row: Mapping[str, Any], place: str) -> Item:
    def problem(text: str) -> UserError:
        return UserError(f"{place}: {text}")

    def text(key: str) -> str:
        if not isinstance(row.get(key), str | int) or not str(row[key]).strip():
            raise problem(f"`{key}` must be text, not {row.get(key)!r}; this is no item of EmoBench")
        return str(row[key])

    def question(choices_key: str, label_key: str) -> tuple[tuple[str, ...], int]:
        choices, label = row.get(choices_key), text(label_key)
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise problem(f"`{choices_key}` must be a list of texts")
        if not 2 <= len(choices) <= len(LETTERS):
            raise problem(f"`{choices_key}` has {len(choices)} choices; 2 to {len(LETTERS)} can be asked")
        if choices.count(label) != 1:
            raise problem(f"`{label_key}` {label!r} must be one of `{choices_key}`")
        return tuple(choices), choices.index(label)

    if "emotion_choices" in row:
        task, category, detail = "EU", "coarse_category", "finegrained_category"
        questions = [question("emotion_choices", "emotion_label"), question("cause_choices", "cause_label")]
    elif "choices" in row:
        task, category, detail = "EA", "category", "question type"
        questions = [question("choices", "label")]
    else:
        raise problem(
            "neither an item of EA (`choices`, `label`) nor of EU (`emotion_choices`, "
            "`emotion_label`, `cause_choices`, `cause_label`)"
        )
    if row.get("language") not in LANGUAGES:
        raise problem(f"`language` is {row.get('language')!r}; it must be one of {', '.join(LANGUAGES)}")
    choices, labels = zip(*questions, strict=True)
    qid, *texts = map(text, ("qid", category, detail, "scenario", "subject"))
    return Item(task, qid, row["language"], *texts, choices, labels)


def read_answers(path: str | Path, items: Sequence[Item]) -> dict[Asking, Any]:
    """Reads saved answers: JSON lines of `qid`, `language` and `answer`.

    `task` may be left out if all items are of one task; `order` and `sample` default to 0. The answer is the
    model's message (text, a list of text parts, or null for none), or the object or list parsed from it.

    Raises:
      UserError: the file cannot be read, or a line names no item or repeats one; names the line.
    """
    by_key = {item.key: item for item in items}
    tasks = {item.task for item in items}
    answers: dict[Asking, Any] = {}
    for place, row in read_rows(path, "answers"):
        for key in ("qid", "language", "answer"):
            if key not in row:
                raise UserError(f"{place}: has no `{key}`; it needs qid, language and answer")
        if "task" not in row and len(tasks) > 1:
            raise UserError(f"{place}: has no `task`, and the items are of both EA and EU")
        task = row.get("task", min(tasks))
        item = by_key.get((str(task), str(row["qid"]), str(row["language"])))
        if item is None:
            raise UserError(f"{place}: there is no item {row['qid']} ({task}, {row['language']})")
        order, sample = row.get("order", 0), row.get("sample", 0)
        if type(order) is not int or order not in range(ORDERS) or not isinstance(sample, int):
            raise UserError(f"{place}: order {order!r}, sample {sample!r}; an order is 0 to {ORDERS - 1}")
        asking = Asking(item, order, sample)
        if asking in answers:
            raise UserError(f"{place}: a second answer to item {row['qid']} ({task}, {row['language']})")
        answers[asking] = _content(row["answer"])
    return answers


def _content(answer: Any) -> Any:
    """An answer; the text of a list of text parts, as some servers send it."""
    parts = isinstance(answer, list) and any(isinstance(part, dict) and "type" in part for part in answer)
    try:
        return text_of(answer) if parts else answer
    except ValueError:
        return None


# --- Reading an answer ---


def parse(answer: Any, asking: Asking) -> tuple[int | None, ...]:
    """The choice that an answer picks for each question; None if it cannot be parsed.

    Tried in this order: an object with the keys `answer` (EA) or `answer_q1` and `answer_q2` (EU), or a list
    of as many values; the last such JSON object in a text; those keys, each with a value behind it, if there
    is no valid object (`answer: C`); a text of letters only. A value is a letter of the choices (`C`, `(c)`,
    `C) ...`, `Option C`) or the whole text of a choice. Case, full-width characters and typographic quotes do
    not matter.
    """
    values = _values(answer, KEYS[asking.item.task])
    return tuple(_choice(value, asking, question) for question, value in enumerate(values))


_QUOTES = str.maketrans("\u201c\u201d\u201e\u2018\u2019", '"""\'\'')


def _plain(text: str) -> str:
    """Without full-width characters and typographic quotes."""
    return unicodedata.normalize("NFKC", text).translate(_QUOTES)


def _values(answer: Any, keys: Sequence[str]) -> list[Any]:
    if isinstance(answer, Mapping):
        values = {str(name).strip().lower(): value for name, value in answer.items()}
        return [values.get(key) for key in keys]
    if isinstance(answer, list | tuple):
        return list(answer) if len(answer) == len(keys) else [None] * len(keys)
    text = _plain(spoken(answer) or "") if isinstance(answer, str) else ""
    for candidate in reversed(list(_objects(text))):
        if any(str(name).strip().lower() in keys for name in candidate):
            return _values(candidate, keys)
    named = [_named(text, key) for key in keys]
    if any(value is not None for value in named):
        return named
    bare = re.findall(r"[A-Za-z]+", text)
    if len(bare) == len(keys) and all(len(word) == 1 for word in bare):
        return bare
    return [text] if len(keys) == 1 else [None] * len(keys)


def _named(text: str, key: str) -> str | None:
    """The last value behind a key: quoted, or up to the end of the line."""
    matches = re.findall(rf"""(?i)\b{key}\b["'*]*\s*:\s*(?:"([^"]*)"|'([^']*)'|([^\n,}}]*))""", text)
    return next(filter(None, matches[-1]), None) if matches else None


def _objects(text: str) -> Iterable[dict[str, Any]]:
    """The outermost JSON objects in a text."""
    decoder, start = json.JSONDecoder(strict=False), 0
    while (start := text.find("{", start)) >= 0:
        try:
            value, start = decoder.raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):
            start += 1


_LETTER = re.compile(
    r"[\s\"'*(\[<]*(?:(?:option|choice|answer)\b\s*|\u9009\u9879\s*)?[\s\"'*(\[<]*"
    r"([A-Za-z])(?:[\"'*\s]*(?:[)\]>.:,\u3001\u3002]|\s-\s|$))",
    re.IGNORECASE,
)
_LETTER_WITHIN = 200  # characters; the pattern takes quadratic time


def _choice(value: Any, asking: Asking, question: int) -> int | None:
    if not isinstance(value, str):
        return None
    shown, value = asking.shown(question), _plain(value)
    choices = [_words(choice) for choice in asking.item.choices[question]]
    if choices.count(_words(value)) == 1:
        return choices.index(_words(value))
    letter = _LETTER.match(value[:_LETTER_WITHIN])
    place = LETTERS.find(letter[1].upper()) if letter else -1
    return shown[place] if 0 <= place < len(shown) else None


def _words(text: str) -> str:
    """For comparing choices: without case and surrounding punctuation."""
    return _plain(text).lower().strip(" \n\t\"'*.\u3002")


# --- Scores ---


def is_no_answer(answer: Any) -> bool:
    """Whether an answer is empty: no text, or reasoning only."""
    return answer is None or (isinstance(answer, str) and not (spoken(answer) or "").strip())


class _Cell(NamedTuple):
    """An item in one order, after the vote over its samples."""

    item: Item
    order: int
    picked: tuple[int | None, ...]

    @property
    def right(self) -> bool:
        return self.picked == self.item.labels

    @property
    def parseable(self) -> bool:
        return None not in self.picked


def score_answers(items: Sequence[Item], answers: Mapping[Asking, Any], *, seed: int = 0) -> dict[str, Any]:
    """Accuracy, overall and by task, language, category and detail.

    In each order the majority of an item's samples counts, separately for each question. Unparseable samples
    do not vote; in a tie the choice sampled first wins. EU is right only if emotion and cause both are.

    Args:
      items: all items of the evaluation.
      answers: the answer (text, or an object parsed from it) to each asking; reasoning in it is ignored.
      seed: of the bootstrap over scenarios; a scenario's two languages are drawn together.

    Returns:
      `accuracy` over all answers, unparseable ones counted as wrong, with `interval` (95 %);
      `accuracy_parseable`, over the others; `items`; `answered`, items with an answer in any order;
      `answers`, the scored votes (items times orders); `unparseable`, votes without a choice, and
      `unparseable_share`; `no_answer`, samples without text or with reasoning only (they are unparseable).
      With several orders `accuracy_by_order` and `agreement`, the share of items, among those asked in
      several orders, with the same choices in all. Under each task's name the same without `no_answer`, also
      for each of its `languages`, `categories` and `details` (question types or finer categories); for EU
      `emotion_accuracy` and `cause_accuracy`.

    Raises:
      UserError: no answers.
    """
    if not answers:
        raise UserError("there are no answers to score")
    cells = _vote(answers)
    scores = _figures(items, cells, seed)
    scores["no_answer"] = sum(map(is_no_answer, answers.values()))
    for task in TASKS:
        if any(item.task == task for item in items):
            scores[task] = _task_scores(task, items, cells, seed)
    return scores


_GROUPINGS = {"languages": "language", "categories": "category", "details": "detail"}  # fields of an item


def _task_scores(task: str, items: Sequence[Item], cells: Sequence[_Cell], seed: int) -> dict[str, Any]:
    items, cells = _where(items, cells, attrgetter("task"), task)
    scores = _figures(items, cells, seed)
    if task == "EU" and cells:
        for question, name in enumerate(("emotion_accuracy", "cause_accuracy")):
            hits = [cell.picked[question] == cell.item.labels[question] for cell in cells]
            scores[name] = float(np.mean(hits))
    for grouping, field in _GROUPINGS.items():
        group_of = attrgetter(field)
        groups = sorted(set(map(group_of, items)))
        scores[grouping] = {g: _figures(*_where(items, cells, group_of, g), seed) for g in groups}
    return scores


def _where(
    items: Sequence[Item], cells: Sequence[_Cell], group_of: Callable[[Item], str], group: str
) -> tuple[list[Item], list[_Cell]]:
    return [i for i in items if group_of(i) == group], [c for c in cells if group_of(c.item) == group]


def _vote(answers: Mapping[Asking, Any]) -> list[_Cell]:
    samples: dict[tuple[Item, int], list[tuple[int | None, ...]]] = defaultdict(list)
    for asking in sorted(answers, key=attrgetter("sample")):  # in a tie the first sample wins
        samples[asking.item, asking.order].append(parse(answers[asking], asking))
    cells = []
    for (item, order), picks in samples.items():
        votes = [Counter(choice for choice in row if choice is not None) for row in zip(*picks, strict=True)]
        cells.append(_Cell(item, order, tuple(v.most_common(1)[0][0] if v else None for v in votes)))
    return cells


def _figures(items: Sequence[Item], cells: Sequence[_Cell], seed: int) -> dict[str, Any]:
    keys = [(cell.item.task, cell.item.qid) for cell in cells]  # scenarios
    rows = {key: row for row, key in enumerate(sorted(set(keys)))}
    scenarios = np.array([rows[key] for key in keys], int)
    right = np.array([cell.right for cell in cells], float)
    sums, counts = (np.bincount(scenarios, weights) for weights in (right, np.ones(len(cells))))
    by_item: dict[Item, list[_Cell]] = defaultdict(list)
    for cell in cells:
        by_item[cell.item].append(cell)
    parseable = sum(cell.parseable for cell in cells)
    figures: dict[str, Any] = {
        "accuracy": float(right.sum()) / len(cells) if cells else None,
        "interval": interval_list(intervals(sums[:, None], counts[:, None], seed=seed))[0],
        "accuracy_parseable": float(right.sum()) / parseable if parseable else None,
        "items": len(items),
        "answered": len(by_item),
        "answers": len(cells),
        "unparseable": len(cells) - parseable,
        "unparseable_share": 1 - parseable / len(cells) if cells else None,
    }
    orders = sorted({cell.order for cell in cells})
    if len(orders) > 1:
        figures["accuracy_by_order"] = [
            float(np.mean([cell.right for cell in cells if cell.order == order])) for order in orders
        ]
        several = [{cell.picked for cell in group} for group in by_item.values() if len(group) > 1]
        figures["agreement"] = float(np.mean([len(choices) == 1 for choices in several]))
    return figures
