"""Strict schemas of models' answers, and the parsing of a text that should contain one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo

from mapo_jax.environment.dialogue import ACTIONS, RoleFailure

Form = TypeVar("Form", bound=BaseModel)

_SILENT = "silent"  # validation context
_OPEN, _CLOSE = "<think>", "</think>"
LONGEST_MESSAGE = 1200  # characters of a user's message
_LONGEST_TEXT = 10**6  # characters; objects are not searched in longer texts

# Balanced braces that begin like an object, without those in strings, nested up to _DEPTH deep (a form: 2).
# Possessive quantifiers: no backtracking.
_DEPTH = 4
_STRING = r'"(?:[^"\\]++|\\.)*+"'
_NESTED = rf'\{{(?:[^{{}}"]++|{_STRING})*+\}}'
for _ in range(_DEPTH - 1):
    _NESTED = rf'\{{(?:[^{{}}"]++|{_STRING}|{_NESTED})*+\}}'
_OBJECT = re.compile(rf'(?=\{{\s*+"){_NESTED}', re.DOTALL)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _whole(level: Any) -> Any:
    if not isinstance(level, int) or isinstance(level, bool):  # a Literal takes 1.0 and true for 1
        raise ValueError("a level is a whole number")
    return level


_Whole = BeforeValidator(_whole)


class _Finding(_Strict):
    """One level, after its evidence and reason."""

    evidence: str
    reason: str

    @pydantic.field_validator("reason")
    @classmethod
    def _has_reason(cls, reason: str) -> str:
        if not reason.strip():
            raise ValueError("a level needs a reason")
        return reason

    @pydantic.model_validator(mode="after")
    def _has_evidence(self, info: ValidationInfo) -> _Finding:
        if info.context == _SILENT:
            return self
        if getattr(self, "level", 0) != 0 and not self.evidence.strip():
            raise ValueError("a level other than 0 needs evidence")
        return self


class Progress(_Finding):
    """What a reply gained on one axis."""

    level: Annotated[Literal[0, 1, 2], _Whole]


class Harm(_Finding):
    """What a reply cost on one axis."""

    level: Annotated[Literal[0, -1, -2], _Whole]


class Lack(_Finding):
    """What a person lacks at the start, by one indicator."""

    level: Annotated[Literal[0, 1, 2, 3], _Whole]


class ReplyForm(_Strict):
    """A judge's 18 fields, in the order of dialogue.LEVEL_NAMES."""

    C_progress: Progress
    C_harm: Harm
    A_progress: Progress
    A_harm: Harm
    P_progress: Progress
    P_harm: Harm


class StartForm(_Strict):
    """A start-state judge's 27 fields, in the order of scenario.INDICATORS."""

    C1: Lack
    C2: Lack
    C3: Lack
    A1: Lack
    A2: Lack
    A3: Lack
    P1: Lack
    P2: Lack
    P3: Lack


class DirectionForm(_Strict):
    """A director's one function call."""

    reason: str
    function: Literal[ACTIONS]  # type: ignore[valid-type]
    target: str | None
    guidance: str


def findings(form: ReplyForm | StartForm) -> list[Any]:
    """The findings of a form, in the order of its fields."""
    return [getattr(form, name) for name in type(form).model_fields]


def whole_characters(text: str) -> str:
    """`text` with surrogate pairs joined, and U+FFFD for half pairs, which JSON can contain."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def excerpt(text: str, longest: int = 4000) -> str:
    """`text`, shortened in the middle to `longest` characters and a note of how many are left out."""
    half = longest // 2
    if len(text) <= longest:
        return text
    return f"{text[:half]} [{len(text) - 2 * half} characters left out] {text[-half:]}"


def without_reasoning(text: str) -> str:
    """The text after a reasoning block, stripped.

    Only a block at the very beginning counts. It runs from <think> to the first </think>. If a text does not
    begin with <think> but contains </think>, the server's chat template has opened the block, and the text up
    to there is reasoning as well. So an answer that quotes a bare </think> loses the text before it, which
    does less harm than reasoning in a dialogue. `read` does not apply this rule to JSON answers. A later
    <think> is ordinary text.

    Raises:
      RoleFailure: malformed; the answer ends within its reasoning.
    """
    if _CLOSE in text and not text.lstrip().startswith(_OPEN):
        text = text.partition(_CLOSE)[2]
    return _behind_blocks(text)


def _behind_blocks(text: str) -> str:
    """The text after the reasoning blocks at its beginning."""
    rest = text.strip()
    while rest.startswith(_OPEN):
        _, closed, rest = rest.partition(_CLOSE)
        if not closed:
            raise RoleFailure("malformed", "the answer ends within its reasoning", text)
        rest = rest.strip()
    return rest


def read(text: str, form: type[Form], *, silent: bool = False, quoted: str = "") -> Form:
    """Parses the only answer of this form in a model's text; prose, fences and reasoning may surround it.

    Text within the answer is never taken for its surroundings: the text from the first brace after a leading
    <think> block to the last brace is parsed as JSON first. If that fails, the objects after the last
    </think> outside of objects count. Objects that `quoted` contains are quotations, unless there are no
    others.

    Values are not corrected: no number is clamped, no text is converted to a number. Line breaks and tabs in
    a string are accepted; half a surrogate pair becomes U+FFFD.

    Args:
      text: of a model.
      form: of the answer.
      silent: the answer is about an empty reply, in which no level can have evidence.
      quoted: the policy's replies, which the surroundings of the answer may repeat.

    Raises:
      RoleFailure: malformed (no such object, two different ones, a missing, surplus or ill-typed field), or
        out_of_range (a level outside its scale).
    """
    answers = _answers(text, set(form.model_fields), quoted)
    if not answers:
        raise RoleFailure("malformed", "it holds no complete JSON object of the form asked for", text)
    if any(answer != answers[0] for answer in answers):
        raise RoleFailure("malformed", "it holds two different answers", text)
    try:
        return form.model_validate(answers[0], context=_SILENT if silent else None)
    except ValidationError as error:
        raise _failure(error, text) from None


def _answers(text: str, names: set[str], quoted: str) -> list[dict[str, Any]]:
    """The complete JSON objects in a text that have one of these names and are not in `quoted`."""
    text = _behind_blocks(text)
    first, last = text.find("{"), text.rfind("}")
    if first < 0:
        return []
    try:
        whole = _decode(text[first : last + 1])
    except (ValueError, RecursionError):
        pass
    else:
        return [whole] if set(whole) & names else []
    found = [one for one in _objects(text) if set(one[2]) & names]
    quotations = [item for _, _, item in _objects(quoted)]
    answers, end_of_last = [], 0
    for start, end, item in [one for one in found if one[2] not in quotations] or found:
        if _CLOSE in text[end_of_last:start]:
            answers = []  # those before it are drafts
        answers.append(item)
        end_of_last = end
    return answers


def _failure(error: ValidationError, text: str) -> RoleFailure:
    """Out of range if every problem is a whole number outside its scale; else malformed."""
    problems, out_of_range = [], True
    for problem in error.errors():
        value = problem["input"]
        number = isinstance(value, int) and not isinstance(value, bool)
        out_of_range = out_of_range and problem["type"] == "literal_error" and number
        where = ".".join(map(str, problem["loc"])) or "the answer"
        problems.append(excerpt(f"{where}: {problem['msg']}" + (f", not {value}" if number else ""), 200))
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return RoleFailure("out_of_range" if out_of_range else "malformed", "; ".join(problems[:3]) + more, text)


def _objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(start, end, object) of the outermost complete JSON objects of a text.

    Its time is linear in the length of the text: a character is visited at most once per level of nesting.
    """
    position = 0
    while len(text) <= _LONGEST_TEXT and (match := _OBJECT.search(text, position)):
        try:
            item = _decode(match.group())
        except (ValueError, RecursionError):
            position = match.start() + 1  # the brace belongs to prose, or the object is invalid
        else:
            position = match.end()
            yield match.start(), position, item


def _decode(text: str) -> Any:
    """Raises ValueError or RecursionError."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, strict=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return {whole_characters(k): whole_characters(v) if isinstance(v, str) else v for k, v in pairs}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def spoken(text: str) -> str:
    """A person's message in a model's text: without reasoning, and without quotation marks around all of it.

    Raises:
      RoleFailure: malformed; the message is empty or longer than LONGEST_MESSAGE.
    """
    words = without_reasoning(text)
    if match := re.fullmatch(r'(?s)["“「](.*)["”」]', words):
        inner = match.group(1)
        if not re.search(r'["“”「」]', inner):
            words = inner.strip()
    if not words:
        raise RoleFailure("malformed", "it is empty", text)
    if len(words) > LONGEST_MESSAGE:
        raise RoleFailure("malformed", f"it has {len(words)} characters; at most {LONGEST_MESSAGE}", text)
    return words
