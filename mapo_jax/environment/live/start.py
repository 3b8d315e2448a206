"""The start state of a card that has none: nine indicators, estimated once by a language model."""

from __future__ import annotations

from dataclasses import dataclass

from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.calls import Complete
from mapo_jax.environment.live.forms import StartForm, findings, read
from mapo_jax.environment.live.prompts import Messages, chat, render
from mapo_jax.environment.scenario import Scenario

SCHEMA = StartForm.model_json_schema()


@dataclass(frozen=True)
class StartState:
    """Nine levels in the order of INDICATORS, each with evidence from the card and a reason."""

    levels: tuple[int, ...]
    evidence: tuple[str, ...]
    reasons: tuple[str, ...]


async def estimate_start(card: Scenario, complete: Complete) -> StartState:
    """Estimates the start state of a card, whatever its `start` holds.

    Raises:
      RoleFailure: the call failed for good.
    """
    text = await complete(
        start_messages(card),
        schema=SCHEMA,
        check=to_start,
        repair=lambda problem: render(card.language, "json_repair", problem=problem),
    )
    return to_start(text)


def to_start(text: str) -> StartState:
    """The start state in a model's text.

    Raises:
      RoleFailure: malformed or out of range; a person who lacks nothing is no start either.
    """
    found = findings(read(text, StartForm))
    if not any(finding.level for finding in found):
        raise RoleFailure("malformed", "every level is 0; a person who talks about a trouble lacks something")
    return StartState(
        tuple(f.level for f in found), tuple(f.evidence for f in found), tuple(f.reason for f in found)
    )


def start_messages(card: Scenario) -> Messages:
    """What the model that plays the start-state judge is asked."""
    return chat(render(card.language, "start_system"), render(card.language, "start_card", card=card))
