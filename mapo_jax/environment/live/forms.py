"""What models must answer with: strict schemas, and the reading of a text that should hold one."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator, model_validator

from mapo_jax.environment.dialogue import ACTIONS, RoleFailure

Form = TypeVar("Form", bound=BaseModel)


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
    def _has_evidence(self) -> _Finding:
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


def without_reasoning(text: str) -> str:
    """The text behind a reasoning preamble.

    Raises:
      RoleFailure: malformed; the answer ends within its reasoning.
    """
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after.strip()
    if "<think>" in text:
        raise RoleFailure("malformed", "the answer ends within its reasoning", text)
    return text.strip()


def read(text: str, form: type[Form]) -> Form:
    """The one answer of this form in a model's text; prose, fences and reasoning around it are tolerated.

    Nothing is mended: no number is clamped, no text is taken for a number.

    Raises:
      RoleFailure: malformed (no such object, two different ones, a missing, surplus or ill-typed field), or
        out_of_range (a level that its scale does not have).
    """
    found = [item for item in _objects(without_reasoning(text)) if set(item) & set(form.model_fields)]
    if not found:
        raise RoleFailure("malformed", "it holds no complete JSON object of the form asked for", text)
    if any(item != found[0] for item in found):
        raise RoleFailure("malformed", "it holds two different answers", text)
    try:
        return form.model_validate(found[0])
    except ValidationError as error:
        raise _failure(error, text) from None


def _failure(error: ValidationError, text: str) -> RoleFailure:
    problems, beyond = [], True
    for problem in error.errors():
        value = problem["input"]
        number = isinstance(value, int) and not isinstance(value, bool)
        beyond = beyond and problem["type"] == "literal_error" and number
        where = ".".join(map(str, problem["loc"])) or "the answer"
        problems.append(f"{where}: {problem['msg']}" + (f", not {value}" if number else ""))
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return RoleFailure("out_of_range" if beyond else "malformed", "; ".join(problems[:3]) + more, text)


def _objects(text: str) -> list[dict[str, Any]]:
    """The complete JSON objects of a text that lie in no other one."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
    found, place = [], 0
    while (start := text.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, start)
            found.append(value)
        except (ValueError, RecursionError):
            # Not an object. What stands inside of it is no answer either, unless prose opened the brace.
            place = start + 1
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


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
