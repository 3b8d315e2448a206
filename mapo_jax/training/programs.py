"""The compiled programs of a run, made from its configuration and the model's shape alone.

`train` runs them and `tpu.compile` compiles them for a slice that is not there: both get them here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from mapo_jax.config import Config
from mapo_jax.model.backends import row_attention
from mapo_jax.model.qwen import QwenConfig
from mapo_jax.model.sharding import param_shardings
from mapo_jax.training import batch as rows
from mapo_jax.training.step import Optimizer, Scoring, Update, make_optimizer, make_scorer, make_update


class Programs(NamedTuple):
    """What moves the weights, and what scores with them."""

    optimizer: Optimizer
    update: Update
    scorer: Callable[..., Any]  # the trainer's own log-probabilities


def make_programs(config: Config, model: QwenConfig, vocabulary_size: int, mesh: Mesh) -> Programs:
    """The programs of a run.

    Args:
      vocabulary_size: ids from here on are no tokens.

    Raises:
      UserError: the mesh does not fit the model, or the attention does not fit either.
    """
    rollout, training = config.rollout, config.training
    optimizer = make_optimizer(
        config.optimizer,
        training.steps * training.epochs * (rollout.scenarios // training.minibatch_scenarios),
    )
    scoring = Scoring(
        model,
        temperature=rollout.temperature,
        vocabulary_size=vocabulary_size,
        dtype=config.model.dtype,
        remat=config.model.remat,
        loss_tokens=rollout.max_turns * rollout.max_reply_tokens,
        attention=row_attention(config.model.attention, mesh, model, config.model.dtype),
        mesh=mesh,
    )
    minibatch_rows, step_rows = (
        scenarios * rollout.rollouts * rows_per_dialogue(config)
        for scenarios in (training.minibatch_scenarios, rollout.scenarios)
    )
    update = make_update(
        scoring,
        optimizer,
        config.algorithm,
        microbatch_rows=rows.microbatch_rows(minibatch_rows, training.microbatch_rows),
        constant_length=rollout.max_turns * rollout.max_reply_tokens,
        shardings=param_shardings(model, mesh),
    )
    scorer = make_scorer(scoring, microbatch_rows=rows.microbatch_rows(step_rows, training.microbatch_rows))
    return Programs(optimizer, update, scorer)


def rows_per_dialogue(config: Config) -> int:
    """One growing row, or one for each turn."""
    return config.rollout.max_turns if config.rollout.history == "per_turn" else 1
