"""The prompts: jinja2 files in English and Chinese, chosen by the card's language.

Texts of models and cards are only values in a template, never templates. Messages of a dialogue appear as
JSON strings, so that no text can imitate another speaker or the end of the quotation.
"""

import json
from functools import lru_cache
from typing import Any

import jinja2

from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.state import AXES

Messages = list[dict[str, str]]


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mapo_jax.environment.live", "prompts"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # plain text; values are not parsed again
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,  # of an included file
    )
    environment.filters["json"] = _quote
    return environment


def _quote(value: Any) -> str:
    # Without "<" no text can contain a server's control tokens or a reasoning block.
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def render(language: str, name: str, **values: Any) -> str:
    """A rendered prompt file.

    Args:
      language: a folder of prompts/: en or zh.
      name: of the file, without its suffix.
      values: of the template's variables.
    """
    return _environment().get_template(f"{language}/{name}.j2").render(**values).strip()


def chat(system: str, turn: str) -> Messages:
    """A system message and one user message."""
    return [{"role": "system", "content": system}, {"role": "user", "content": turn}]


def needs(card: Scenario) -> list[tuple[str, int]]:
    """The person's needs: (axis, level 0..3) of the priority indicators, highest level first."""
    return sorted(zip(AXES, card.start[2::3], strict=True), key=lambda need: -need[1])
