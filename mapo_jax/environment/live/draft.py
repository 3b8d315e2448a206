"""A scenario card drafted from a real conversation by a language model, for a person to edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mapo_jax.environment.card_schema import DOMAINS, PERIODS, THRESHOLDS, check_card
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.calls import Complete
from mapo_jax.environment.live.forms import read
from mapo_jax.environment.live.prompts import Messages, chat, render
from mapo_jax.environment.live.traces import trace

Line = Annotated[str, Field(min_length=1)]

SYSTEM = f"""You write a scenario card about a person from a conversation that they had with an assistant. \
The card lets an actor play someone with the same trouble. It must not lead back to the real person.

- Invent the name. Replace every name of a person, place, school, company or product by an invented one of \
the same kind, and change ages, dates and numbers a little. No addresses, no phone numbers, no links.
- Keep what matters: what happened, how they feel, what they hope for, what hurts them in replies, how they \
talk.
- Where the conversation does not say something, invent what fits.
- The story has exactly four stages, in the order in which such a person would reveal them.

Answer with one JSON object and nothing after it. Its keys, in this order: domain (one of \
{", ".join(DOMAINS)}); person (object: name, age, social: how others know them, inner: what goes on inside, \
speech: how they talk); empathy_threshold (one of {", ".join(THRESHOLDS)}); topic; hope; dislike (list); \
history (object: {", ".join(PERIODS)}, one sentence each); present (object: situation, goal, motive); story \
(object: trigger, stages: list of four objects with telling, outcome, epilogue)."""


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Person(_Form):
    name: Line
    age: int
    social: Line
    inner: Line
    speech: Line


class _History(_Form):
    childhood: Line
    youth: Line
    adulthood: Line
    recent: Line


class _Present(_Form):
    situation: Line
    goal: Line
    motive: Line


class _Stage(_Form):
    telling: Line


class _Story(_Form):
    trigger: Line
    stages: Annotated[list[_Stage], Field(min_length=4, max_length=4)]
    outcome: Line
    epilogue: Line


class CardForm(_Form):
    """A card without its id, split and start."""

    domain: Literal[DOMAINS]  # type: ignore[valid-type]
    person: _Person
    empathy_threshold: Literal[THRESHOLDS]  # type: ignore[valid-type]
    topic: Line
    hope: Line
    dislike: Annotated[list[Line], Field(min_length=1)]
    history: _History
    present: _Present
    story: _Story


SCHEMA = CardForm.model_json_schema()


async def draft_card(name: str, messages: Sequence[Mapping[str, str]], complete: Complete) -> dict[str, Any]:
    """The draft of a card with the id `name`, as plain data without a start.

    Raises:
      RoleFailure: the call finally failed.
    """

    def parse(text: str) -> dict[str, Any]:
        return to_card(text, name, [message["content"] for message in messages])

    text = await complete(
        draft_messages(messages),
        check=parse,
        repair=lambda problem: render("en", "json_repair", problem=problem),
        schema=SCHEMA,
    )
    return parse(text)


def to_card(text: str, name: str, said: Sequence[str] = ()) -> dict[str, Any]:
    """The card in a model's text, drafted from what was `said`.

    Raises:
      RoleFailure: malformed; also a card with an address, a number, a link or a name that leads back to a
        person.
    """
    card = {"id": name, "language": "en", "split": "train", **read(text, CardForm).model_dump()}
    _, problems = check_card(card)
    if problems:
        raise RoleFailure("malformed", "; ".join(problems[:3]), text)
    if found := trace(card, said):
        raise RoleFailure("malformed", f"it holds {found!r}, which may lead back to a person", text)
    return card


def draft_messages(messages: Sequence[Mapping[str, str]]) -> Messages:
    """The prompt of the model that drafts."""
    names = {"user": "PERSON", "assistant": "ASSISTANT"}
    lines = [f"{names[m['role']]}: {m['content']}" for m in messages if m["role"] in names]
    return chat(SYSTEM, "THE CONVERSATION\n" + "\n".join(lines))
