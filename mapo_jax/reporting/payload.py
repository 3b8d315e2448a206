"""The dialogues, packed for the page: gzip in base64, one piece per step, unpacked by the browser on demand.

The page has a size limit. The index of all dialogues goes in first, then the texts of whole steps, then their
tokens, each in the order of `by_importance`. `Packed` counts what does not fit.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from mapo_jax.environment.dialogue import Turn
from mapo_jax.environment.scenario import Scenario
from mapo_jax.reporting.credit import Credit
from mapo_jax.reporting.dialogues import SavedBatch, SavedDialogue, TokenRow
from mapo_jax.reporting.folder import TOKENIZER_FILE, Progress, SavedRun, no_progress

PAYLOAD_BYTES = 13_000_000  # of all pieces together, in base64
INDEX_BYTES = 200  # per dialogue, an upper bound
LEVEL = 5  # of the compression; 6 takes 1.5 times as long for a few per cent


@dataclass(frozen=True)
class Packed:
    """The content of the page's payload."""

    index: str  # base64 of gzipped JSON
    pieces: Mapping[str, str]  # key -> the same
    dialogues: int
    without_text: int  # dialogues that are not in the page
    without_tokens: int  # dialogues in the page without their tokens

    @property
    def size(self) -> int:
        """Bytes in the page."""
        return len(self.index) + sum(map(len, self.pieces.values()))


@dataclass(frozen=True)
class Group:
    """A batch with its credit, and the number of its run."""

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
    progress: Progress = no_progress,
) -> Packed:
    """Packs the dialogues of all runs.

    Args:
      runs: in the order of their numbers.
      groups: all batches of the runs.
      limit: most bytes.
      progress: called with the name of each piece.
    """
    ordered = by_importance(groups)
    writers = [TokenWriter(run.folder) for run in runs]
    pieces: dict[str, str] = {}
    size = INDEX_BYTES * sum(len(g.batch.dialogues) for g in groups)

    def fits(key: str, piece: str) -> bool:
        nonlocal size
        if size + len(piece) > limit:
            return False
        pieces[key] = piece
        size += len(piece)
        return True

    kept: list[Group] = []
    without_tokens = 0
    # Compression releases the interpreter's lock, so two threads help.
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda g: squeeze(list(map(dialogue_json, g.batch.dialogues, g.credits))), ordered)
        for group, piece in zip(ordered, texts, strict=True):
            progress(f"packing {group.key}")
            if fits(group.key, piece):
                kept.append(group)
        tokens = pool.map(lambda group: squeeze(writers[group.run].pack(group.batch.dialogues)), kept)
        for group, piece in zip(kept, tokens, strict=True):
            progress(f"packing the tokens of {group.key}")
            if not fits(f"{group.key}.tokens", piece):
                without_tokens += len(group.batch.dialogues)
    inside = sum(len(g.batch.dialogues) for g in kept)
    return Packed(
        index=squeeze(index_json(runs, [g for g in groups if g.key in pieces])),
        pieces=pieces,
        dialogues=inside,
        without_text=sum(len(g.batch.dialogues) for g in groups) - inside,
        without_tokens=without_tokens,
    )


def by_importance(groups: Sequence[Group]) -> list[Group]:
    """Per run: last and first evaluation, last and first step, other evaluations, other steps evenly spaced.

    Several runs take turns.
    """
    ranked: list[tuple[int, Group]] = []
    for number in sorted({g.run for g in groups}):
        batches = sorted((g for g in groups if g.run == number), key=lambda g: g.batch.step)
        evaluations = [g for g in batches if g.batch.validation]
        steps = [g for g in batches if not g.batch.validation]
        ends = [*evaluations[-1:], *evaluations[:1], *steps[-1:], *steps[:1], *evaluations[1:-1]]
        ranked += enumerate({g.key: g for g in (*ends, *_spread(steps))}.values())
    return [group for _, group in sorted(ranked, key=lambda entry: entry[0])]


def _spread(groups: Sequence[Group]) -> Iterable[Group]:
    """The middle one, then the middles of the halves, and so on."""
    queue = [(0, len(groups))]
    while queue:
        low, high = queue.pop(0)
        if low < high:
            middle = (low + high) // 2
            yield groups[middle]
            queue += [(low, middle), (middle + 1, high)]


def squeeze(content: Any) -> str:
    """Base64 of gzipped JSON. The bytes depend on the content only: the header has no time and no name."""
    try:
        text = orjson.dumps(content)
    except TypeError:  # a lone surrogate, which orjson refuses
        text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, 31)  # 31: gzip header
    return base64.b64encode(packer.compress(text) + packer.flush()).decode()


def index_json(runs: Sequence[SavedRun], groups: Sequence[Group]) -> dict[str, Any]:
    """What the list of dialogues shows, and the cards."""
    # JSON of a card -> its number and content; two runs may have different cards with the same id.
    cards: dict[str, tuple[int, dict[str, str]]] = {}
    rows = []
    for group in groups:
        for place, (dialogue, credit) in enumerate(zip(group.batch.dialogues, group.credits, strict=True)):
            card = card_json(dialogue.state.scenario)
            number, _ = cards.setdefault(json.dumps(card, sort_keys=True), (len(cards), card))
            key = [group.run, int(group.batch.validation), group.batch.step, *dialogue.place, number]
            unscored = sum(not turn.scored for turn in dialogue.turns)
            lengths = [len(dialogue.turns), unscored, sum(turn.truncated for turn in dialogue.turns)]
            scores = [rounded(credit.first_return, 3), rounded(dialogue.epm_q, 1)]
            rows.append([*key, dialogue.outcome, *lengths, failure_kinds(dialogue), *scores, place])
    named = [{"name": run.name, "estimator": run.algorithm.estimator} for run in runs]
    return {"runs": named, "cards": [card for _, card in cards.values()], "rows": rows}


def failure_kinds(dialogue: SavedDialogue) -> list[str]:
    """The kinds of failures in it: of `timeout: no answer in 60 s` the first word."""
    failures = [turn.failure for turn in dialogue.turns if not turn.scored] + [dialogue.state.failure]
    return sorted({failure.split(":")[0][:40] for failure in failures if failure})


def card_json(card: Scenario) -> dict[str, str]:
    """The fields of the card that the page shows."""
    person = card.person
    return {
        "id": card.id,
        **{key: getattr(card, key) for key in ("domain", "split", "topic", "hope")},
        "dislike": "; ".join(card.dislike),
        **{"name": person.name, "age": str(person.age), "social": person.social, "inner": person.inner},
        "situation": card.situation,
        "trigger": card.story.trigger,
    }


def dialogue_json(dialogue: SavedDialogue, credit: Credit) -> dict[str, Any]:
    """A dialogue without its tokens. Names are short because there are thousands of turns."""
    none = (None,) * len(dialogue.turns)
    advantages = (level or none for level in (credit.turn_level, credit.batch_level, credit.advantages))
    columns = zip(
        dialogue.turns, dialogue.distances[1:], credit.rewards, credit.returns, *advantages, strict=True
    )
    return {
        "start": dialogue.state.scenario.start_position,
        "distance": rounded(dialogue.distances[0], 2),
        "rule": dialogue.state.rule,
        "failure": dialogue.state.failure,
        "seed": dialogue.state.seed,
        "turns": [
            _turn_json(turn) | {"d": rounded(distance, 2), "c": [rounded(value, 3) for value in credit]}
            for turn, distance, *credit in columns
        ],
    }


def _turn_json(turn: Turn) -> dict[str, Any]:
    judgement, action, reading = turn.judgement, turn.action, turn.reading or {}
    return {
        "u": turn.user,
        "r": turn.reply,
        "p": [rounded(axis, 2) for axis in turn.position],
        "l": turn.levels,
        "e": judgement.evidence if judgement else (),
        "w": judgement.reasons if judgement else (),
        "f": turn.failure,
        "k": reading.get("kind"),
        "n": [(name["what"], name["right"]) for name in reading.get("named") or ()],
        "a": action and " ".join(filter(None, (action.kind, action.target))),
        "g": action.guidance if action else "",
        "x": int(turn.truncated),
    }


class TokenWriter:
    """Converts token rows to texts with mask and log-probability; without a tokenizer, to the ids."""

    def __init__(self, folder: Path) -> None:
        self.text = cache(self._text)
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception:  # the library raises its bare base class for any fault of the file
            self._tokenizer = None

    def _text(self, token: int) -> str:
        """The text of a token; its name in the vocabulary if it is only part of a character."""
        name = self._tokenizer.id_to_token(token) if self._tokenizer is not None and token >= 0 else None
        if name is None:
            return f"[{token}]"
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        return name if "\ufffd" in text or not text else text

    def pack(self, dialogues: Sequence[SavedDialogue]) -> dict[str, Any]:
        """Rows of a batch.

        `words` are the distinct texts. Per row: indices into them, run lengths of the mask and of the turns,
        and negative log-probabilities of the sampled tokens in hundredths of nats.
        """
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
    """[value, length, value, length, ...]."""
    return [number for value, run in groupby(values.tolist()) for number in (value, len(list(run)))]


def rounded(value: float | None, digits: int) -> float | None:
    """The value for JSON; None stays None."""
    return None if value is None else round(float(value), digits)
