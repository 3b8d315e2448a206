"""From dialogues to arrays: cells `[S, R, T]` for the algorithm, rows `[B, L]` for the update.

Plain numpy on the host. Only `scenario_order` is random, with a seed from its arguments. So a saved step,
read back from its dialogues, gives the same batch bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mapo_jax.rollout.collect import Dialogue

ONE_LENGTH = 512  # most tokens of rows that are all padded alike
_SHUFFLE_STREAM = 0x5EED  # keeps the shuffle's numbers apart from other uses of the same seed


@dataclass(frozen=True)
class Cells:
    """A step's dialogues as the algorithm's arrays."""

    positions: Float[np.ndarray, "S R T+1 3"]  # (C, A, P) at the start and after each turn; then constant
    valid: Bool[np.ndarray, "S R T"]  # the turn exists, in a usable dialogue
    scored: Bool[np.ndarray, "S R T"]  # and has a reward


def make_cells(
    dialogues: Sequence[Sequence[Dialogue]], max_turns: int, *, max_failed_share: float = 0.5
) -> Cells:
    """Lays dialogues out as `[S, R, T]`.

    A dialogue that ended in error, has no scored turn, or has a larger share of unscored turns than
    `max_failed_share` is left out: none of its turns is valid.

    Args:
      dialogues: [S][R], every scenario with the same number of rollouts.
      max_turns: T.

    Raises:
      ValueError: ragged dialogues, or one that is longer than `max_turns`.
    """
    scenarios, rollouts = len(dialogues), len(dialogues[0])
    if any(len(group) != rollouts for group in dialogues):
        raise ValueError("every scenario must have the same number of rollouts")
    positions = np.zeros((scenarios, rollouts, max_turns + 1, 3), np.float32)
    valid = np.zeros((scenarios, rollouts, max_turns), bool)
    scored = np.zeros_like(valid)
    for s, group in enumerate(dialogues):
        for r, dialogue in enumerate(group):
            turns = dialogue.state.turns
            if len(turns) > max_turns:
                raise ValueError(f"a dialogue has {len(turns)} turns; max_turns is {max_turns}")
            path = dialogue.state.positions
            positions[s, r, : len(path)] = path
            positions[s, r, len(path) :] = path[-1]
            if dialogue.usable(max_failed_share):
                valid[s, r, : len(turns)] = True
                scored[s, r, : len(turns)] = [turn.scored for turn in turns]
    return Cells(positions, valid, scored)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows to train on. Every array is `[B, L]`; entry i of a row belongs to its token i.

    Log-probabilities are of the distribution sampled from. Entries outside `mask` are 0.
    """

    tokens: Int[Array, "B L"]  # right-padded with 0
    positions: Int[Array, "B L"]  # index in the row
    mask: Bool[Array, "B L"]  # loss tokens: sampled by the policy, in a scored turn
    sampler_logprobs: Float[Array, "B L"]  # by the sampler
    old_logprobs: Float[Array, "B L"]  # denominator of the ratio: the sampler's, or the trainer's
    advantages: Float[Array, "B L"]  # of the token's turn


def make_batch(
    dialogues: Sequence[Sequence[Dialogue]],
    advantages: Float[np.ndarray, "S R T"],
    scored: Bool[np.ndarray, "S R T"],
    length: int,
    *,
    rows_per_dialogue: int = 1,
) -> Batch:
    """Rows of a step's dialogues, scenario by scenario: B = S R `rows_per_dialogue`.

    Args:
      dialogues: [S][R].
      advantages: of each turn; anything (NaN included) where not `scored`.
      scored: as of `make_cells`; tokens of other turns are not in the loss.
      length: L, at least the longest row's length (see `row_length`).
      rows_per_dialogue: 1 if a dialogue is one growing row (`history: append`); T if each turn has its own
        (`history: per_turn`), then rows that a shorter dialogue does not have are empty.

    Raises:
      ValueError: more or longer rows than there is room for, or a sampled token without anything before it.
    """
    flat = [dialogue for group in dialogues for dialogue in group]
    turns = np.shape(scored)[-1]
    scored = np.reshape(np.asarray(scored), (len(flat), turns))
    advantages = np.where(scored, np.reshape(np.asarray(advantages, np.float32), (len(flat), turns)), 0.0)
    shape = (len(flat) * rows_per_dialogue, length)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    logprobs, credit = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for d, dialogue in enumerate(flat):
        if len(dialogue.rows) > rows_per_dialogue:
            raise ValueError(
                f"a dialogue has {len(dialogue.rows)} rows; there is room for {rows_per_dialogue}"
            )
        for b, row in enumerate(dialogue.rows, start=d * rows_per_dialogue):
            size, turn = len(row.ids), np.asarray(row.turn, np.int32)
            if size > length:
                raise ValueError(f"a row of {size} tokens does not fit the length {length}")
            learned = np.asarray(row.sampled, bool) & (turn >= 0)
            learned[learned] = scored[d, turn[learned]]
            if size and learned[0]:
                raise ValueError("a row's first token is marked as sampled, but no token is before it")
            tokens[b, :size] = row.ids
            mask[b, :size] = learned
            logprobs[b, :size][learned] = np.asarray(row.logprob, np.float32)[learned]
            credit[b, :size][learned] = advantages[d, turn[learned]]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Batch(tokens, positions, mask, logprobs, logprobs, credit)


def row_lengths(max_tokens: int) -> tuple[int, ...]:
    """The few lengths that rows are padded to, ascending; the update is compiled once for each that occurs.

    Numbers of two significant bits (2^k and 3 2^(k-1)) from half of `max_tokens` on, and `max_tokens`
    itself: at most three. A longest row of more than half of `max_tokens` is padded by less than half of its
    length; a shorter one to about that half. Up to ONE_LENGTH only `max_tokens` itself: there another program
    costs more than the padding.
    """
    if max_tokens <= ONE_LENGTH:
        return (max_tokens,)
    lengths = {max_tokens}
    power = 1
    while power < max_tokens:
        lengths |= {size for size in (power, power * 3 // 2) if max_tokens / 2 <= size < max_tokens}
        power *= 2
    return tuple(sorted(lengths))


def row_length(dialogues: Sequence[Sequence[Dialogue]], lengths: Sequence[int]) -> int:
    """The smallest of `lengths` that holds every row of a step.

    Raises:
      ValueError: none does.
    """
    longest = max(len(row.ids) for group in dialogues for dialogue in group for row in dialogue.rows)
    for length in lengths:
        if longest <= length:
            return length
    raise ValueError(f"a row has {longest} tokens; the longest length is {lengths[-1]}")


def microbatch_rows(total: int, length: int, tokens: int, shards: int = 1) -> int:
    """Rows of a micro-batch: the largest equal share of a mini-batch within a budget of tokens.

    Args:
      total: rows of the mini-batch.
      length: of a row, in tokens.
      tokens: most tokens for each device, which gets at least one row; 0: no limit.
      shards: devices that rows are spread over.

    Returns:
      A divisor of `total` and a multiple of `shards`; `total` if that does not divide by the shards at all.
    """
    if not tokens or total % shards:
        return total
    rows = total // shards
    return shards * max(n for n in range(1, rows + 1) if rows % n == 0 and n * length <= max(tokens, length))


def scenario_order(
    seed: int, step: int, epoch: int, scenarios: int, minibatch_scenarios: int
) -> Int[np.ndarray, "mini scenarios"]:
    """The scenarios of each mini-batch of one pass: a shuffle seeded by (seed, step, epoch).

    Raises:
      ValueError: the mini-batch does not divide the scenarios.
    """
    if scenarios % minibatch_scenarios:
        raise ValueError(f"{scenarios} scenarios do not divide into mini-batches of {minibatch_scenarios}")
    generator = np.random.default_rng((seed, step, epoch, _SHUFFLE_STREAM))
    return generator.permutation(scenarios).reshape(-1, minibatch_scenarios)


def take_scenarios(batch: Batch, chosen: Int[np.ndarray, " scenarios"], rows_per_scenario: int) -> Batch:
    """The rows of whole scenarios, in the given order, as numpy arrays; R or R T rows each."""
    rows = (np.asarray(chosen)[:, None] * rows_per_scenario + np.arange(rows_per_scenario)).reshape(-1)
    return jax.tree.map(lambda array: np.asarray(array)[rows], batch)


def minibatches(
    batch: Batch, *, seed: int, step: int, epochs: int, scenarios: int, minibatch_scenarios: int
) -> Iterator[Batch]:
    """The mini-batches of a step's updates: every epoch shuffles all rows, by whole scenarios.

    Args:
      batch: all rows of the step, scenario by scenario.
      seed, step: fix the shuffle of each epoch.
      scenarios: S.
      minibatch_scenarios: scenarios of a mini-batch; divides S.
    """
    rows_per_scenario = len(batch.tokens) // scenarios
    for epoch in range(epochs):
        for chosen in scenario_order(seed, step, epoch, scenarios, minibatch_scenarios):
            yield take_scenarios(batch, chosen, rows_per_scenario)
