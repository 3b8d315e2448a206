"""EMPA's dialogues: a model under evaluation with the world on every card, each kept when it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import IO, Any

from rich.console import Console

from mapo_jax.config import Config
from mapo_jax.environment.dialogue import DialogueState, RoleFailure
from mapo_jax.environment.roles import open_dialogue, take_turn
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.state import Limits
from mapo_jax.evaluation.answers import Folder, append, progress
from mapo_jax.evaluation.endpoint import Calls, Endpoint, together
from mapo_jax.evaluation.local import LocalModel
from mapo_jax.evaluation.role_loop import RoleLoop
from mapo_jax.rollout.collect import Dialogue, derive_seed, finished_groups

DIALOGUES = "dialogues.jsonl"


@dataclass(frozen=True)
class Session:
    """The dialogues of one evaluation: who talks to whom, and where they are kept."""

    model: str  # its name, in the rows
    cards: Sequence[Scenario]
    rollouts: int  # dialogues with each card
    world: RoleLoop
    limits: Limits
    seed: int
    temperature: float
    folder: Folder
    settings: Mapping[str, Any]  # what determines the dialogues; a folder of others is refused
    console: Console
    check: Callable[[], None] = lambda: None  # called after every turn; may raise to stop


def limits_of(config: Config) -> Limits:
    """When the dialogues of a configuration end."""
    return Limits(config.rollout.min_turns, config.rollout.max_turns, config.environment.success_tolerance)


def to_row(state: DialogueState, model: str, rollout: int) -> dict[str, Any]:
    """A finished dialogue as one line: what `empa.make_case` scores, and what was said and found."""
    return {
        "model": model,
        "case": state.scenario.id,
        "rollout": rollout,
        "domain": state.scenario.domain,
        "start": list(state.scenario.start_position),
        "levels": [list(turn.judgement.levels) if turn.judgement else None for turn in state.turns],
        "outcome": state.outcome,
        "rule": state.rule,
        "truncated": [turn.truncated for turn in state.turns],
        "failures": [turn.failure for turn in state.turns],
        "messages": state.messages,
        "judgements": [
            {"evidence": turn.judgement.evidence, "reasons": turn.judgement.reasons}
            if turn.judgement
            else None
            for turn in state.turns
        ],
    }


def hold_locally(session: Session, load: Callable[[], LocalModel], config: Config, *, slots: int) -> None:
    """Holds what is missing of a session's dialogues on our engine; a card's are kept when all have ended.

    Args:
      load: makes the model; called only if something is missing.
      config: of `rollout` the longest reply and the longest dialogue matter; the latter is cut to what the
        model was made for.
      slots: dialogues at a time.

    Raises:
      UserError: the folder cannot be used, or a card's first message leaves no room for a reply.
    """
    console = session.console
    with session.folder.opened(session.settings) as file:
        missing = _missing(session)
        if not missing:
            return
        model = load()
        positions = model.policy.config.max_position_embeddings
        length = min(config.rollout.max_tokens, positions)
        if length < config.rollout.max_tokens:
            console.print(f"dialogues of up to {length} tokens, the positions of the model", soft_wrap=True)
        dialogues = len(missing) * session.rollouts
        engine = model.engine(
            slots=min(slots, dialogues),
            length=length,
            max_reply_tokens=config.rollout.max_reply_tokens,
            temperature=session.temperature,
        )
        with progress(console, "dialogues", dialogues) as advance:
            groups = finished_groups(
                missing,
                session.rollouts,
                engine,
                model.policy.chat,
                session.world.roles,
                session.limits,
                seed=session.seed,
                step=0,
                concurrency=config.environment.concurrency,
                on_turn=lambda turns: session.check(),
            )
            session.world.run(_keep_groups(session, groups, file, advance), session.check)


async def _keep_groups(
    session: Session,
    groups: AsyncGenerator[list[Dialogue]],
    file: IO[bytes],
    advance: Callable[[int], None],
) -> None:
    async with aclosing(groups):
        async for group in groups:
            for dialogue in group:
                _keep(file, session, dialogue.state, dialogue.rollout)
            advance(len(group))


def hold_remotely(session: Session, endpoint: Endpoint) -> None:
    """Holds what is missing of a session's dialogues with a model behind an endpoint, several at once.

    Raises:
      UserError: the folder cannot be used, or the endpoint failed; what had ended is saved.
    """
    with session.folder.opened(session.settings) as file:
        if missing := _missing(session):
            with progress(session.console, "dialogues", len(missing) * session.rollouts) as advance:
                session.world.run(_hold_remotely(session, missing, endpoint, file, advance), session.check)


async def _hold_remotely(
    session: Session,
    cards: Sequence[Scenario],
    endpoint: Endpoint,
    file: IO[bytes],
    advance: Callable[[int], None],
) -> None:
    calls = Calls(endpoint)
    openings: dict[str, asyncio.Task[str]] = {}
    waiting = iter([(card, rollout) for card in cards for rollout in range(session.rollouts)])

    async def hold(card: Scenario, rollout: int) -> DialogueState | None:
        seed = derive_seed(session.seed, 0, card.id, rollout)
        if card.id not in openings:
            opening = derive_seed(session.seed, 0, card.id, "opening", 0)
            openings[card.id] = asyncio.ensure_future(open_dialogue(card, opening, session.world.roles))
        try:
            state = DialogueState(card, seed, (), await openings[card.id])
        except RoleFailure as failure:
            return DialogueState(card, seed, (), "", outcome="error", failure=failure.kind)
        while state.outcome is None:
            answer = await calls.ask(state.messages, derive_seed(seed, state.turn_count))
            if answer is None:
                return None
            state = await take_turn(
                state, answer.text, session.world.roles, session.limits, truncated=answer.truncated
            )
            session.check()
        return state

    async def work() -> None:
        for card, rollout in waiting:
            state = await hold(card, rollout)
            if state is not None:
                _keep(file, session, state, rollout)
                advance(1)

    async with endpoint.connected() as calls.client:
        await together([work() for _ in range(min(endpoint.concurrency, len(cards) * session.rollouts))])
    calls.conclude()


def _keep(file: IO[bytes], session: Session, state: DialogueState, rollout: int) -> None:
    if state.outcome != "error":  # the user or director failed: tried again when the command is
        append(file, to_row(state, session.model, rollout))


def missing_cards(folder: Folder, cards: Sequence[Scenario], rollouts: int) -> list[Scenario]:
    """Cards of which not every dialogue is saved. A card's dialogues are held together."""
    saved = {(row["case"], row["rollout"]) for row in folder.rows()}
    return [card for card in cards if not {(card.id, rollout) for rollout in range(rollouts)} <= saved]


def _missing(session: Session) -> list[Scenario]:
    missing = missing_cards(session.folder, session.cards, session.rollouts)
    if 0 < len(missing) < len(session.cards):
        session.console.print(
            f"{len(session.cards) - len(missing)} of {len(session.cards)} cards are there already"
        )
    return missing


def saved_rows(folder: Folder) -> list[dict[str, Any]]:
    """The saved dialogues, one row for each card and rollout."""
    return list({(row["case"], row["rollout"]): row for row in folder.rows()}.values())
