"""Real conversations, judged turn by turn as in training: EMPA's indices, and the worst turns.

A transcript is one line of JSON with `messages` (role and content). The judge also needs the person's state:
`scenario`, the id of a card, if the conversation was held with one; else `start`, the nine levels of the
start state. Without either the start state is UNKNOWN_START, the mean of the benchmark's cases.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console

from mapo_jax.algorithm.rewards import distance, incremental
from mapo_jax.chat_log import is_chat_log, read_chats
from mapo_jax.environment import state as calculator
from mapo_jax.environment.card_schema import INDICATORS
from mapo_jax.environment.dialogue import LEVEL_NAMES, Action, DialogueState, Turn
from mapo_jax.environment.roles import Judge, score_turn
from mapo_jax.environment.scenario import Person, Scenario, Stage, Story, start_position
from mapo_jax.errors import UserError
from mapo_jax.evaluation.answers import Folder, append, progress
from mapo_jax.evaluation.conversations import to_row
from mapo_jax.evaluation.endpoint import for_each
from mapo_jax.json_files import read_rows
from mapo_jax.rollout.collect import derive_seed
from mapo_jax.running.stop import Check
from mapo_jax.speech import spoken, text_of

JUDGED = "judged.jsonl"
NO_ANSWER = "no answer"

# (-17, -19, -19): the mean start of the published cases, rounded (C -17.2, A -19.1, P -19.0).
UNKNOWN_START = dict(zip(INDICATORS, (3, 1, 3, 1, 2, 3, 1, 2, 3), strict=True))


@dataclass(frozen=True)
class Transcript:
    """A conversation to be judged."""

    id: str
    turns: tuple[tuple[str, str | None], ...]  # user message, reply; None: no reply, or reasoning alone
    scenario: Scenario
    given: str  # source of the start state: card, row or unknown


def read_transcripts(path: str | Path, cards: Sequence[Scenario], *, need_card: bool) -> list[Transcript]:
    """Reads conversations from JSON lines, or those that a server kept in a folder (`chat_log.py`).

    Of kept conversations those without a card are left out where the judge needs one.

    Content is text or a list of text parts (`speech.text_of`). The assistant's reasoning is removed; a reply
    of null or of reasoning alone is no answer. System messages are skipped, consecutive messages of one role
    are joined. Assistant messages before the first user message are not judged, nor is a last user message
    without a reply.

    Args:
      cards: known by their ids.
      need_card: refuse a conversation without `scenario`, as the judge knows cards only.

    Raises:
      UserError: the file cannot be read, or a line is no conversation; names the line.
    """
    by_id = {card.id: card for card in cards}
    transcripts: dict[str, Transcript] = {}
    for number, (place, row) in enumerate(_rows(path, need_card), start=1):
        name = str(row.get("id", number))
        if name in transcripts:
            raise UserError(f"{place}: the id {name} occurs a second time")
        turns = _turns(row.get("messages"), place)
        transcripts[name] = Transcript(name, turns, *_scenario(row, name, place, by_id, need_card))
    return list(transcripts.values())


def _rows(path: str | Path, need_card: bool) -> Iterable[tuple[str, dict[str, Any]]]:
    if not is_chat_log(path):
        return read_rows(path, "transcripts")
    chats = [chat for chat in read_chats(path) if not need_card or "scenario" in chat]
    if not chats:
        raise UserError(
            f"no conversation in {path} was held with a scenario, and the scripted judge knows the people on "
            "cards only; configure a judge played by a language model"
        )
    return [(f"{path}, conversation {chat['id']}", chat) for chat in chats]


def _scenario(
    row: Mapping[str, Any], name: str, place: str, by_id: Mapping[str, Scenario], need_card: bool
) -> tuple[Scenario, str]:
    """The card of a conversation, and the source of its start state."""
    if "scenario" in row:
        if not isinstance(row["scenario"], str) or row["scenario"] not in by_id:
            raise UserError(
                f"{place}: there is no card {row['scenario']!r}; give cards with environment.scenarios=PATH"
            )
        return by_id[row["scenario"]], "card"
    if need_card:
        raise UserError(
            f"{place}: names no `scenario`; the scripted judge knows the people on cards only, others "
            "need a judge played by a language model"
        )
    start = row.get("start", UNKNOWN_START)
    try:
        at_rest = not any(start_position(start))
    except (UserError, TypeError) as error:
        raise UserError(f"{place}: `start`: {error}") from error
    if at_rest:
        raise UserError(f"{place}: `start`: at least one level must be above 0")
    return _unknown_person(f"transcript-{name}", start), "row" if "start" in row else "unknown"


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
                f"{place}, message {number}: needs a `role` (system, user or assistant) and `content` as text"
            )
        if role == "system" or (role == "assistant" and not merged):
            continue
        if not merged or merged[-1][0] != role:
            merged.append((role, []))
        if role == "assistant":
            content = spoken(content)
        if content is not None:
            merged[-1][1].append(content)
    texts = ["\n".join(contents) if contents else None for _, contents in merged]
    turns = tuple(zip(texts[::2], texts[1::2], strict=False))
    if not turns:
        raise UserError(f"{place}: there is no reply to a user in it")
    return turns


def _unknown_person(name: str, start: Mapping[str, int] | Sequence[int]) -> Scenario:
    """A card with a start state and nothing else about the person."""
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


async def judge_transcript(transcript: Transcript, judge: Judge) -> DialogueState:
    """The conversation as a dialogue with a judgement of every turn.

    A failed call leaves its turn unscored, and so does a reply that is no answer (failure NO_ANSWER).
    """
    seed = derive_seed("transcript", transcript.id)
    state = DialogueState(transcript.scenario, seed, (), "")
    for user, reply in transcript.turns:
        turn = Turn(user, "", None, NO_ANSWER, state.position, None)
        if reply is not None:
            turn = await score_turn(replace(state, user=user), reply, judge)
        state = replace(state, turns=(*state.turns, replace(turn, action=Action("continue"))))
    return state


async def judge_all(
    transcripts: Sequence[Transcript],
    judge: Judge,
    file: IO[bytes],
    console: Console,
    concurrency: int,
    check: Check = lambda: None,
) -> None:
    """Judges conversations, several at once, and saves each when it is whole.

    A row is that of `conversations.to_row`, with `given`. A conversation of which every judgement failed is
    not saved: the same command tries it again.

    Args:
      file: of an opened folder.
      check: called after every conversation; may raise to stop.
    """

    async def work(transcript: Transcript) -> None:
        state = await judge_transcript(transcript, judge)
        if any(turn.scored for turn in state.turns):
            row = to_row(state, "transcripts", 0)
            append(file, {**row, "case": transcript.id, "domain": None, "given": transcript.given})
        advance(1)
        check()
        await asyncio.sleep(0)  # lets the other workers run even if the judge never waits

    with progress(console, "conversations", len(transcripts)) as advance:
        await for_each(transcripts, work, concurrency)


def saved_rows(folder: Folder) -> list[dict[str, Any]]:
    """The rows of judged conversations. Raises UserError if one lacks a field."""
    return folder.rows(case=str, start=list, levels=list, messages=list, failures=list, judgements=list)


def distances(row: Mapping[str, Any]) -> list[float]:
    """`D(P_0) .. D(P_T)` of a saved row: before the first turn, and after each."""
    increments = [None if levels is None else calculator.points(levels) for levels in row["levels"]]
    return distance(calculator.trajectory(row["start"], increments)).tolist()


def exchanges(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per turn of a saved row `reward` (incremental distance; None: unscored), `levels`, `user`, `reply`."""
    rewards = incremental(np.asarray(distances(row))).tolist()
    texts = [message["content"] for message in row["messages"]]
    columns = zip(rewards, row["levels"], texts[::2], texts[1::2], strict=False)
    return [
        {"reward": None if levels is None else reward, "levels": levels, "user": user, "reply": reply}
        for reward, levels, user, reply in columns
    ]


def worst_turns(rows: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """The turns with the lowest rewards, the worst first.

    Args:
      rows: of `saved_rows`.
      most: how many.

    Returns:
      Mappings with `case`, `turn` (from 1), `reward` (incremental distance, in points), `levels`, `user`,
      `reply`, and `findings`: `(level's name, level, evidence, reason)` of every level of harm, or, without
      any, of all levels.
    """
    turns = []
    for row in rows:
        judged = zip(exchanges(row), row["judgements"], strict=True)
        for number, (turn, judgement) in enumerate(judged, start=1):
            if judgement is None:
                continue
            texts = (judgement["evidence"], judgement["reasons"])
            findings = list(zip(LEVEL_NAMES, turn["levels"], *texts, strict=True))
            harm = [finding for finding in findings if finding[1] < 0]
            turns.append({"case": row["case"], "turn": number, **turn, "findings": harm or findings})
    # Ties: more harm first, then the order of the file.
    return sorted(turns, key=lambda turn: (turn["reward"], sum(turn["levels"][1::2])))[:most]
