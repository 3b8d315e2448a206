"""The update: from rows to new weights, as one compiled program with donated buffers.

There are two losses: the clipped surrogate of reinforcement learning (`make_update`) and the negative
log-likelihood of the warm start (`make_supervised_update`). Both are means over the loss tokens of the whole
mini-batch, computed in micro-batches whose sums are divided by the mini-batch's count, so that the size of
the micro-batches changes only the rounding.

A loss or gradient that is not finite never changes the weights: the program keeps the old state and reports
it (`actor/skipped`); the caller decides whether to stop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mapo_jax.algorithm import objective
from mapo_jax.config import AlgorithmConfig
from mapo_jax.learning.batch import Batch, microbatch_rows
from mapo_jax.learning.optimizer import Optimizer
from mapo_jax.learning.train_state import TrainState, state_shardings, trained_and_frozen
from mapo_jax.model.attention import causal_attention
from mapo_jax.model.head import token_logprobs
from mapo_jax.model.qwen import (
    RUNNING_SUM,
    Params,
    QwenConfig,
    RowAttention,
    hidden_states,
    parameter_shapes,
    sums_in_place,
)
from mapo_jax.model.sharding import batch_sharding, row_shards

Scalar = Float[Array, ""]
Metrics = dict[str, Scalar]
Loss = tuple[Scalar, Metrics]


@dataclass(frozen=True)
class Scoring:
    """How the trainer computes log-probabilities: constants of a run, which are compiled in."""

    config: QwenConfig
    temperature: float = 1.0  # of the sampler, so that both compute the distribution sampled from
    vocabulary_size: int | None = None  # ids from here on have probability 0, as in the sampler
    dtype: str = "float32"  # compute dtype
    remat: str = "none"  # a name in `model.qwen.REMAT`
    loss_tokens: int | None = None  # most loss tokens that a row can have; None: as many as its length
    attention: RowAttention = causal_attention  # of whole rows
    mesh: Mesh | None = None  # of weights and rows


def _loss_columns(mask: Bool[Array, "B L"], limit: int | None) -> Int[Array, "B N"]:
    """Columns of each row's loss tokens, in order, then others up to N = min(limit, L).

    Only these go through the head: two thirds of a dialogue's tokens are not the policy's, and a head over
    the vocabulary is expensive.
    """
    length = mask.shape[1]
    order = jnp.argsort(~mask, axis=1, stable=True)
    return order[:, : min(limit or length, length)]


def _at(columns: Int[Array, "B N"], array: Array) -> Array:
    return jnp.take_along_axis(array, columns, axis=1)


def _score(
    params: Params,
    scoring: Scoring,
    batch: Batch | SupervisedBatch,
    columns: Int[Array, "B N"],
    wanted: Bool[Array, "B N"],
    segments: Int[Array, "B L"] | None = None,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Log-probability of the tokens at `columns`, each given those before it, and the entropies.

    Valid only where `wanted` is true; finite elsewhere.
    """
    forward = {"dtype": jnp.dtype(scoring.dtype), "remat": scoring.remat, "attention": scoring.attention}
    hidden = hidden_states(
        params, scoring.config, batch.tokens, batch.positions, segments, mesh=scoring.mesh, **forward
    )
    before = jnp.maximum(columns - 1, 0)  # a token is predicted at the position before it
    states = jnp.take_along_axis(hidden, before[:, :, None], axis=1)
    sampling = {"temperature": scoring.temperature, "vocabulary_size": scoring.vocabulary_size}
    targets = _at(columns, batch.tokens)
    return token_logprobs(params, scoring.config, states, targets, wanted, mesh=scoring.mesh, **sampling)


# --- The two losses: of a micro-batch, divided by the counts of the whole mini-batch. ---


def _policy_loss(
    params: Params,
    reference: Params | None,
    batch: Batch,
    totals: objective.Denominator,
    scoring: Scoring,
    algorithm: AlgorithmConfig,
    constant_length: int | None,
) -> Loss:
    columns = _loss_columns(batch.mask, scoring.loss_tokens)
    mask = _at(columns, batch.mask)
    given = (batch.old_logprobs, batch.sampler_logprobs, batch.advantages)
    old, sampled, advantages = (_at(columns, array) for array in given)
    logprobs, entropy = _score(params, scoring, batch, columns, mask)
    if not algorithm.entropy_coefficient:
        entropy = jax.lax.stop_gradient(entropy)  # only reported: no backward pass for it
    reference_logprobs = None
    if algorithm.kl_coefficient:
        plain = replace(scoring, config=replace(scoring.config, lora=None))
        reference_logprobs = jax.lax.stop_gradient(_score(reference, plain, batch, columns, mask)[0])
    weights = None
    if algorithm.old_logprobs == "trainer":
        weights = objective.truncated_importance_weights(old, sampled, mask, algorithm.importance_cap)
    loss, metrics = objective.policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        weights=weights,
        reference_logprobs=reference_logprobs,
        entropy=entropy,
        denominator=totals,
        constant_length=constant_length,
        **objective.objective_options(algorithm),
    )
    metrics = {f"actor/{name}": value for name, value in metrics.items()}
    difference = jnp.where(mask, jnp.abs(jax.lax.stop_gradient(logprobs) - sampled), 0.0)
    metrics["sampler/logprob_diff_mean"] = jnp.sum(difference) / totals.tokens
    metrics["sampler/logprob_diff_max"] = jnp.max(difference)
    return _refuse_lost_tokens(loss, mask, batch.mask), metrics


def _refuse_lost_tokens(loss, kept, mask):
    # A row with more loss tokens than `loss_tokens` must not lose some of them unnoticed.
    return jnp.where(jnp.sum(kept) == jnp.sum(mask), loss, jnp.nan)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SupervisedBatch:
    """Rows of given texts, several in a row if packed. Every array is `[B, L]`."""

    tokens: Int[Array, "B L"]
    positions: Int[Array, "B L"]  # index in the token's text
    segments: Int[Array, "B L"]  # index of the text in the row; a token attends to its own text only
    mask: Bool[Array, "B L"]  # loss tokens


def _supervised_mask(batch: SupervisedBatch) -> Bool[Array, "B L"]:
    # The first token of a text has no token before it to predict it from.
    before = jnp.pad(batch.segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return batch.mask & (batch.segments == before) & (jnp.arange(batch.mask.shape[1]) > 0)


def _supervised_loss(params: Params, batch: SupervisedBatch, total: Scalar, scoring: Scoring) -> Loss:
    wanted = _supervised_mask(batch)
    columns = _loss_columns(wanted, scoring.loss_tokens)
    mask = _at(columns, wanted)
    logprobs, _ = _score(params, scoring, batch, columns, mask, batch.segments)
    loss = -jnp.sum(jnp.where(mask, logprobs, 0.0)) / total
    return _refuse_lost_tokens(loss, mask, wanted), {}


# --- The update. ---


def _microbatches(batch: Any, rows: int) -> Any:
    """Cuts `[B, ...]` into `[M, rows, ...]`.

    Micro-batch m gets rows m, m + M, ...: each device has a block of rows, so each has its share of every
    micro-batch and nothing is transferred.
    """
    return jax.tree.map(lambda array: jnp.swapaxes(array.reshape(rows, -1, *array.shape[1:]), 0, 1), batch)


def _gradient(
    loss: Callable[[Params, Any], Loss], params: Params, batch: Any, tokens: int, scoring: Scoring
) -> tuple[Scalar, Metrics, Params]:
    """Loss, metrics and gradient of a mini-batch, at most `tokens` tokens of each device at a time."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    size, length = batch.tokens.shape
    rows = microbatch_rows(size, length, tokens, row_shards(scoring.mesh))
    in_place = sums_in_place(scoring.remat, scoring.config)
    if rows == size and not in_place:
        (value, metrics), gradient = value_and_grad(params, batch)
        return value, metrics, gradient

    def add(total: Params, microbatch: Any):
        given = params | {RUNNING_SUM: total["layers"]} if in_place else params
        (value, metrics), gradient = value_and_grad(given, microbatch)
        summed = {"layers": gradient.pop(RUNNING_SUM)} if in_place else {}
        return jax.tree.map(jnp.add, total, gradient) | summed, (value, metrics)

    zeros = jax.tree.map(jnp.zeros_like, params)
    gradient, (values, metrics) = jax.lax.scan(add, zeros, _microbatches(batch, rows))
    return jnp.sum(values), objective.combine_metrics(metrics), gradient


def _apply(
    state: TrainState, optimizer: Optimizer, loss: Scalar, gradient: Params, tokens: Scalar, shardings: Any
) -> tuple[TrainState, Metrics]:
    """Applies a gradient; the only function that changes weights.

    The state is kept if the loss or the gradient's norm is not finite, or if there is no loss token (weight
    decay and old moments would change the weights without data).
    """
    if shardings is not None:  # the compiler would choose others: an embedding's without the vocabulary axis
        gradient = jax.lax.with_sharding_constraint(gradient, shardings)
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    accept = finite & (tokens > 0)
    updates, opt_state = optimizer.transform.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(accept, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "lr": optimizer.schedule(state.step),
        "loss_tokens": tokens,
        "skipped": (~finite).astype(jnp.float32),
    }
    return replace(state, params=params, opt_state=opt_state, step=state.step + accept), metrics


Update = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def make_update(
    scoring: Scoring,
    optimizer: Optimizer,
    algorithm: AlgorithmConfig,
    *,
    microbatch_tokens: int = 0,
    constant_length: int | None = None,
    shardings: Any = None,
) -> Update:
    """The compiled update of reinforcement learning: `(state, batch) -> (state, metrics)`; donates the state.

    With `algorithm.kl_coefficient` the reference's log-probabilities are computed in the same program as the
    policy's: nothing is stored between programs, and with one pass over the data the cost is the same.

    Args:
      microbatch_tokens: most tokens of a device per forward and backward pass (`batch.microbatch_rows`).
      constant_length: of the aggregation constant-length: the most loss tokens that a row can have.
      shardings: `param_shardings`, if there is a mesh.

    Returns:
      The update. Its metrics stay on the device (`fetch` transfers those of a step together): `actor/loss`,
      `actor/pg_loss`, `actor/entropy`, `actor/clip_fraction`, `actor/approx_kl`, `actor/grad_norm` (before
      clipping), `actor/lr`, `actor/loss_tokens`, `actor/skipped` (1 if the loss or gradient was not finite
      and the state was kept), the objective's others, and `sampler/logprob_diff_mean` and `_max`: between the
      sampler's and the trainer's log-probabilities, of the weights before this update.
    """
    trained = None if shardings is None else trained_and_frozen(shardings)[0]

    def update(state: TrainState, batch: Batch):
        totals = objective.loss_denominator(
            batch.mask, aggregation=algorithm.aggregation, constant_length=constant_length
        )
        reference = state.reference if state.base is None else state.base

        def loss(params: Params, microbatch: Batch):
            weights = replace(state, params=params).weights
            return _policy_loss(weights, reference, microbatch, totals, scoring, algorithm, constant_length)

        value, metrics, gradient = _gradient(loss, state.params, batch, microbatch_tokens, scoring)
        tokens = jnp.sum(batch.mask, dtype=jnp.float32)
        state, applied = _apply(state, optimizer, value, gradient, tokens, trained)
        return state, metrics | {f"actor/{name}": number for name, number in applied.items()}

    return _compile(update, scoring, optimizer, shardings, reference=algorithm.kl_coefficient > 0)


def _compile(update: Update, scoring: Scoring, optimizer: Optimizer, shardings, reference: bool) -> Update:
    # With a mesh the new state must have the old one's shardings: else the next call compiles again.
    state = state_shardings(optimizer, parameter_shapes(scoring.config), shardings, reference)
    return jax.jit(update, donate_argnums=0, out_shardings=state and (state, None))


def make_supervised_update(scoring: Scoring, optimizer: Optimizer, *, shardings: Any = None) -> Update:
    """The compiled update of the warm start: token-mean negative log-likelihood; donates the state.

    Args:
      shardings: as in `make_update`.

    Returns:
      `(state, SupervisedBatch) -> (state, metrics)` with `loss`, `grad_norm`, `lr`, `loss_tokens`, `skipped`.
    """

    def supervised_update(state: TrainState, batch: SupervisedBatch):
        tokens = jnp.sum(_supervised_mask(batch), dtype=jnp.float32)
        total = jnp.maximum(tokens, 1.0)

        def loss(params: Params, microbatch: SupervisedBatch):
            return _supervised_loss(params, microbatch, total, scoring)

        value, _, gradient = _gradient(loss, state.params, batch, 0, scoring)
        return _apply(state, optimizer, value, gradient, tokens, shardings)

    return _compile(supervised_update, scoring, optimizer, shardings, reference=False)


def make_scorer(scoring: Scoring, *, microbatch_tokens: int = 0) -> Callable[[Params, Batch], Array]:
    """The trainer's log-probabilities of a batch's loss tokens, compiled: `(params, batch) -> [B, L]`.

    For `old_logprobs: trainer`, on the weights before a step's first update:
    `dataclasses.replace(batch, old_logprobs=scorer(state.weights, batch))`. 0 outside the mask.
    """

    def score(params: Params, batch: Batch) -> Float[Array, "B L"]:
        columns = _loss_columns(batch.mask, scoring.loss_tokens)
        mask = _at(columns, batch.mask)
        logprobs, _ = _score(params, scoring, batch, columns, mask)
        rows = jnp.arange(batch.mask.shape[0])[:, None]
        logprobs = jnp.where(mask, logprobs, 0.0)
        return jnp.zeros(batch.mask.shape, jnp.float32).at[rows, columns].set(logprobs)

    def scorer(params: Params, batch: Batch) -> Float[Array, "B L"]:
        size, length = batch.mask.shape
        rows = microbatch_rows(size, length, microbatch_tokens, row_shards(scoring.mesh))
        if rows == size:
            return score(params, batch)
        scores = jax.lax.map(functools.partial(score, params), _microbatches(batch, rows))
        return jnp.swapaxes(scores, 0, 1).reshape(batch.mask.shape)

    return jax.jit(scorer)


def place(batch: Any, mesh: Mesh | None) -> Any:
    """Puts a batch's rows on the mesh; without a mesh, returns the batch.

    With several processes each has the whole batch and puts on its devices the rows that belong there.
    """
    if mesh is None:
        return batch
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda array: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]), batch
    )


def fetch(updates: Sequence[Metrics]) -> dict[str, float]:
    """One step's metrics from those of its updates, in one transfer from the device.

    Means over the updates, except: of `..._max` the largest, of `skipped` the sum, of `lr` the last, and of
    `sampler/...` the first, whose weights are those that sampled.
    """
    fetched = jax.device_get(list(updates))
    metrics = {}
    for name in fetched[0]:
        values = [float(update[name]) for update in fetched]
        if name.startswith("sampler/"):
            metrics[name] = values[0]
        elif name.endswith("_max"):
            metrics[name] = max(values)
        elif name.endswith("skipped"):
            metrics[name] = sum(values)
        elif name.endswith("lr"):
            metrics[name] = values[-1]
        else:
            metrics[name] = float(np.mean(values))
    return metrics
