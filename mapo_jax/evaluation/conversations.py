"""EMPA's dialogues: a model under evaluation with the world on every card, each kept when it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import IO, Any, TypeVar

from rich.console import Console

from mapo_jax.config import Config
from mapo_jax.environment.dialogue import Action, DialogueState, Judgement, RoleFailure
from mapo_jax.environment.roles import Roles, open_dialogue, take_turn
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.state import Limits
from mapo_jax.evaluation.answers import Answer, Folder, append, progress
from mapo_jax.evaluation.endpoint import Calls, Endpoint, together
from mapo_jax.evaluation.local import LocalModel
from mapo_jax.evaluation.role_loop import RoleLoop
from mapo_jax.rollout.collect import Dialogue, derive_seed, finished_groups
from mapo_jax.scores.speech import spoken, text_of

DIALOGUES = "dialogues.jsonl"

T = TypeVar("T")


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


def heard(state: DialogueState) -> DialogueState | None:
    """A dialogue without the reasoning in its replies; None if a reply holds nothing else."""
    replies = [spoken(turn.reply) for turn in state.turns]
    if None in replies:
        return None
    turns = zip(state.turns, replies, strict=True)
    return replace(state, turns=tuple(replace(turn, reply=reply) for turn, reply in turns))


@dataclass(frozen=True)
class Hearing:
    """Roles that hear what a policy says, and not its reasoning.

    Reasoning alone is judged by nobody, and ends the dialogue with outcome `error`.
    """

    behind: Roles

    @property
    def roles(self) -> Roles:
        """Itself, as the three roles."""
        return Roles(self, self, self)

    async def open(self, scenario: Scenario, seed: int) -> str:
        """See User."""
        return await self.behind.user.open(scenario, seed)

    async def reply(self, state: DialogueState) -> str:
        """See User."""
        return await self.behind.user.reply(_answered(heard(state)))

    async def score(self, state: DialogueState, reply: str) -> Judgement:
        """See Judge."""
        return await self.behind.judge.score(_answered(heard(state)), _answered(spoken(reply)))

    async def act(self, state: DialogueState) -> Action:
        """See Director."""
        return await self.behind.director.act(_answered(heard(state)))


def _answered(said: T | None) -> T:
    if said is None:
        raise RoleFailure("malformed", "the reply holds reasoning alone")
    return said


def hold_locally(session: Session, load: Callable[[], LocalModel], config: Config, *, slots: int) -> int:
    """Holds what is missing of a session's dialogues on our engine; a card's are kept when all have ended.

    Args:
      load: makes the model; called only if something is missing.
      config: of `rollout` the longest reply and the longest dialogue matter; the latter is cut to what the
        model was made for.
      slots: dialogues at a time.

    Returns:
      How many dialogues broke off because a reply held reasoning alone.

    Raises:
      UserError: the folder cannot be used, or a card's first message leaves no room for a reply.
    """
    console = session.console
    with session.folder.opened(session.settings) as file:
        missing = _missing(session)
        if not missing:
            return 0
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
                Hearing(session.world.roles).roles,
                session.limits,
                seed=session.seed,
                step=0,
                concurrency=config.environment.concurrency,
                on_turn=lambda turns: session.check(),
            )
            return session.world.run(_keep_groups(session, groups, file, advance), session.check)


async def _keep_groups(
    session: Session,
    groups: AsyncGenerator[list[Dialogue]],
    file: IO[bytes],
    advance: Callable[[int], None],
) -> int:
    unanswered = 0
    async with aclosing(groups):
        async for group in groups:
            for dialogue in group:
                state = heard(dialogue.state)
                if state is None:
                    unanswered += 1
                else:
                    _keep(file, session, state, dialogue.rollout)
            advance(len(group))
    return unanswered


def hold_remotely(session: Session, endpoint: Endpoint) -> int:
    """Holds what is missing of a session's dialogues with a model behind an endpoint, several at once.

    The model's history holds what it said, without its reasoning.

    Returns:
      How many dialogues broke off because an answer was empty, held reasoning alone, or was no text.

    Raises:
      UserError: the folder cannot be used, or the endpoint failed; what had ended is saved.
    """
    with session.folder.opened(session.settings) as file:
        missing = _missing(session)
        if not missing:
            return 0
        with progress(session.console, "dialogues", len(missing) * session.rollouts) as advance:
            return session.world.run(_hold_remotely(session, missing, endpoint, file, advance), session.check)


async def _hold_remotely(
    session: Session,
    cards: Sequence[Scenario],
    endpoint: Endpoint,
    file: IO[bytes],
    advance: Callable[[int], None],
) -> int:
    calls = Calls(endpoint)
    unanswered = 0
    openings: dict[str, asyncio.Task[str]] = {}
    waiting = iter([(card, rollout) for card in cards for rollout in range(session.rollouts)])

    async def hold(card: Scenario, rollout: int) -> DialogueState | None:
        nonlocal unanswered
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
            reply = _speech(answer)
            if not reply:
                unanswered += 1
                return None
            state = await take_turn(
                state, reply, session.world.roles, session.limits, truncated=answer.truncated
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
    return unanswered


def _speech(answer: Answer) -> str:
    """What an answer says; empty where it says nothing."""
    try:
        reply = spoken(text_of(answer.text)) or ""
    except ValueError:
        return ""
    return "" if reply.isspace() else reply


def _keep(file: IO[bytes], session: Session, state: DialogueState, rollout: int) -> None:
    if state.outcome != "error":  # the user or director failed: tried again when the command is
        append(file, to_row(state, session.model, rollout))


def missing_cards(folder: Folder, cards: Sequence[Scenario], rollouts: int) -> list[Scenario]:
    """Cards of which not every dialogue is saved. A card's dialogues are held together."""
    saved = {(row["case"], row["rollout"]) for row in folder.rows(**_NEEDED)}
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
    return list({(row["case"], row["rollout"]): row for row in folder.rows(**_NEEDED)}.values())


_NEEDED = {"case": str, "rollout": int, "rule": str | None}
