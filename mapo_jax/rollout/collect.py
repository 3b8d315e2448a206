"""Collecting dialogues: the policy on its tokens and the world on its text, until every dialogue has ended.

Every dialogue is an asyncio task that alternates: a reply from the engine, then the world's answer. The
engine works in a thread, one block of decode steps at a time, on all requests that wait; so no dialogue waits
for another, and users and judges are called while the device works. A dialogue's random numbers follow from
its address: the same seed gives the same dialogues, in whatever order users and judges answer. Used for
training and evaluation.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

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
    """One dialogue of the policy with the world: its text, its judgements, and its token rows."""

    state: DialogueState
    row: Row  # empty if the user could not even open; with history=per_turn: the last turn's
    scenario: NonNegativeInt  # index of its scenario in the batch
    rollout: NonNegativeInt  # index among its scenario's rollouts
    step: int
    weight_version: int  # of the weights that sampled it
    earlier_rows: tuple[Row, ...] = ()  # history=per_turn only: the rows of the turns before the last

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row, in the order of turns: one, or one per turn with history=per_turn."""
        return (*self.earlier_rows, self.row)

    def usable(self, max_failed_share: float) -> bool:
        """Whether to learn from it, see `DialogueState.usable`."""
        return self.state.usable(max_failed_share)

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
            return _SAVED.validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"this is no saved dialogue: {place}: {first['msg']}") from error
        except RoleFailure as error:  # a level outside its scale
            raise UserError(f"this is no saved dialogue: {error}") from error


_SAVED = TypeAdapter(Dialogue)


def derive_seed(*parts: int | str) -> int:
    """A number below 2^32 that follows from the parts and looks unrelated for any other parts."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


async def collect(*arguments: Any, **options: Any) -> list[list[Dialogue]]:
    """All groups of `finished_groups`, with the same arguments, in the order of the scenarios: [S][R]."""
    async with aclosing(finished_groups(*arguments, **options)) as groups:
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
    concurrency: int | asyncio.Semaphore,
    share: slice = slice(None),
    on_turn: Callable[[int, int], None] | None = None,
    journal: Journal | None = None,
) -> AsyncIterator[list[Dialogue]]:
    """Holds `rollouts` dialogues in each scenario; yields a scenario's when the last of them has ended.

    Args:
      scenarios: S of them; a scenario may occur more than once and then has further rollouts.
      rollouts: R. The rollouts of one scenario share the user's first message.
      engine: with weights loaded; its slots are emptied. More dialogues than slots wait for one.
      chat: how dialogues become token rows.
      roles: user, judge, director.
      limits: fewest and most turns, tolerance of success.
      seed: of the run. Another number gives unrelated dialogues.
      step: of the run.
      concurrency: most calls of the world at once, or what bounds them together with those of others.
      share: the scenarios of this process; other processes hold the others. It changes no dialogue.
      on_turn: called after every finished turn with the numbers of finished turns and of ended dialogues so
        far. Its exceptions end the collection.
      journal: every finished turn is written to it; dialogues continue after the turns in it.

    Yields:
      R dialogues of one scenario, each with the version of the weights that sampled it. One whose user or
      director failed for good has the outcome `error`; one that has no room for another reply in the engine's
      cache ends with outcome `timeout`, rule `max_tokens`.

    Raises:
      UserError: a first message that leaves no room for a reply.
    """
    engine.reset()
    world_calls = asyncio.Semaphore(concurrency) if isinstance(concurrency, int) else concurrency
    free: asyncio.Queue[int] = asyncio.Queue()
    for slot in range(engine.slots):
        free.put_nowait(slot)
    dispatcher = Dispatcher(engine)
    ids = [scenario.id for scenario in scenarios]
    occurrences = [ids[:index].count(name) for index, name in enumerate(ids)]
    finished_turns, ended = 0, 0

    async def first_message(s: int) -> str | RoleFailure:
        opening_seed = derive_seed(seed, step, ids[s], "opening", occurrences[s])
        saved = None if journal is None else journal.opening(ids[s], opening_seed)
        if saved is not None:
            return saved
        async with world_calls:
            try:
                message = await open_dialogue(scenarios[s], opening_seed, roles)
            except RoleFailure as failure:
                return failure
        if journal is not None:
            journal.note_opening(ids[s], opening_seed, message)
        return message

    async def hold(s: int, r: int) -> Dialogue:
        """One dialogue from the user's first message to its end."""
        nonlocal finished_turns, ended
        dialogue_seed = derive_seed(seed, step, ids[s], occurrences[s] * rollouts + r)
        message = await openings[s]
        rows, version = [Row()], engine.version
        if isinstance(message, RoleFailure):
            state = DialogueState(scenarios[s], dialogue_seed, (), "", outcome="error", failure=message.kind)
            ended += 1
        else:
            state = DialogueState(scenarios[s], dialogue_seed, (), message)
            closing: Sequence[int] = ()  # appended to the last reply, if that was cut
            if journal is not None:
                state, closing = _resume(state, rows, journal, chat)
                finished_turns += state.turn_count
            resumed = state.turn_count > 0  # the engine has not seen its row yet
            slot = await free.get()
            while state.outcome is None:
                prompt = _next_prompt(state, rows[-1], engine, chat)
                if prompt is None:
                    state = replace(state, user="", outcome="timeout", rule="max_tokens")
                    ended += 1
                    break
                _add_prompt(rows, prompt, state, chat)
                start = state.turn_count == 0 or chat.history == "per_turn" or resumed
                resumed = False
                request = Request(
                    slot,
                    rows[-1].ids if start else (*closing, *prompt),
                    key=(seed % 2**32, step % 2**32, dialogue_seed),
                    turn=state.turn_count,
                    start=start,
                )
                reply = await dispatcher.reply(request)
                closing = _add_reply(rows, reply.ids, reply.logprobs, state, chat)
                text = chat.decode(reply.ids)
                async with world_calls:
                    state = await take_turn(state, text, roles, limits, truncated=reply.truncated)
                if journal is not None:
                    journal.note(state, reply.ids, reply.logprobs)
                finished_turns += 1
                ended += state.outcome is not None
                if on_turn is not None:
                    on_turn(finished_turns, ended)
            engine.release(slot)
            free.put_nowait(slot)
        return Dialogue(state, rows[-1], s, r, step, version, earlier_rows=tuple(rows[:-1]))

    indices = range(len(scenarios))[share]
    openings = {s: asyncio.ensure_future(first_message(s)) for s in indices}
    running = {
        asyncio.ensure_future(dispatcher.serve()),
        *(asyncio.ensure_future(hold(s, r)) for s in indices for r in range(rollouts)),
    }
    tasks = [*openings.values(), *running]
    groups: dict[int, list[Dialogue]] = {s: [] for s in indices}
    try:
        while groups:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for dialogue in [task.result() for task in done]:
                group = groups[dialogue.scenario]
                group.append(dialogue)
                if len(group) == rollouts:
                    yield sorted(groups.pop(dialogue.scenario), key=lambda dialogue: dialogue.rollout)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if engine.busy:  # replies that no task waits for any more
            engine.reset()


def _resume(
    state: DialogueState, rows: list[Row], journal: Journal, chat: ChatFormat
) -> tuple[DialogueState, Sequence[int]]:
    """The dialogue after the journal's finished turns, and what closed the last reply; adds to `rows`."""
    closing: Sequence[int] = ()
    for entry, after in journal.turns(state):
        _add_prompt(rows, _user_prompt(state, chat), state, chat)
        closing = _add_reply(rows, entry.ids, entry.logprobs, state, chat)
        state = after
    return state, closing


def _add_prompt(rows: list[Row], prompt: Sequence[int], state: DialogueState, chat: ChatFormat) -> None:
    if state.turn_count and chat.history == "per_turn":
        rows.append(Row())
    rows[-1] = rows[-1].with_prompt(prompt)


def _add_reply(
    rows: list[Row], ids: Sequence[int], logprobs: Sequence[float], state: DialogueState, chat: ChatFormat
) -> Sequence[int]:
    """Adds a reply to the last row; returns what closes it: the end of the turn, if the reply was cut."""
    closing = () if ids[-1] == chat.end_of_turn[0] else chat.end_of_turn
    rows[-1] = rows[-1].with_reply(ids, logprobs, state.turn_count, closing)
    return closing


def _user_prompt(state: DialogueState, chat: ChatFormat) -> tuple[int, ...]:
    """The user's message as tokens that follow the row, or begin a new one."""
    if state.turn_count == 0:
        return chat.start(state.user)
    return chat.prompt(state.messages) if chat.history == "per_turn" else chat.next_user(state.user)


def _next_prompt(state: DialogueState, row: Row, engine: Engine, chat: ChatFormat) -> tuple[int, ...] | None:
    """`_user_prompt`; None if no reply would fit after it."""
    ids = _user_prompt(state, chat)
    size = len(ids) + (0 if chat.history == "per_turn" else len(row))
    if size < engine.length - engine.max_reply_tokens:  # one token more, in case the reply is cut and closed
        return ids
    if state.turn_count == 0:
        raise UserError(
            f"the first message of scenario {state.scenario.id} takes {size} tokens, which "
            f"leaves no room for a reply in `rollout.max_tokens`={engine.length}; begin a new run with a "
            "larger one"
        )
    return None
