"""Holding dialogues: the policy on its tokens, the world on its text, both until every dialogue has ended.

Rounds: the engine samples the replies of all dialogues that await one (in a thread, so that the event loop
stays free); then, as asyncio tasks, each dialogue takes its turn in the world. A dialogue is one value with
an identity: its slot follows from its place in the batch, its random numbers from what it is. So the same
seed gives the same dialogues, in whatever order users and judges answer. Used for training and evaluation.
"""

from __future__ import annotations

import asyncio
import hashlib
import types
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from mapo_jax.environment.dialogue import DialogueState, RoleFailure, Roles, open_dialogue, take_turn
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.state import Limits
from mapo_jax.errors import UserError
from mapo_jax.rollout.chat import ChatFormat, Row
from mapo_jax.rollout.engine import Engine, Request

T = TypeVar("T")


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
    on_turn: Callable[[int], None] | None = None,
) -> list[list[Dialogue]]:
    """Holds `rollouts` dialogues in each scenario; the rollouts of one share the user's first message.

    Args:
      scenarios: S of them; a scenario may occur more than once and then has further rollouts.
      rollouts: R.
      engine: with weights loaded and at least S R slots; what its slots held is dropped.
      chat: how dialogues become token rows.
      roles: user, judge, director.
      limits: fewest and most turns, tolerance of success.
      seed: of the run. Another number gives unrelated dialogues.
      step: of the run.
      concurrency: most calls of the world under way at once.
      on_turn: called after every finished turn with their number so far. What it raises ends the collection.

    Returns:
      Dialogues [S][R]. One whose user or director failed for good has the outcome `error`; one that has no
      room for another reply in the engine's cache ends with outcome `timeout`, rule `max_tokens`.

    Raises:
      UserError: more dialogues than slots, or a first message that leaves no room for a reply.
    """
    if len(scenarios) * rollouts > engine.slots:
        raise UserError(
            f"{len(scenarios)} scenarios x {rollouts} rollouts are more dialogues than the engine's "
            f"{engine.slots} slots; make an engine with more"
        )
    bound = asyncio.Semaphore(concurrency)
    finished_turns = 0

    async def opened(scenario: Scenario, occurrence: int) -> str | RoleFailure:
        async with bound:
            try:
                return await open_dialogue(
                    scenario, derive_seed(seed, step, scenario.id, "opening", occurrence), roles
                )
            except RoleFailure as failure:
                return failure

    async def turned(talk: _Talk, text: str, truncated: bool) -> None:
        nonlocal finished_turns
        async with bound:
            talk.state = await take_turn(talk.state, text, roles, limits, truncated=truncated)
        finished_turns += 1
        if on_turn is not None:
            on_turn(finished_turns)

    ids = [scenario.id for scenario in scenarios]
    occurrences = [ids[:index].count(name) for index, name in enumerate(ids)]
    first = await _together(map(opened, scenarios, occurrences))
    talks = []
    for s, (scenario, message) in enumerate(zip(scenarios, first, strict=True)):
        for r in range(rollouts):
            own_seed = derive_seed(seed, step, scenario.id, occurrences[s] * rollouts + r)
            if isinstance(message, RoleFailure):
                state = DialogueState(scenario, own_seed, (), "", outcome="error", failure=message.kind)
            else:
                state = DialogueState(scenario, own_seed, (), message)
            talks.append(_Talk(len(talks), state, rows=[Row()]))

    await asyncio.to_thread(_begin, engine, chat, talks, rollouts)
    while waiting := [talk for talk in talks if talk.state.outcome is None]:
        requests = [
            Request(
                talk.slot,
                talk.fresh,
                key=(seed % 2**32, step % 2**32, talk.state.seed),
                turn=talk.state.turn_count,
                start=chat.history == "per_turn" and talk.state.turn_count > 0,
            )
            for talk in waiting
        ]
        replies = await asyncio.to_thread(engine.reply, requests)
        turns = []
        for talk, reply in zip(waiting, replies, strict=True):
            closed = reply.ids[-1] == chat.end_of_turn[0]
            talk.closing = () if closed else chat.end_of_turn
            talk.rows[-1] = talk.rows[-1].with_reply(
                reply.ids, reply.logprobs, talk.state.turn_count, talk.closing
            )
            turns.append(turned(talk, chat.decode(reply.ids), reply.truncated))
        await _together(turns)
        for talk in waiting:
            if talk.state.outcome is None:
                _prompt(talk, engine, chat)

    dialogues = [
        Dialogue(
            talk.state,
            talk.rows[-1],
            scenario=talk.slot // rollouts,
            rollout=talk.slot % rollouts,
            step=step,
            weight_version=engine.version,
            earlier_rows=tuple(talk.rows[:-1]),
        )
        for talk in talks
    ]
    return [dialogues[s * rollouts : (s + 1) * rollouts] for s in range(len(scenarios))]


@dataclass
class _Talk:
    """A dialogue under way."""

    slot: int
    state: DialogueState
    rows: list[Row]  # the last one is growing
    fresh: Sequence[int] = ()  # tokens that the engine has not seen
    closing: Sequence[int] = ()  # what had to be appended to the last reply, which was cut


def _begin(engine: Engine, chat: ChatFormat, talks: Sequence[_Talk], rollouts: int) -> None:
    """Prefills each scenario's common start once and copies it; the last token is left for `generate`."""
    engine.reset()
    starts, copies = {}, {}
    for talk in talks:
        if talk.state.outcome is not None:
            continue
        first = talk.slot - talk.slot % rollouts
        if first == talk.slot:
            ids = chat.start(talk.state.user)
            if len(ids) > _room(engine):
                raise UserError(
                    f"the first message of scenario {talk.state.scenario.id} takes {len(ids)} tokens, which "
                    f"leaves no room for a reply in `rollout.max_tokens`={engine.length}; raise it"
                )
            starts[first], copies[first] = ids, range(first + 1, first + rollouts)
        talk.rows[-1] = talk.rows[-1].with_prompt(starts[first])
        talk.fresh = starts[first][-1:]
    if starts:
        engine.prefill({slot: ids[:-1] for slot, ids in starts.items()})
        engine.copy_prefix(copies)


def _prompt(talk: _Talk, engine: Engine, chat: ChatFormat) -> None:
    """Puts the user's message into the row; ends the dialogue if then no reply would fit."""
    if chat.history == "per_turn":
        ids = chat.prompt(talk.state.messages)
        length, talk.fresh = len(ids), ids
    else:
        ids = chat.next_user(talk.state.user)
        length, talk.fresh = len(talk.rows[-1]) + len(ids), (*talk.closing, *ids)
    if length > _room(engine):
        talk.state = replace(talk.state, user="", outcome="timeout", rule="max_tokens")
    elif chat.history == "per_turn":
        talk.rows.append(Row().with_prompt(ids))
    else:
        talk.rows[-1] = talk.rows[-1].with_prompt(ids)


def _room(engine: Engine) -> int:
    """Longest row after which a whole reply, cut and closed, still fits."""
    return engine.length - engine.max_reply_tokens - 1


async def _together(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Awaits all; if one fails, cancels the others and raises its own error, not a group."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


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
