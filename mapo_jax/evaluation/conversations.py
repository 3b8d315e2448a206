"""EMPA's dialogues of a model under evaluation with the world, on every card; saved one by one."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import product
from typing import IO, Any, TypeVar

from rich.console import Console

from mapo_jax.commands import show
from mapo_jax.config import Config
from mapo_jax.environment.dialogue import Action, DialogueState, Judgement, RoleFailure
from mapo_jax.environment.roles import Roles, limits_of, open_dialogue, take_turn
from mapo_jax.environment.scenario import Scenario
from mapo_jax.evaluation.answers import Answer, Folder, append, progress
from mapo_jax.evaluation.endpoint import Endpoint, for_each
from mapo_jax.evaluation.local import LocalModel
from mapo_jax.rollout.collect import derive_seed, finished_groups
from mapo_jax.running.stop import Check
from mapo_jax.speech import spoken, text_of

DIALOGUES = "dialogues.jsonl"

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """Dialogues to hold: who takes part, under which settings, and where they are saved."""

    model: str  # its name in the rows
    cards: Sequence[Scenario]
    roles: Roles
    config: Config  # uses `evaluation`, `rollout`, `environment.concurrency` and the success tolerance
    seed: int
    file: IO[bytes]  # of an opened folder
    console: Console
    check: Check = lambda: None  # called after every turn; may raise to stop

    @property
    def dialogues(self) -> int:
        """How many there are."""
        return len(self.cards) * self.config.evaluation.rollouts

    def save(self, state: DialogueState, rollout: int) -> None:
        """Saves a dialogue, except one whose user or director failed: the next run tries it again."""
        if state.outcome != "error":
            append(self.file, to_row(state, self.model, rollout))


def to_row(state: DialogueState, model: str, rollout: int) -> dict[str, Any]:
    """A finished dialogue as one row: what `empa.make_case` scores, the messages and the judgements."""
    judgements = [turn.judgement for turn in state.turns]
    return {
        "model": model,
        "case": state.scenario.id,
        "rollout": rollout,
        "domain": state.scenario.domain,
        "start": list(state.scenario.start_position),
        "levels": [turn.levels and list(turn.levels) for turn in state.turns],
        "outcome": state.outcome,
        "rule": state.rule,
        "truncated": [turn.truncated for turn in state.turns],
        "failures": [turn.failure for turn in state.turns],
        "messages": state.messages,
        "judgements": [j and {"evidence": j.evidence, "reasons": j.reasons} for j in judgements],
    }


def without_reasoning(state: DialogueState) -> DialogueState | None:
    """A dialogue without the reasoning in its replies; None if a reply holds nothing else."""
    replies = [spoken(turn.reply) for turn in state.turns]
    if None in replies:
        return None
    turns = zip(state.turns, replies, strict=True)
    return replace(state, turns=tuple(replace(turn, reply=reply) for turn, reply in turns))


@dataclass(frozen=True)
class ReasoningHidden:
    """Roles that see a policy's replies without the reasoning in them.

    A reply of reasoning alone is not judged, and ends the dialogue with outcome `error`.
    """

    inner: Roles

    @property
    def roles(self) -> Roles:
        """Itself, as the three roles."""
        return Roles(self, self, self)

    async def open(self, scenario: Scenario, seed: int) -> str:
        """See User."""
        return await self.inner.user.open(scenario, seed)

    async def reply(self, state: DialogueState) -> str:
        """See User."""
        return await self.inner.user.reply(_required(without_reasoning(state)))

    async def score(self, state: DialogueState, reply: str) -> Judgement:
        """See Judge."""
        return await self.inner.judge.score(_required(without_reasoning(state)), _required(spoken(reply)))

    async def act(self, state: DialogueState) -> Action:
        """See Director."""
        return await self.inner.director.act(_required(without_reasoning(state)))


def _required(visible: T | None) -> T:
    if visible is None:
        raise RoleFailure("malformed", "the reply holds reasoning alone")
    return visible


async def hold_locally(session: Session, model: LocalModel, *, slots: int) -> int:
    """Holds a session's dialogues on our engine; a card's dialogues are saved when all of them have ended.

    Args:
      model: dialogues are limited to its positions.
      slots: dialogues at once.

    Returns:
      How many dialogues ended because a reply held reasoning alone.

    Raises:
      UserError: a card's first message leaves no room for a reply.
    """
    config = session.config
    length = min(config.rollout.max_tokens, model.policy.config.max_position_embeddings)
    if length < config.rollout.max_tokens:
        show(session.console, f"dialogues of up to {length} tokens, the model's positions")
    tokens, temperature = config.rollout.max_reply_tokens, config.evaluation.temperature
    slots = min(slots, session.dialogues)
    engine = model.engine(slots=slots, length=length, max_reply_tokens=tokens, temperature=temperature)
    groups = finished_groups(
        session.cards,
        config.evaluation.rollouts,
        engine,
        model.policy.chat,
        ReasoningHidden(session.roles).roles,
        limits_of(config),
        seed=session.seed,
        step=0,
        concurrency=config.environment.concurrency,
        on_turn=lambda *_: session.check(),
    )
    unanswered = 0
    with progress(session.console, "dialogues", session.dialogues) as advance:
        async with aclosing(groups):
            async for group in groups:
                for dialogue in group:
                    state = without_reasoning(dialogue.state)
                    if state is None:
                        unanswered += 1
                    else:
                        session.save(state, dialogue.rollout)
                advance(len(group))
    return unanswered


async def hold_remotely(session: Session, endpoint: Endpoint) -> int:
    """Holds a session's dialogues with a model behind an endpoint, several at once.

    The model sees its earlier replies without their reasoning.

    Returns:
      How many dialogues ended because an answer was empty, held reasoning alone, or was not text.

    Raises:
      UserError: the endpoint failed; finished dialogues are saved.
    """
    roles, limits = session.roles, limits_of(session.config)
    rollouts = range(session.config.evaluation.rollouts)
    openings: dict[str, asyncio.Task[str]] = {}  # by card, shared by its rollouts
    unanswered = 0

    async def hold(card: Scenario, rollout: int) -> DialogueState | None:
        nonlocal unanswered
        seed = derive_seed(session.seed, 0, card.id, rollout)
        if card.id not in openings:
            opening = derive_seed(session.seed, 0, card.id, "opening", 0)
            openings[card.id] = asyncio.ensure_future(open_dialogue(card, opening, roles))
        try:
            state = DialogueState(card, seed, (), await openings[card.id])
        except RoleFailure as failure:
            return DialogueState(card, seed, (), "", outcome="error", failure=failure.kind)
        while state.outcome is None:
            answer = await ask(state.messages, derive_seed(seed, state.turn_count))
            if answer is None:
                return None
            reply = _reply(answer)
            if not reply:
                unanswered += 1
                return None
            state = await take_turn(state, reply, roles, limits, truncated=answer.truncated)
            session.check()
        return state

    async def work(dialogue: tuple[Scenario, int]) -> None:
        state = await hold(*dialogue)
        if state is not None:
            session.save(state, dialogue[1])
            advance(1)

    with progress(session.console, "dialogues", session.dialogues) as advance:
        async with endpoint.connected() as ask:
            await for_each(product(session.cards, rollouts), work, endpoint.concurrency)
    return unanswered


def _reply(answer: Answer) -> str:
    """The text of an answer without reasoning; empty if there is none."""
    try:
        reply = spoken(text_of(answer.text)) or ""
    except ValueError:
        return ""
    return "" if reply.isspace() else reply


def missing_cards(folder: Folder, cards: Sequence[Scenario], rollouts: int) -> list[Scenario]:
    """Cards of which not every dialogue is saved. A card's dialogues are held together."""
    saved = {(row["case"], row["rollout"]) for row in saved_rows(folder)}
    return [card for card in cards if not saved.issuperset(product([card.id], range(rollouts)))]


def saved_rows(folder: Folder) -> list[dict[str, Any]]:
    """The saved dialogues, one row for each card and rollout."""
    rows = folder.rows(case=str, rollout=int, rule=str | None)
    return list({(row["case"], row["rollout"]): row for row in rows}.values())
