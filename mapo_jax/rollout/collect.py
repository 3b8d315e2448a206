"""Holding dialogues: the policy on its tokens, the world on its text, both until every dialogue has ended.

Every dialogue is an asyncio task that takes turns: a reply from the engine, then the world's answer. The
engine works in a thread, a block of decode steps at a time, on whatever waits for it; so no dialogue waits
for another, and users and judges are called while the device is at work. A dialogue's random numbers follow
from what it is: the same seed gives the same dialogues, in whatever order users and judges answer. Used for
training and evaluation.
"""

from __future__ import annotations

import asyncio
import hashlib
import types
import typing
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from mapo_jax.environment.dialogue import DialogueState, RoleFailure
from mapo_jax.environment.roles import Roles, open_dialogue, take_turn
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.state import Limits
from mapo_jax.errors import UserError
from mapo_jax.rollout.dispatch import Dispatcher
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.journal import Journal
from mapo_jax.rollout.requests import Request
from mapo_jax.rollout.rows import ChatFormat, Row


@dataclass(frozen=True)
class Dialogue:
    """One dialogue of the policy with the world: what was said and scored, and the tokens it was said in."""

    state: DialogueState
    row: Row  # empty if the user could not even open; with history=per_turn: the last turn's
    scenario: int  # index of its scenario in the batch
    rollout: int  # index among its scenario's rollouts
    step: int
    weight_version: int  # of the weights that sampled it
    earlier_rows: tuple[Row, ...] = ()  # history=per_turn only: the rows of the turns before the last

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row, in the order of turns: one, or one per turn with history=per_turn."""
        return (*self.earlier_rows, self.row)

    def usable(self, max_failed_share: float) -> bool:
        """Whether to learn from it.

        Not if its user or director failed for good, if no turn was scored, or if the share of unscored turns
        exceeds `max_failed_share`.
        """
        scored = sum(turn.judgement is not None for turn in self.state.turns)
        failed = len(self.state.turns) - scored
        return (
            self.state.outcome != "error"
            and scored > 0
            and failed <= max_failed_share * len(self.state.turns)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for one line of JSON, the scenario card included; `from_json` gives an equal dialogue.

        Floats survive JSON exactly, so that a saved step's update can be replayed bit for bit.
        """
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Dialogue:
        """The dialogue that `to_json` wrote.

        Raises:
          UserError: the data is no saved dialogue.
        """
        try:
            return _from_plain(cls, data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"this is no saved dialogue: {type(error).__name__}: {error}") from error


def derive_seed(*parts: int | str) -> int:
    """A number below 2^32 that follows from the parts and looks unrelated for any other parts."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


async def collect(
    scenarios: Sequence[Scenario],
    rollouts: int,
    engine: Engine,
    chat: ChatFormat,
    roles: Roles,
    limits: Limits,
    *,
    seed: int,
    step: int,
    concurrency: int,
    own: slice = slice(None),
    on_turn: Callable[[int], None] | None = None,
    journal: Journal | None = None,
) -> list[list[Dialogue]]:
    """All of `finished_groups`, in the order of the scenarios: dialogues [S][R], those of `own` alone."""
    groups = finished_groups(
        scenarios,
        rollouts,
        engine,
        chat,
        roles,
        limits,
        seed=seed,
        step=step,
        concurrency=concurrency,
        own=own,
        on_turn=on_turn,
        journal=journal,
    )
    async with aclosing(groups):
        finished = [group async for group in groups]
    return sorted(finished, key=lambda group: group[0].scenario)


async def finished_groups(
    scenarios: Sequence[Scenario],
    rollouts: int,
    engine: Engine,
    chat: ChatFormat,
    roles: Roles,
    limits: Limits,
    *,
    seed: int,
    step: int,
    concurrency: int,
    own: slice = slice(None),
    on_turn: Callable[[int], None] | None = None,
    journal: Journal | None = None,
) -> AsyncIterator[list[Dialogue]]:
    """Holds `rollouts` dialogues in each scenario; a scenario's come as soon as the last of them has ended.

    Args:
      scenarios: S of them; a scenario may occur more than once and then has further rollouts.
      rollouts: R. The rollouts of one scenario share the user's first message.
      engine: with weights loaded; what its slots held is dropped. More dialogues than slots wait for one.
      chat: how dialogues become token rows.
      roles: user, judge, director.
      limits: fewest and most turns, tolerance of success.
      seed: of the run. Another number gives unrelated dialogues.
      step: of the run.
      concurrency: most calls of the world under way at once.
      own: which of the scenarios to hold here; another process holds the others. It changes no dialogue.
      on_turn: called after every finished turn with their number so far. What it raises ends the collection.
      journal: every finished turn is written to it; those that it holds already are not held again.

    Yields:
      R dialogues of one scenario, each with the version of the weights that spoke. One whose user or director
      failed for good has the outcome `error`; one that has no room for another reply in the engine's cache
      ends with outcome `timeout`, rule `max_tokens`.

    Raises:
      UserError: a first message that leaves no room for a reply.
    """
    engine.reset()
    bound = asyncio.Semaphore(concurrency)
    free: asyncio.Queue[int] = asyncio.Queue()
    for slot in range(engine.slots):
        free.put_nowait(slot)
    desk = Dispatcher(engine)
    ids = [scenario.id for scenario in scenarios]
    occurrences = [ids[:index].count(name) for index, name in enumerate(ids)]
    finished_turns = 0

    async def opened(s: int) -> str | RoleFailure:
        opening_seed = derive_seed(seed, step, ids[s], "opening", occurrences[s])
        kept = None if journal is None else journal.opening(ids[s], opening_seed)
        if kept is not None:
            return kept
        async with bound:
            try:
                message = await open_dialogue(scenarios[s], opening_seed, roles)
            except RoleFailure as failure:
                return failure
        if journal is not None:
            journal.note_opening(ids[s], opening_seed, message)
        return message

    async def hold(s: int, r: int) -> Dialogue:
        """One dialogue from the user's first message to its end."""
        nonlocal finished_turns
        own_seed = derive_seed(seed, step, ids[s], occurrences[s] * rollouts + r)
        message = await openings[s]
        rows, version = [Row()], engine.version
        if isinstance(message, RoleFailure):
            state = DialogueState(scenarios[s], own_seed, (), "", outcome="error", failure=message.kind)
        else:
            state = DialogueState(scenarios[s], own_seed, (), message)
            closing: Sequence[int] = ()  # what had to be appended to the last reply, which was cut
            if journal is not None:
                state, rows, closing = _take_up(state, journal, chat)
                finished_turns += state.turn_count
            taken_up = state.turn_count > 0  # the engine has not seen its row yet
            slot = await free.get()
            while state.outcome is None:
                prompt = _next_prompt(state, rows[-1], closing, engine, chat)
                if prompt is None:
                    state = replace(state, user="", outcome="timeout", rule="max_tokens")
                    break
                if state.turn_count and chat.history == "per_turn":
                    rows.append(Row())
                rows[-1] = rows[-1].with_prompt(prompt)
                start = state.turn_count == 0 or chat.history == "per_turn" or taken_up
                taken_up = False
                request = Request(
                    slot,
                    rows[-1].ids if start else (*closing, *prompt),
                    key=(seed % 2**32, step % 2**32, own_seed),
                    turn=state.turn_count,
                    start=start,
                )
                reply = await desk.reply(request)
                closing = _closing(reply.ids, chat)
                rows[-1] = rows[-1].with_reply(reply.ids, reply.logprobs, state.turn_count, closing)
                text = chat.decode(reply.ids)
                async with bound:
                    state = await take_turn(state, text, roles, limits, truncated=reply.truncated)
                if journal is not None:
                    journal.note(state, reply.ids, reply.logprobs)
                finished_turns += 1
                if on_turn is not None:
                    on_turn(finished_turns)
            free.put_nowait(slot)
        return Dialogue(
            state,
            rows[-1],
            scenario=s,
            rollout=r,
            step=step,
            weight_version=version,
            earlier_rows=tuple(rows[:-1]),
        )

    held = range(len(scenarios))[own]
    openings = {s: asyncio.ensure_future(opened(s)) for s in held}
    serving = asyncio.ensure_future(desk.serve())
    under_way = {
        serving,
        *(asyncio.ensure_future(hold(s, r)) for s in held for r in range(rollouts)),
    }
    tasks = [*openings.values(), *under_way]
    groups: dict[int, list[Dialogue]] = {s: [] for s in held}
    try:
        while groups:
            done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for dialogue in [task.result() for task in done]:
                group = groups[dialogue.scenario]
                group.append(dialogue)
                if len(group) == rollouts:
                    yield sorted(groups.pop(dialogue.scenario), key=lambda dialogue: dialogue.rollout)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if engine.busy:  # replies that nobody waits for any more
            engine.reset()


def _take_up(
    state: DialogueState, journal: Journal, chat: ChatFormat
) -> tuple[DialogueState, list[Row], Sequence[int]]:
    """The dialogue with the journal's finished turns, their rows, and what closed the last reply."""
    rows, closing = [Row()], ()
    for entry, after in journal.turns(state):
        if state.turn_count == 0:
            prompt = chat.start(state.user)
        elif chat.history == "per_turn":
            prompt = chat.prompt(state.messages)
            rows.append(Row())
        else:
            prompt = chat.next_user(state.user)
        closing = _closing(entry.ids, chat)
        row = rows[-1].with_prompt(prompt)
        rows[-1] = row.with_reply(entry.ids, entry.logprobs, state.turn_count, closing)
        state = after
    return state, rows, closing


def _closing(ids: Sequence[int], chat: ChatFormat) -> Sequence[int]:
    """What has to be appended to a sampled reply that was cut."""
    return () if ids[-1] == chat.end_of_turn[0] else chat.end_of_turn


def _next_prompt(
    state: DialogueState, row: Row, closing: Sequence[int], engine: Engine, chat: ChatFormat
) -> tuple[int, ...] | None:
    """The user's message as tokens of the row; None if after it no reply would fit."""
    if state.turn_count == 0:
        ids = chat.start(state.user)
        if len(ids) > _room(engine):
            raise UserError(
                f"the first message of scenario {state.scenario.id} takes {len(ids)} tokens, which "
                f"leaves no room for a reply in `rollout.max_tokens`={engine.length}; begin a new run with a "
                "larger one"
            )
        return tuple(ids)
    if chat.history == "per_turn":
        ids = chat.prompt(state.messages)
        return tuple(ids) if len(ids) <= _room(engine) else None
    ids = chat.next_user(state.user)
    return tuple(ids) if len(row) + len(ids) <= _room(engine) else None


def _room(engine: Engine) -> int:
    """Longest row after which a whole reply, cut and closed, still fits."""
    return engine.length - engine.max_reply_tokens - 1


def _from_plain(kind: Any, value: Any) -> Any:
    """Builds nested dataclasses and tuples of type `kind` from mappings and lists; leaves stay as is."""
    if value is None:
        return None
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{f.name: _from_plain(hints[f.name], value[f.name]) for f in fields(kind)})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _from_plain(next(kind for kind in arguments if kind is not types.NoneType), value)
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_from_plain(kind, item) for kind, item in zip(kinds, value, strict=True))
    return value
