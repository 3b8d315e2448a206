"""What models must answer with: strict schemas, and the reading of a text that should hold one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mapo_jax.environment.dialogue import ACTIONS, RoleFailure

Form = TypeVar("Form", bound=BaseModel)

_SILENT = "silent"  # validation context
_OPEN, _CLOSE = "<think>", "</think>"
_SEARCHED = 10**6  # characters of the longest text in which objects are searched

# Balanced braces that begin as an object does, strings passed over, nested _DEPTH deep (a form: 2).
# Possessive: nothing is tried twice.
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
    """One level, with what it rests on before it."""

    evidence: str
    reason: str

    @field_validator("reason")
    @classmethod
    def _has_reason(cls, reason: str) -> str:
        if not reason.strip():
            raise ValueError("a level needs a reason")
        return reason

    @model_validator(mode="after")
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
    """Its findings, in the order of its fields."""
    return [getattr(form, name) for name in type(form).model_fields]


def whole_characters(text: str) -> str:
    """`text` with pairs of surrogates joined, and U+FFFD for each half of one: JSON can spell these."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def excerpt(text: str, longest: int = 4000) -> str:
    """`text`, or the first and last of its characters with a note of how many are left out between them."""
    half = longest // 2
    if len(text) <= longest:
        return text
    return f"{text[:half]} [{len(text) - 2 * half} characters left out] {text[-half:]}"


def without_reasoning(text: str) -> str:
    """What is said behind a reasoning block, without white space around it.

    Only a block at the very beginning counts. It runs from <think> to the first </think>. Where a text does
    not begin with <think> but holds a </think>, the server's chat template has opened the block, and the text
    up to there is reasoning as well. So words that quote a bare </think> lose what stands before it: cutting
    a sentence short does less harm than speaking a model's reasoning. JSON answers are not read by this rule,
    see `read`. A <think> behind the beginning is text like any other.

    Raises:
      RoleFailure: malformed; the answer ends within its reasoning.
    """
    if _CLOSE in text and not text.lstrip().startswith(_OPEN):
        text = text.partition(_CLOSE)[2]
    return _behind_blocks(text)


def _behind_blocks(text: str) -> str:
    """The text behind the blocks that it begins with."""
    said = text.strip()
    while said.startswith(_OPEN):
        _, closed, said = said.partition(_CLOSE)
        if not closed:
            raise RoleFailure("malformed", "the answer ends within its reasoning", text)
        said = said.strip()
    return said


def read(text: str, form: type[Form], *, silent: bool = False) -> Form:
    """The one answer of this form in a model's text; prose, fences and reasoning around it are tolerated.

    No text within the answer can be mistaken for what stands around it: from the first brace behind a leading
    <think> block to the last one is tried as JSON before anything is searched. If that fails, the objects
    behind the last </think> that lies in none of them count.

    Nothing is mended: no number is clamped, no text is taken for a number. Line breaks and tabs within a
    string are read as they stand, and half a surrogate pair as U+FFFD.

    Args:
      text: of a model.
      form: what it should hold.
      silent: it is about a reply without a word, in which no level can find evidence.

    Raises:
      RoleFailure: malformed (no such object, two different ones, a missing, surplus or ill-typed field), or
        out_of_range (a level that its scale does not have).
    """
    try:
        found = _answers(text, set(form.model_fields))
    except RoleFailure as failure:
        raise RoleFailure(failure.kind, failure.detail, text) from None
    if not found:
        raise RoleFailure("malformed", "it holds no complete JSON object of the form asked for", text)
    if any(item != found[0] for item in found):
        raise RoleFailure("malformed", "it holds two different answers", text)
    try:
        return form.model_validate(found[0], context=_SILENT if silent else None)
    except ValidationError as error:
        raise _failure(error, text) from None


def _answers(text: str, names: set[str]) -> list[dict[str, Any]]:
    """The complete JSON objects in a text that have one of these names."""
    said = _behind_blocks(text)
    first, last = said.find("{"), said.rfind("}")
    try:
        whole = [_decode(said[first : last + 1])] if first >= 0 else []
    except (ValueError, RecursionError):
        pass
    else:
        return [item for item in whole if set(item) & names]
    found, behind = [], 0
    for start, end, item in _objects(said):
        if set(item) & names:
            if _CLOSE in said[behind:start]:
                found = []  # drafts
            found.append(item)
            behind = end
    return found


def _failure(error: ValidationError, text: str) -> RoleFailure:
    problems, beyond = [], True
    for problem in error.errors():
        value = problem["input"]
        number = isinstance(value, int) and not isinstance(value, bool)
        beyond = beyond and problem["type"] == "literal_error" and number
        where = ".".join(map(str, problem["loc"])) or "the answer"
        problems.append(f"{where}: {problem['msg']}" + (f", not {value}" if number else ""))
        problems[-1] = excerpt(problems[-1], 200)
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return RoleFailure("out_of_range" if beyond else "malformed", "; ".join(problems[:3]) + more, text)


def _objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(start, end, object) of the complete JSON objects of a text that lie in no other one.

    Takes time linear in the text: a place is looked at once for each level of nesting, at most.
    """
    place = 0
    while len(text) <= _SEARCHED and (match := _OBJECT.search(text, place)):
        try:
            item = _decode(match.group())
        except (ValueError, RecursionError):
            # Not an object. What stands inside of it is no answer either, unless prose opened the brace.
            place = match.start() + 1
        else:
            place = match.end()
            yield match.start(), place, item


def _decode(text: str) -> Any:
    """Raises ValueError or RecursionError."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, strict=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return {
        whole_characters(name): whole_characters(value) if isinstance(value, str) else value
        for name, value in pairs
    }


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def spoken(text: str) -> str:
    """The words of a person out of a model's text: no reasoning, no quotation marks around all of it.

    Raises:
      RoleFailure: malformed; nothing is left, or it is far too long for a person to say.
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


LONGEST_MESSAGE = 1200  # characters of a user's message
