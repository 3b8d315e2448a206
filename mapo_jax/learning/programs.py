"""The compiled programs of a run, from its configuration and the model's shape.

`train` runs them, and `tpu.compile` compiles them for a TPU slice without hardware.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mapo_jax.config import Config
from mapo_jax.errors import UserError
from mapo_jax.learning.batch import Batch, row_lengths
from mapo_jax.learning.optimizer import Optimizer, make_optimizer
from mapo_jax.learning.update import Scoring, Update, make_scorer, make_update
from mapo_jax.model.backends import check_remat, row_attention
from mapo_jax.model.qwen import QwenConfig, parameter_shapes
from mapo_jax.model.sharding import batch_sharding, param_shardings, row_shards


class TrainingPrograms(NamedTuple):
    """The programs that update the weights and score with them."""

    optimizer: Optimizer
    update: Update
    scorer: Callable[..., Any]  # the trainer's log-probabilities


def make_programs(config: Config, model: QwenConfig, vocabulary_size: int, mesh: Mesh) -> TrainingPrograms:
    """The programs of a run.

    Args:
      vocabulary_size: ids from here on are no tokens.

    Raises:
      UserError: the mesh does not fit the model or the mini-batch, or the attention does not support them.
    """
    rollout, training = config.rollout, config.training
    check_rows(config, mesh)
    check_remat(config.model.remat, mesh)
    updates = training.steps * training.epochs * (rollout.scenarios // training.minibatch_scenarios)
    optimizer = make_optimizer(config.optimizer, updates)
    scoring = Scoring(
        model,
        temperature=rollout.temperature,
        vocabulary_size=vocabulary_size,
        dtype=config.model.dtype,
        remat=config.model.remat,
        loss_tokens=loss_tokens(config),
        attention=row_attention(config.model.attention, mesh, model, config.model.dtype),
        mesh=mesh,
    )
    shardings = param_shardings(parameter_shapes(model), mesh)
    sizes = {"microbatch_tokens": training.microbatch_tokens, "constant_length": loss_tokens(config)}
    update = make_update(scoring, optimizer, config.algorithm, shardings=shardings, **sizes)
    scorer = make_scorer(scoring, microbatch_tokens=training.microbatch_tokens)
    return TrainingPrograms(optimizer, update, scorer)


def check_rows(config: Config, mesh: Mesh) -> None:
    """Refuses a mini-batch that cannot be spread evenly over the mesh. Raises UserError."""
    size, shards = minibatch_rows(config), row_shards(mesh)
    if size % shards:
        raise UserError(
            f"the {size} rows of a mini-batch (training.minibatch_scenarios="
            f"{config.training.minibatch_scenarios} x rollout.rollouts={config.rollout.rollouts}) cannot be "
            f"spread evenly over the {shards} devices of mesh.data={mesh.shape['data']} x mesh.fsdp="
            f"{mesh.shape['fsdp']}; use more of mesh.tensor, or begin a new run with a multiple of {shards}"
        )


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """A mini-batch of the longest rows, as `jax.ShapeDtypeStruct`s with shardings."""
    shape = (minibatch_rows(config), row_lengths(config.rollout.max_tokens)[-1])
    sharding = batch_sharding(mesh)
    kinds = (jnp.int32, jnp.bool_, jnp.float32)
    whole, truth, real = (jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for kind in kinds)
    return Batch(whole, whole, truth, real, real, real)


def minibatch_rows(config: Config) -> int:
    """Rows of an update."""
    return config.training.minibatch_scenarios * config.rollout.rollouts * rows_per_dialogue(config)


def loss_tokens(config: Config) -> int:
    """Most loss tokens that a row can have: the longest replies of all its turns, if they fit.

    Also the divisor of the aggregation constant-length, as Dr. GRPO (arXiv 2503.20783) divides by the most
    tokens that a response can have: a row corresponds to a response.
    """
    rollout = config.rollout
    turns = rollout.max_turns // rows_per_dialogue(config)
    return min(turns * rollout.max_reply_tokens, rollout.max_tokens)


def rows_per_dialogue(config: Config) -> int:
    """One growing row, or one for each turn."""
    return config.rollout.max_turns if config.rollout.history == "per_turn" else 1
