"""Whether two periods' conversations differ: figures of each conversation, and permutation tests.

The unit is the conversation: its turns are not independent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PERMUTATIONS = 10_000
FEWEST = 5  # conversations of a period with a figure; with fewer there is no test
OPENING_WORDS = 3
_CELLS = 2_000_000  # permutations x conversations in memory at once: 16 MB
_CANNOT = r"(can't|cannot|can not|won't|am unable to|'m unable to|am not able to)"
_REFUSAL = re.compile(
    rf"\b(i('m| am) (really |very )?sorry,? but i {_CANNOT}"
    rf"|i {_CANNOT} (help|assist|talk|discuss|answer|do)"
    r"|as an? (ai|artificial intelligence|language model))\b"
    r"|作为(一个)?(人工智能|AI|语言模型)|我(无法|不能)(帮助|回答|提供)",
    re.IGNORECASE,
)


def figures(
    messages: Sequence[Mapping[str, str]],
    levels: Sequence[Sequence[int] | None] = (),
    ratings: Sequence[int] = (),
    *,
    level_names: Sequence[str] = (),
) -> dict[str, float]:
    """The figures of one conversation; those without data are absent.

    Args:
      messages: role and content as text.
      levels: the judge's, by turn; None where it failed.
      ratings: -1 or 1, of rated replies.
      level_names: of the levels.
    """
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    found = {"turns": float(len(replies))}
    if replies:
        found["words per reply"] = float(np.mean([len(reply.split()) for reply in replies]))
        found["refusals"] = float(np.mean([bool(_REFUSAL.search(reply)) for reply in replies]))
    if len(replies) > 1:
        openings = [tuple(reply.lower().split()[:OPENING_WORDS]) for reply in replies]
        repeated = [opening in openings[:index] for index, opening in enumerate(openings)][1:]
        found["repeated openings"] = float(np.mean(repeated))
    judged = [turn for turn in levels if turn is not None]
    if judged:
        found |= dict(zip(level_names, np.mean(judged, axis=0).tolist(), strict=True))
    if ratings:
        found["feedback"] = float(np.mean(ratings))
    return found


def compare(
    before: Sequence[Mapping[str, float]],
    after: Sequence[Mapping[str, float]],
    *,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> list[dict[str, Any]]:
    """The figures of two periods beside each other.

    Returns:
      For each figure: `name`, `counts` and `means` of both periods, `difference` (after - before), `effect`
      (the difference in standard deviations of all conversations), `p` of the permutation test of the
      difference, two-sided, and `p_holm`, corrected for all figures that were tested (Holm 1979). The last
      three are None with fewer than FEWEST conversations.
    """
    names = list(dict.fromkeys(name for conversation in (*before, *after) for name in conversation))
    rows = []
    for name in names:
        x, y = (np.array([one[name] for one in period if name in one]) for period in (before, after))
        row: dict[str, Any] = {
            "name": name,
            "counts": [len(x), len(y)],
            "means": [float(period.mean()) if len(period) else None for period in (x, y)],
            "difference": float(y.mean() - x.mean()) if len(x) and len(y) else None,
            "effect": None,
            "p": None,
            "p_holm": None,
        }
        if min(len(x), len(y)) >= FEWEST:
            deviation = float(np.concatenate([x, y]).std())
            row["effect"] = row["difference"] / deviation if deviation > 0 else 0.0
            row["p"] = permutation_test(x, y, seed=seed, permutations=permutations)
        rows.append(row)
    tested = sorted((row for row in rows if row["p"] is not None), key=lambda row: row["p"])
    corrected = 0.0
    for index, row in enumerate(tested):
        corrected = max(corrected, min(1.0, row["p"] * (len(tested) - index)))
        row["p_holm"] = corrected
    return rows


def permutation_test(
    x: np.ndarray, y: np.ndarray, *, seed: int = 0, permutations: int = PERMUTATIONS
) -> float:
    """Two-sided p of the difference of two means: how often a random split differs at least as much.

    The observed split counts as one, so that p is never 0 (Phipson and Smyth 2010).
    """
    values, size = np.concatenate([x, y]), len(y)
    centred = values - values.mean()
    observed = abs(centred[len(x) :].sum())
    rng, extreme, left = np.random.default_rng(seed), 0, permutations
    while left:
        count = min(left, max(1, _CELLS // len(values)))
        chosen = np.argpartition(rng.random((count, len(values))), size - 1, axis=1)[:, :size]
        extreme += int((np.abs(centred[chosen].sum(axis=1)) >= observed - 1e-9).sum())
        left -= count
    return (1 + extreme) / (1 + permutations)
