"""The dialogues, packed for the page: gzip in base64, one piece per step, unpacked by the browser on demand.

The page has a size to keep. The index of all dialogues goes in first, then the texts of whole steps, then
their tokens; each in the order before, after, last step, first step, and then steps evenly between. What does
not fit is left out, and `Packed` says how much.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from mapo_jax.reporting.credit import Credit
from mapo_jax.reporting.folder import TOKENIZER_FILE, SavedBatch, SavedDialogue, SavedRun, TokenRow

PAYLOAD_BYTES = 13_000_000  # of all pieces together, as written
LEVEL = 5  # of the compression: 6 takes half as long again for a few per cent


@dataclass(frozen=True)
class Packed:
    """What the page carries."""

    index: str  # base64 of gzipped JSON
    pieces: Mapping[str, str]  # key -> the same
    dialogues: int
    without_text: int  # dialogues that are not in the page at all
    without_tokens: int  # dialogues of the page whose tokens are not

    @property
    def size(self) -> int:
        """Bytes in the page."""
        return len(self.index) + sum(map(len, self.pieces.values()))


@dataclass(frozen=True)
class Group:
    """A batch with its credit, in its run."""

    run: int
    batch: SavedBatch
    credits: Sequence[Credit]

    @property
    def key(self) -> str:
        """Names the batch in the page and in links: run, `v` or `t`, step."""
        return f"{self.run}.{'v' if self.batch.validation else 't'}{self.batch.step}"


def pack(
    runs: Sequence[SavedRun],
    groups: Sequence[Group],
    *,
    limit: int = PAYLOAD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> Packed:
    """Packs the dialogues of all runs.

    Args:
      runs: in the order of their numbers.
      groups: every batch of theirs.
      limit: most bytes.
      progress: called with the name of each piece.
    """
    told = progress or (lambda name: None)
    ordered = by_importance(groups)
    writers = [TokenWriter(run.folder) for run in runs]
    pieces: dict[str, str] = {}
    size = 200 * sum(len(g.batch.dialogues) for g in groups)  # the index, generously
    kept: list[Group] = []
    # Compression leaves the interpreter free, so two pieces are under way at a time.
    with ThreadPoolExecutor(2) as pool:
        for group, piece in zip(ordered, pool.map(_texts, ordered), strict=True):
            told(f"packing {group.key}")
            if size + len(piece) <= limit:
                pieces[group.key] = piece
                size += len(piece)
                kept.append(group)
        without = 0
        tokens = pool.map(lambda group: squeeze(writers[group.run].pack(group.batch.dialogues)), kept)
        for group, piece in zip(kept, tokens, strict=True):
            told(f"packing the tokens of {group.key}")
            if size + len(piece) <= limit:
                pieces[f"{group.key}.tokens"] = piece
                size += len(piece)
            else:
                without += len(group.batch.dialogues)
    return Packed(
        index=squeeze(index_json(runs, [g for g in groups if g.key in pieces])),
        pieces=pieces,
        dialogues=sum(len(g.batch.dialogues) for g in kept),
        without_text=sum(len(g.batch.dialogues) for g in groups if g.key not in pieces),
        without_tokens=without,
    )


def _texts(group: Group) -> str:
    pairs = zip(group.batch.dialogues, group.credits, strict=True)
    return squeeze([dialogue_json(dialogue, credit) for dialogue, credit in pairs])


def by_importance(groups: Sequence[Group]) -> list[Group]:
    """Per run: last and first evaluation, last and first step, other evaluations, other steps evenly."""
    order = []
    for _, own in groupby(sorted(groups, key=lambda g: g.run), key=lambda g: g.run):
        mine = list(own)
        held = sorted((g for g in mine if g.batch.validation), key=lambda g: g.batch.step)
        trained = sorted((g for g in mine if not g.batch.validation), key=lambda g: g.batch.step)
        ends = [*held[-1:], *held[:1], *trained[-1:], *trained[:1], *held[1:-1]]
        ranked = list(dict.fromkeys(g.key for g in (*ends, *_spread(trained))))
        order += list(enumerate(ranked))
    known = {g.key: g for g in groups}
    return [known[key] for _, key in sorted(order, key=lambda entry: entry[0])]


def _spread(groups: Sequence[Group]) -> Iterable[Group]:
    """Middle first, then the middles of the halves, and so on."""
    queue = [(0, len(groups))]
    while queue:
        low, high = queue.pop(0)
        if low < high:
            middle = (low + high) // 2
            yield groups[middle]
            queue += [(low, middle), (middle + 1, high)]


def squeeze(content: Any) -> str:
    """Base64 of gzipped JSON. The bytes follow from the content alone: no time, no name in the header."""
    try:
        text = orjson.dumps(content)
    except TypeError:  # half of a surrogate pair, which only an escape can write
        text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, 31)  # 31: with gzip's header
    return base64.b64encode(packer.compress(text) + packer.flush()).decode()


def index_json(runs: Sequence[SavedRun], groups: Sequence[Group]) -> dict[str, Any]:
    """What the list of dialogues shows, and the cards."""
    cards: dict[str, dict[str, Any]] = {}
    places: dict[str, int] = {}
    rows = []
    for group in groups:
        for place, (dialogue, credit) in enumerate(zip(group.batch.dialogues, group.credits, strict=True)):
            card = json.dumps(card_json(dialogue), sort_keys=True)  # runs may hold another card of one id
            if card not in places:
                places[card] = len(places)
                cards[card] = card_json(dialogue)
            epm_q = dialogue.epm_q
            rows.append(
                [
                    group.run,
                    int(group.batch.validation),
                    group.batch.step,
                    *dialogue.place,
                    places[card],
                    dialogue.outcome,
                    len(dialogue.turns),
                    dialogue.unscored_turns,
                    sum(turn.truncated for turn in dialogue.turns),
                    failure_kinds(dialogue),
                    _round(credit.first_return, 3),
                    _round(epm_q, 1),
                    place,
                ]
            )
    named = [{"name": run.name, "estimator": run.algorithm.estimator} for run in runs]
    return {"runs": named, "cards": list(cards.values()), "rows": rows}


def failure_kinds(dialogue: SavedDialogue) -> list[str]:
    """What failed in it: of `timeout: no answer in 60 s` the first word."""
    told = [turn.failure for turn in dialogue.turns if turn.levels is None] + [dialogue.failure]
    return sorted({failure.split(":")[0][:40] for failure in told if failure})


def card_json(dialogue: SavedDialogue) -> dict[str, Any]:
    """What a reader wants to know of the card."""
    card = dialogue.card
    person = card.get("person") if isinstance(card.get("person"), Mapping) else {}
    story = card.get("story") if isinstance(card.get("story"), Mapping) else {}
    dislike = card.get("dislike") or ()
    texts = {
        "id": card["id"],
        "domain": card.get("domain"),
        "split": card.get("split"),
        "topic": card.get("topic"),
        "hope": card.get("hope"),
        "dislike": "; ".join(map(str, dislike)) if isinstance(dislike, (list, tuple)) else dislike,
        "name": person.get("name"),
        "age": person.get("age"),
        "social": person.get("social"),
        "inner": person.get("inner"),
        "situation": card.get("situation"),
        "trigger": story.get("trigger"),
    }
    return {name: str(text) for name, text in texts.items() if text is not None}


def dialogue_json(dialogue: SavedDialogue, credit: Credit) -> dict[str, Any]:
    """All of a dialogue but its tokens. Short names: there are thousands of them."""
    none = (None,) * len(dialogue.turns)
    columns = zip(
        dialogue.turns,
        dialogue.distances[1:],
        credit.rewards,
        credit.returns,
        credit.turn_level or none,
        credit.batch_level or none,
        credit.advantages or none,
        strict=True,
    )
    return {
        "start": dialogue.start,
        "distance": _round(dialogue.distances[0], 2),
        "rule": dialogue.rule,
        "failure": dialogue.failure,
        "seed": dialogue.seed,
        "turns": [
            {
                "u": turn.user,
                "r": turn.reply,
                "p": [_round(axis, 2) for axis in turn.position],
                "d": _round(distance, 2),
                "c": [_round(value, 3) for value in credit],
                "l": turn.levels,
                "e": turn.evidence,
                "w": turn.reasons,
                "f": turn.failure,
                "k": turn.kind,
                "n": turn.named,
                "a": turn.action,
                "g": turn.guidance,
                "x": int(turn.truncated),
            }
            for turn, distance, *credit in columns
        ],
    }


class TokenWriter:
    """Turns rows of ids into texts with mask and log-probability; without a tokenizer, the ids themselves."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = None
        self._texts: dict[int, str] = {}
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception:  # the library raises its bare base class for whatever is wrong with the file
            self._tokenizer = None

    def text(self, token: int) -> str:
        """What a token stands for; the raw name of one that is only part of a character."""
        if token not in self._texts:
            self._texts[token] = self._decode(token)
        return self._texts[token]

    def _decode(self, token: int) -> str:
        if self._tokenizer is None or token < 0:
            return f"[{token}]"
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return f"[{token}]"
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        return name if "\ufffd" in text or not text else text

    def pack(self, dialogues: Sequence[SavedDialogue]) -> dict[str, Any]:
        """Rows of a batch: `words` are the distinct texts; per row token indices, runs of the mask and of the
        turns as [value, length, ...], and hundredths of nats for the sampled tokens."""
        used = np.unique(np.concatenate([row.ids for d in dialogues for row in d.rows] or [np.zeros(0, int)]))
        return {
            "words": [self.text(int(token)) for token in used],
            "rows": [[_row_json(row, used) for row in d.rows] for d in dialogues],
        }


def _row_json(row: TokenRow, used: np.ndarray) -> dict[str, Any]:
    logprobs = np.nan_to_num(row.logprob[row.sampled], nan=0.0, posinf=0.0, neginf=-1e4)
    return {
        "i": np.searchsorted(used, row.ids).tolist(),
        "s": _run_lengths(row.sampled.astype(int)),
        "t": _run_lengths(row.turn),
        "l": np.round(-100 * logprobs).astype(int).tolist(),
    }


def _run_lengths(values: np.ndarray) -> list[int]:
    """[value, length, value, length, ...]"""
    if not values.size:
        return []
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    lengths = np.diff(np.r_[starts, values.size])
    return np.stack([values[starts], lengths], 1).reshape(-1).tolist()


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(float(value), digits)
