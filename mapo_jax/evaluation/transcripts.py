"""Real conversations, judged turn by turn as in training: the same indices, and the worst turns first.

A transcript is one line of JSON with `messages` (role and content). What the judge needs beyond the words
comes beside them: `scenario`, the id of a card, where the conversation was held with one; else `start`, the
nine levels of the start state. Without either the person is unknown, and lacks what the middle one of the
benchmark's people lacks.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from mapo_jax.algorithm.rewards import distance
from mapo_jax.environment import state as calculator
from mapo_jax.environment.card_schema import INDICATORS
from mapo_jax.environment.dialogue import (
    LEVEL_NAMES,
    Action,
    DialogueState,
    Judgement,
    RoleFailure,
    Turn,
)
from mapo_jax.environment.roles import Judge
from mapo_jax.environment.scenario import Person, Scenario, Stage, Story, start_position
from mapo_jax.errors import UserError
from mapo_jax.evaluation.answers import Folder, append, progress
from mapo_jax.evaluation.conversations import to_row
from mapo_jax.evaluation.endpoint import together
from mapo_jax.evaluation.role_loop import RoleLoop
from mapo_jax.json_files import read_rows
from mapo_jax.rollout.collect import derive_seed
from mapo_jax.scores.speech import spoken, text_of

JUDGED = "judged.jsonl"
NO_ANSWER = "no answer"

# (-17, -19, -19): the mean start of the published cases, rounded (C -17.2, A -19.1, P -19.0).
UNKNOWN_START = dict(zip(INDICATORS, (3, 1, 3, 1, 2, 3, 1, 2, 3), strict=True))


@dataclass(frozen=True)
class Transcript:
    """A conversation to be judged."""

    id: str
    turns: tuple[
        tuple[str, str | None], ...
    ]  # what the user said, and the reply; None: none, or reasoning alone
    scenario: Scenario
    given: str  # where the start state comes from: card, row or unknown


def read_transcripts(path: str | Path, cards: Sequence[Scenario], *, need_card: bool) -> list[Transcript]:
    """Reads conversations from JSON lines.

    A content is text or a list of text parts (`speech.text_of`); the assistant's reasoning is left out, and a
    reply of null or of reasoning alone is no answer. System messages are passed over, neighbouring messages
    of one side are one message. A greeting, before the user has spoken, is not judged, nor is a last message
    without a reply.

    Args:
      cards: known by their ids.
      need_card: whether a conversation without `scenario` is refused, as the judge knows cards only.

    Raises:
      UserError: the file cannot be read, or a line is no conversation; names the line.
    """
    by_id = {card.id: card for card in cards}
    transcripts: dict[str, Transcript] = {}
    for number, (place, row) in enumerate(read_rows(path, "transcripts"), start=1):
        name = str(row.get("id", number))
        if name in transcripts:
            raise UserError(f"{place}: the id {name} occurs a second time")
        turns = _turns(row.get("messages"), place)
        if "scenario" in row:
            if not isinstance(row["scenario"], str) or row["scenario"] not in by_id:
                raise UserError(
                    f"{place}: there is no card {row['scenario']!r}; give the cards with "
                    "environment.scenarios=PATH"
                )
            scenario, given = by_id[row["scenario"]], "card"
        elif need_card:
            raise UserError(
                f"{place}: names no `scenario`; the scripted judge knows the people on cards only, others "
                "need a judge played by a language model"
            )
        else:
            given = "row" if "start" in row else "unknown"
            try:
                at_rest = not any(start_position(row.get("start", UNKNOWN_START)))
            except (UserError, TypeError) as error:
                raise UserError(f"{place}: `start`: {error}") from error
            if at_rest:
                raise UserError(f"{place}: `start`: at least one level must be above 0")
            scenario = _unknown_person(f"transcript-{name}", row.get("start", UNKNOWN_START))
        transcripts[name] = Transcript(name, turns, scenario, given)
    return list(transcripts.values())


def _turns(messages: Any, place: str) -> tuple[tuple[str, str | None], ...]:
    if not isinstance(messages, list):
        raise UserError(f"{place}: `messages` must be a list of messages with `role` and `content`")
    merged: list[tuple[str, list[str]]] = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) and "content" in message else None
        try:
            content = text_of(message["content"]) if role else None
        except ValueError:
            role = None
        if role not in ("system", "user", "assistant") or (role == "user" and content is None):
            raise UserError(
                f"{place}, message {number}: needs a `role` (system, user or assistant) and its "
                "`content` as text"
            )
        if role == "system" or (role == "assistant" and not merged):
            continue
        if not merged or merged[-1][0] != role:
            merged.append((role, []))
        if role == "assistant":
            content = spoken(content)
        if content is not None:
            merged[-1][1].append(content)
    said = ["\n".join(texts) if texts else None for _, texts in merged]
    turns = tuple(zip(said[::2], said[1::2], strict=False))
    if not turns:
        raise UserError(f"{place}: there is no reply to a user in it")
    return turns


def _unknown_person(name: str, start: Mapping[str, int] | Sequence[int]) -> Scenario:
    """A card that says of its person only that nothing is known."""
    levels = [start[key] for key in INDICATORS] if isinstance(start, Mapping) else list(start)
    unknown = "Not known; judge by the conversation alone."
    stage = Stage(unknown, ("", ""), ("", ""), "", "")
    return Scenario(
        id=name,
        domain="life",
        split="test",
        person=Person("the user", 0, unknown, unknown, "As in the conversation."),
        empathy_threshold="medium",
        topic="What the conversation is about.",
        hope=unknown,
        dislike=(unknown,),
        start=tuple(levels),
        history=(unknown,) * 4,
        situation=unknown,
        goal=unknown,
        motive=unknown,
        value="",
        story=Story(unknown, (stage,) * 4, ("", ""), ("", ""), unknown, unknown),
    )


def fingerprint(transcripts: Sequence[Transcript]) -> str:
    """Tells these conversations from others."""
    digest = hashlib.blake2b(digest_size=8)
    for transcript in transcripts:
        known = [transcript.id, transcript.turns, transcript.scenario.id, transcript.scenario.start]
        digest.update(json.dumps(known).encode())
    return digest.hexdigest()


async def judge_transcript(transcript: Transcript, judge: Judge) -> DialogueState:
    """The conversation as a dialogue whose every turn is judged.

    A failed call leaves its turn unscored, and so does a reply that is no answer (failure NO_ANSWER).
    """
    seed = derive_seed("transcript", transcript.id)
    state = DialogueState(transcript.scenario, seed, (), "")
    for user, reply in transcript.turns:
        asked = replace(state, user=user)
        judgement: Judgement | None = None
        failure = None
        position = state.position
        try:
            if reply is None:
                failure = NO_ANSWER
            else:
                judgement = await judge.score(asked, reply)
                position = calculator.move(position, calculator.points(judgement.levels))
        except RoleFailure as problem:
            failure = problem.kind
        turn = Turn(user, reply or "", judgement, failure, position, Action("continue"))
        state = replace(state, turns=(*state.turns, turn))
    return state


def judge_all(
    transcripts: Sequence[Transcript],
    world: RoleLoop,
    folder: Folder,
    settings: Mapping[str, Any],
    console: Console,
    *,
    concurrency: int,
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Judges what is not judged yet, several conversations at once, each kept when it is whole.

    Returns:
      A row for each conversation, in their order, as `conversations.to_row` makes it, with `given`. One of
      which every judgement failed is not kept: the same command tries it again.

    Raises:
      UserError: the folder cannot be used.
    """
    with folder.opened(settings) as file:
        done = {row["case"] for row in folder.rows(**_NEEDED)}
        waiting = iter([t for t in transcripts if t.id not in done])
        missing = len(transcripts) - len(done)
        if missing:
            with progress(console, "conversations", missing) as advance:
                world.run(_judge_all(waiting, world.roles.judge, file, concurrency, advance, check), check)
        rows = {row["case"]: row for row in folder.rows(**_NEEDED)}
    return [rows[t.id] for t in transcripts if t.id in rows]


_NEEDED = dict(case=str, start=list, levels=list, messages=list, failures=list, judgements=list)


async def _judge_all(waiting, judge, file: IO[bytes], concurrency: int, advance, check) -> None:
    async def work() -> None:
        for transcript in waiting:
            state = await judge_transcript(transcript, judge)
            if any(turn.scored for turn in state.turns):
                row = to_row(state, "transcripts", 0)
                append(file, {**row, "case": transcript.id, "domain": None, "given": transcript.given})
            advance(1)
            check()
            await asyncio.sleep(0)  # a judge that never waits must not keep the others from their turn

    await together([work() for _ in range(concurrency)])


def worst_turns(rows: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """The turns that took the person furthest away, the worst first.

    Args:
      rows: of `judge_all`.
      most: how many.

    Returns:
      Mappings with `case`, `turn` (from 1), `reward` (incremental distance, in points), `levels`, `user`,
      `reply`, and `findings`: `(level's name, level, evidence, reason)` of what was harm, or, without any, of
      every level.
    """
    turns = []
    for row in rows:
        increments = [None if turn is None else calculator.points(turn) for turn in row["levels"]]
        distances = distance(calculator.trajectory(row["start"], increments)).tolist()
        for index, levels in enumerate(row["levels"]):
            if levels is None:
                continue
            judged = row["judgements"][index]
            found = list(zip(LEVEL_NAMES, levels, judged["evidence"], judged["reasons"], strict=True))
            turns.append(
                {
                    "case": row["case"],
                    "turn": index + 1,
                    "reward": distances[index] - distances[index + 1],
                    "levels": levels,
                    "user": row["messages"][2 * index]["content"],
                    "reply": row["messages"][2 * index + 1]["content"],
                    "findings": [one for one in found if one[1] < 0] or found,
                }
            )
    # Among equals the one with more harm; then as they stand in the file.
    return sorted(turns, key=lambda turn: (turn["reward"], sum(turn["levels"][1::2])))[:most]
