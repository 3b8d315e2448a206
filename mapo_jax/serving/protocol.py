"""OpenAI's chat protocol: requests as checked values, and errors and figures as its clients read them.

A parameter that has no effect here is refused, not ignored; one that is null counts as absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mapo_jax.files import encodable
from mapo_jax.rollout.requests import Alternatives
from mapo_jax.rollout.sampling import ALTERNATIVES, RequestSampling
from mapo_jax.speech import text_of

MOST_STOPS, LONGEST_STOP = 4, 1000  # texts, characters
_UNION = re.compile(r"(constrained-)?str|(list|dict)\[.*")  # pydantic's names for members of a union
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)

T = TypeVar("T", bound=BaseModel)


class ProtocolError(Exception):
    """A request that is answered with an error object.

    Attributes:
      status: of HTTP.
      body: the error object.
      headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Function(_Values):
    name: str
    arguments: str | dict[str, Any]


class _ToolCall(_Values):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class Message(_Values):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Any] = ""
    tool_calls: list[_ToolCall] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # left out by the template, as in training
    refusal: str | None = None  # in what clients send back; empty
    annotations: list[Any] = Field([], max_length=0)


class _StreamOptions(_Values):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _TextFormat(_Values):
    type: Literal["text"]


class _Metadata(_Values):
    scenario: str | None = None  # the id of the card that the user plays


_Stop = Annotated[str, Field(max_length=LONGEST_STOP)]


class ChatRequest(_Values):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[Message] = Field(min_length=1)
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] = []
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=ALTERNATIVES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1)  # 0 and -1: all
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    store: bool = True  # whether the conversation may be kept, if the server keeps any
    metadata: _Metadata = _Metadata()
    # Accepted with the one value that has no effect.
    user: str | None = None
    safety_identifier: str | None = None
    response_format: _TextFormat | None = None
    logit_bias: dict[str, Any] = Field({}, max_length=0)
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] = ["text"]
    service_tier: Literal["auto", "default"] | None = None

    @property
    def sampling(self) -> RequestSampling:
        """The distribution that is asked for."""
        return RequestSampling(
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature if self.temperature > 1e-5 else 0.0,  # no overflow in float32
            top_k=min(max(self.top_k, 0), 2**31 - 1),  # an int32 on the device
            top_p=max(self.top_p, 1e-9),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end a reply."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(stop for stop in stops if stop)

    @property
    def limit(self) -> int | None:
        """Most tokens of a reply; None: the server's."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages for the chat template, with content as text."""
        return [
            message.model_dump(exclude_defaults=True) | {"content": text_of(message.content) or ""}
            for message in self.messages
        ]

    @property
    def kept(self) -> list[dict[str, str]]:
        """The messages as a conversation is kept: role and text; what tools have said is left out."""
        return [
            {"role": "system" if m.role == "developer" else m.role, "content": text_of(m.content) or ""}
            for m in self.messages
            if m.role != "tool"
        ]

    @property
    def texts(self) -> list[tuple[str, str]] | None:
        """(role, text) of every message; None if a message is more than text."""
        if any(message.tool_calls or message.role == "tool" for message in self.messages):
            return None
        return [(message.role, text_of(message.content) or "") for message in self.messages]


class Feedback(_Values):
    """The body of POST /v1/feedback."""

    reply: str  # `id` of a completion
    rating: Literal[-1, 0, 1]  # 0 takes an earlier rating back
    comment: str = Field("", max_length=4000)


class Load(_Values):
    """The body of POST /admin/load."""

    model: str = Field(min_length=1, max_length=200)  # the name that is served; a new name is added
    path: str = Field(min_length=1, max_length=4000)
    step: int | None = None


def read_request(kind: type[T], body: bytes | bytearray, most_values: int) -> T:
    """The checked value in a request's body.

    Args:
      most_values: JSON values that a body may hold. A million small ones would take seconds to check, in
        which no stream goes on.

    Raises:
      ProtocolError: it is not JSON, or not what the protocol has.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        text = body.decode("utf-8-sig")
        frame = _STRING.sub("", text)
        if sum(map(frame.count, ",[{")) > most_values:
            raise ProtocolError(f"The body holds more than {most_values} JSON values.")
        content = json.loads(text, parse_constant=refuse)
        if "\\u" in text:
            content = encodable(content)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ProtocolError(f"We could not parse the JSON body of your request: {reason}") from error
    if not isinstance(content, dict):
        raise ProtocolError("The body of a request must be a JSON object.")
    content = _without_nulls(content)
    if isinstance(content.get("messages"), list):
        content["messages"] = [
            _without_nulls(message) if isinstance(message, dict) else message
            for message in content["messages"]
        ]
    try:
        value = kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from error
    if isinstance(value, ChatRequest):
        _check(value)
    return value


def _without_nulls(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if value is not None}


def _refusal(error: ValidationError) -> ProtocolError:
    """The first of pydantic's errors in OpenAI's words."""
    first = error.errors(include_url=False)[0]
    parts = [part for part in first["loc"] if isinstance(part, int) or not _UNION.fullmatch(part)]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)[1:201]
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {place}"
    elif first["type"] == "missing":
        message = f"Missing required parameter: '{place}'."
    else:
        message = f"Invalid value for '{place}': {first['msg']}."
    return ProtocolError(message, param=place or None, code=first["type"])


def _check(request: ChatRequest) -> None:
    for index, message in enumerate(request.messages):
        try:
            text_of(message.content)
        except ValueError as error:
            place = f"messages[{index}].content"
            raise ProtocolError(f"Invalid value for '{place}': {error}.", param=place) from error
    if request.top_logprobs and not request.logprobs:
        raise ProtocolError("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise ProtocolError("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    if request.max_tokens and request.max_completion_tokens:
        raise ProtocolError("Set only one of 'max_tokens' and 'max_completion_tokens'.", param="max_tokens")


def usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """The `usage` of an answer, in tokens; `cached` ones of the prompt were in the cache already."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def logprob_entry(token: str, spelled: bytes, logprob: float) -> dict[str, Any]:
    """A token as `logprobs` lists it. JSON has no infinity: OpenAI's clients read -9999 as impossible."""
    return {"token": token, "bytes": list(spelled), "logprob": max(logprob, -9999.0)}


def logprob_entries(
    ids: Sequence[int], alternatives: Sequence[Alternatives], most: int, spell: Any
) -> list[dict[str, Any]]:
    """The `logprobs.content` of tokens.

    Args:
      most: how many of the alternatives are listed.
      spell: (text, bytes) of an id.
    """
    return [
        logprob_entry(*spell(token), found.logprob)
        | {
            "top_logprobs": [
                logprob_entry(*spell(other), logprob)
                for other, logprob in zip(found.ids[:most], found.logprobs[:most], strict=True)
            ]
        }
        for token, found in zip(ids, alternatives, strict=True)
    ]
