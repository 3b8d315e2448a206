"""The text of a model's answer, in any form that servers send, and without its reasoning."""

import re
from typing import Any

from mapo_jax.files import encodable

_TEXT_PARTS = ("text", "output_text", None)
_REASONING_PARTS = ("thinking", "reasoning")
_TAG = re.compile(r"(</?think>)", re.IGNORECASE)


def text_of(content: Any) -> str | None:
    """The text of a message's content, lone surrogates replaced; None if there is none.

    Args:
      content: text, None, or a list of parts: texts, or objects with a `type` and a `text`. Reasoning parts
        are left out.

    Raises:
      ValueError: anything else, such as an image.
    """
    if content is None or isinstance(content, str):
        return encodable(content)
    if not isinstance(content, list):
        raise ValueError(f"the content is {type(content).__name__}, not text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if kind in _REASONING_PARTS:
            continue
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise ValueError("the content has a part that is not text")
        texts.append(text)
    return encodable("".join(texts)) if texts else None


def spoken(text: str | None) -> str | None:
    """A text without its reasoning; None if it is reasoning only, or ends within it.

    Reasoning is the content of `<think>...</think>`, and everything before a `</think>` whose block the
    prompt opened. A text without such tags is returned unchanged.
    """
    if text is None or not _TAG.search(text):
        return text
    inside, kept = False, []
    for piece in _TAG.split(text):
        if piece.lower() == "<think>":
            inside = True
        elif piece.lower() == "</think>":
            if not inside:
                kept.clear()
            inside = False
        elif not inside:
            kept.append(piece)
    return None if inside else "".join(kept).strip() or None
