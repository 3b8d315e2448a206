"""The start state of a card: nine indicators, estimated once by a language model."""

from dataclasses import dataclass

from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.calls import Complete, ask
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
    """Estimates the start state of a card; its `start` is ignored.

    Raises:
      RoleFailure: the call finally failed.
    """
    return await ask(complete, card, start_messages(card), to_start, schema=SCHEMA)


def to_start(text: str) -> StartState:
    """The start state in a model's text.

    Raises:
      RoleFailure: malformed or out of range; malformed also if every level is 0.
    """
    rows = [(f.level, f.evidence, f.reason) for f in findings(read(text, StartForm))]
    if not any(level for level, _, _ in rows):
        raise RoleFailure("malformed", "every level is 0; a person who talks about a trouble lacks something")
    return StartState(*zip(*rows, strict=True))


def start_messages(card: Scenario) -> Messages:
    """The prompt of the model that estimates the start state."""
    return chat(render(card.language, "start_system"), render(card.language, "start_card", card=card))
