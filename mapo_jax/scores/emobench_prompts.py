"""The prompts of EmoBench: our wording, in the item's language."""

from __future__ import annotations

import json
from collections.abc import Sequence

LETTERS = "ABCDEFGH"
KEYS = {"EA": ("answer",), "EU": ("answer_q1", "answer_q2")}  # of the requested JSON object

_OPENING = {
    "en": "Put yourself in the place of the people in this situation: what they know, want and feel. "
    "Then choose the best answer.",
    "zh": "请设身处地想一想情境中的人知道什么、想要什么、有什么感受，然后选出最合适的答案。",
}
_SITUATION = {"en": "Situation: {}", "zh": "情境：{}"}
_CHOICES = {"en": "Choices:", "zh": "选项："}
_SINGLE = {"en": "Question: {}", "zh": "问题：{}"}
_NUMBERED = {"en": "Question {}: {}", "zh": "问题{}：{}"}
_EA_QUESTIONS = {
    ("en", "Action"): "What could {} do here that would help most?",
    ("en", "Response"): "How could {} respond here so that it helps most?",
    ("zh", "Action"): "{}在这里怎么做最有帮助？",
    ("zh", "Response"): "{}在这里怎样回应最有帮助？",
}
_EU_QUESTIONS = {
    "en": ("In the end, what does {} feel?", "What makes {} feel that way?"),
    "zh": ("到最后，{}的感受是什么？", "{}为什么会有这样的感受？"),
}
_ANSWER = {
    "en": "Answer with the letter alone, as a JSON object and nothing else:",
    "zh": "只用选项的字母作答，写成一个JSON对象，不要写别的内容：",
}


def render(
    task: str, language: str, detail: str, scenario: str, subject: str, choices: Sequence[Sequence[str]]
) -> str:
    """The prompt of an item.

    Args:
      task: EA or EU.
      language: en or zh.
      detail: EA: Action or Response; anything else is treated as Action.
      choices: one list per question, in the displayed order.
    """
    if task == "EA":
        wording = _EA_QUESTIONS.get((language, detail), _EA_QUESTIONS[language, "Action"])
        questions = [_SINGLE[language].format(wording.format(subject))]
    else:
        wordings = [wording.format(subject) for wording in _EU_QUESTIONS[language]]
        questions = [_NUMBERED[language].format(i, wording) for i, wording in enumerate(wordings, start=1)]
    parts = [_OPENING[language], _SITUATION[language].format(scenario)]
    for question, texts in zip(questions, choices, strict=True):
        lines = [f"{letter}) {text}" for letter, text in zip(LETTERS, texts, strict=False)]
        parts.append("\n".join([question, _CHOICES[language], *lines]))
    shape = json.dumps(dict.fromkeys(KEYS[task], "…"), ensure_ascii=False)
    return "\n\n".join([*parts, f"{_ANSWER[language]}\n{shape}"])
