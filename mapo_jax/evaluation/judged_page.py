"""Judged conversations as one HTML page: the scores, the worst turns, every conversation in full."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from mapo_jax.evaluation.transcripts import distances, exchanges
from mapo_jax.scores import empa

Values = Mapping[str, Any]


def render_page(title: str, figures: Values, rows: Sequence[Values], worst: Sequence[Values]) -> str:
    """The page's HTML.

    Args:
      title: the file and the judge.
      figures: of `empa.summarize_cases`.
      rows: of `transcripts.saved_rows`.
      worst: of `transcripts.worst_turns`.
    """
    conversations = []
    for row in rows:
        score = empa.score_case(row["start"], row["levels"])["epm_q"]
        turns = list(zip(exchanges(row), row["failures"], strict=True))
        conversations.append({**row, "turns": turns, "epm_q": score, "end": distances(row)[-1]})
    conversations.sort(key=lambda conversation: conversation["epm_q"])
    source = (Path(__file__).parent / "judged_page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    values = {"title": title, "figures": figures, "parts": empa.PARTS, "worst": worst}
    return environment.from_string(source).render(values, conversations=conversations)
