"""The prompts of EmoBench: our wording (`emobench_prompts.yaml`), in the item's language."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

LETTERS = "ABCDEFGH"
KEYS = {"EA": ("answer",), "EU": ("answer_q1", "answer_q2")}  # of the requested JSON object
_TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


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
    text = _TEXTS[language]
    if task == "EA":
        wording = text["EA"].get(detail, text["EA"]["Action"])
        questions = [text["single"].format(wording.format(subject))]
    else:
        wordings = [wording.format(subject) for wording in text["EU"]]
        questions = [text["numbered"].format(i, wording) for i, wording in enumerate(wordings, start=1)]
    parts = [text["opening"], text["situation"].format(scenario)]
    for question, texts in zip(questions, choices, strict=True):
        lines = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, texts, strict=False)]
        parts.append("\n".join([question, text["choices"], *lines]))
    shape = json.dumps(dict.fromkeys(KEYS[task], "…"), ensure_ascii=False)
    return "\n\n".join([*parts, f"{text['answer']}\n{shape}"])
