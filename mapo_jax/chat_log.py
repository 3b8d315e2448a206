"""Conversations that a server keeps, with the feedback on them: one file a day, whole lines only.

A line is what one request added to a conversation, or feedback on a reply. `read_chats` puts them together:

    {"kind": "turn", "conversation": "conv-1", "reply": "chatcmpl-1", "messages": [...], "model": ..., ...}
    {"kind": "feedback", "reply": "chatcmpl-1", "rating": 1, "comment": "...", "time": ...}
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from mapo_jax.commands import command_parser, run_command
from mapo_jax.errors import UserError
from mapo_jax.files import append_line, storage_problem, write_whole
from mapo_jax.json_files import read_rows
from mapo_jax.speech import text_of

RATEABLE = 100_000  # replies that can still get feedback
RATEABLE_DAYS = 2  # after a restart

T = TypeVar("T", bound=BaseModel)


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)


class Message(_Line):
    """A message of a conversation; content parts are joined, and no content is none."""

    role: str
    content: Annotated[str, BeforeValidator(lambda content: text_of(content) or "")]


class _Turn(_Line):
    conversation: str
    reply: str
    model: str
    time: float
    scenario: str | None
    messages: list[Message]


class _Feedback(_Line):
    reply: str
    rating: Literal[-1, 0, 1]
    comment: str


def check_line(kind: type[T], row: Mapping[str, Any], place: str, what: str) -> T:
    """The value in a line. Raises UserError with `place` if it is not `what`."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{place}, is no line of {what} (`{field}`: {first['msg']}); correct or remove it"
        ) from error


class ChatLog:
    """Appends to a folder of conversations. A disk that refuses is no error of the caller: see `problem`.

    Attributes:
      problem: one sentence if the last line could not be written; None as soon as one can be.
      lost: lines that could not be written.
    """

    def __init__(self, folder: str | Path):
        """Makes the folder, readable for this user only, or goes on in it. Raises OSError."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.problem: str | None = None
        self.lost = 0
        self._lock = Lock()
        self._replies: OrderedDict[str, None] = OrderedDict()
        for file in _days(self.folder)[-RATEABLE_DAYS:]:
            data = file.read_bytes()
            if data and not data.endswith(b"\n"):  # cut by a power failure; the next line is one of its own
                append_line(file, b"\n")
            for line in data.splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    self._replies[orjson.loads(line)["reply"]] = None

    def add(self, kind: str, row: Mapping[str, Any]) -> bool:
        """Appends a line with its kind and its time; whether it was written."""
        now = time.time()
        file = self.folder / f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d}.jsonl"
        line = orjson.dumps({"kind": kind, "time": round(now, 3), **row}) + b"\n"
        with self._lock:
            try:
                file.touch(mode=0o600)  # in a folder that was there before others may look
                append_line(file, line)
            except OSError as error:
                sentence = storage_problem(error, file) or f"{file} cannot be written: {error}"
                self.problem = sentence.partition("; ")[0]  # keeping goes on by itself
                self.lost += 1
                return False
            self.problem = None
            if kind == "turn":
                self._replies[row["reply"]] = None
                if len(self._replies) > RATEABLE:
                    self._replies.popitem(last=False)
            return True

    def has(self, reply: str) -> bool:
        """Whether a reply was kept, so that feedback on it belongs to something."""
        return reply in self._replies


def is_chat_log(path: str | Path) -> bool:
    """Whether a path is a folder of kept conversations."""
    return Path(path).is_dir() and bool(_days(Path(path)))


def _days(folder: Path) -> list[Path]:
    return sorted(folder.glob("????-??-??.jsonl"))


def read_chats(folder: str | Path) -> list[dict[str, Any]]:
    """The conversations in a folder, in the order in which they began.

    Returns:
      For each: `id`, `messages`, `model`, `time` of its first line, `replies` (the ids of its kept
      replies, in order), `feedback` (by reply: `rating` -1 or 1, and `comment`), and its `scenario`, if any.

    Raises:
      UserError: there are none, or a line is damaged; names it.
    """
    chats: dict[str, dict[str, Any]] = {}
    feedback: dict[str, dict[str, Any]] = {}
    home: dict[str, str] = {}  # reply -> conversation
    files = _days(Path(folder))
    if not files:
        raise UserError(f"there are no conversations in {folder}: it has no file such as 2026-01-31.jsonl")
    for file in files:
        for place, row in read_rows(file, "conversations"):
            if row.get("kind") == "feedback":
                given = check_line(_Feedback, row, place, "kept conversations")
                feedback[given.reply] = {"rating": given.rating, "comment": given.comment}
                continue
            turn = check_line(_Turn, row, place, "kept conversations")
            first: dict[str, Any] = {"id": turn.conversation, "model": turn.model, "time": turn.time}
            first |= {"messages": [], "replies": [], "feedback": {}}
            if turn.scenario is not None:
                first["scenario"] = turn.scenario
            chat = chats.setdefault(turn.conversation, first)
            chat["messages"] += [message.model_dump() for message in turn.messages]
            chat["replies"].append(turn.reply)
            home[turn.reply] = turn.conversation
    for reply, value in feedback.items():
        if reply in home and value["rating"]:
            chats[home[reply]]["feedback"][reply] = value
    return list(chats.values())


def well_rated(chats: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Conversations with more good ratings than bad ones, as `warmstart.data` has them.

    A badly rated reply gets weight 0: it is read, and not learnt.
    """
    rows = []
    for chat in chats:
        ratings = {reply: feedback["rating"] for reply, feedback in chat["feedback"].items()}
        if sum(ratings.values()) <= 0:
            continue
        # The first kept line of a conversation may hold earlier replies, which have no ids.
        spoken = [message for message in chat["messages"] if message["role"] == "assistant"]
        bad = {
            id(message)
            for message, reply in zip(reversed(spoken), reversed(chat["replies"]), strict=False)
            if ratings.get(reply) == -1
        }
        messages = [message | ({"weight": 0} if id(message) in bad else {}) for message in chat["messages"]]
        rows.append({"id": chat["id"], "messages": messages})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """`FOLDER --output FILE.jsonl`: writes the well-rated conversations for `warmstart.data`."""
    parser = command_parser(
        "chat_log",
        "Writes the conversations that were rated well, as data for the warm start.",
    )
    parser.add_argument("folder", type=Path, help="the folder of `serve --conversations`")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    options = parser.parse_args(arguments)

    def command() -> None:
        chats = read_chats(options.folder)
        rows = well_rated(chats)
        if not rows:
            raise UserError(f"none of the {len(chats)} conversations in {options.folder} was rated well")
        write_whole(options.output, b"".join(orjson.dumps(row) + b"\n" for row in rows))
        print(f"{len(rows)} of {len(chats)} conversations in {options.output}")

    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
