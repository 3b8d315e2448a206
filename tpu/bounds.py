"""Lower bounds of the time of a program: by its operations, and by the bytes that memory must deliver."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import jax.numpy as jnp

from mapo_jax.learning.batch import microbatch_rows, row_lengths
from mapo_jax.learning.programs import loss_tokens, minibatch_rows
from mapo_jax.model.backends import stored_dtype
from mapo_jax.model.qwen import parameter_count
from mapo_jax.model.sharding import row_shards
from mapo_jax.rollout.capacity import cache_bytes
from tpu.slices import chip

if TYPE_CHECKING:
    from tpu.programs import Job


def bounds(job: Job, program: str) -> dict[str, float]:
    """Lower bounds of a program's time in seconds, `operations` and `bytes`.

    Operations: a weight costs 2 per token forward and 4 backward, a frozen one 2 backward; `model.remat:
    block` and `offload` compute the forward pass twice. Causal attention over a row of L tokens costs 2 L H E
    per token and layer forward, twice that backward, and is recomputed except with `model.remat: none`; over
    a cache of C tokens it costs 4 C H E. The head counts only for loss tokens, and is always computed twice.

    Bytes: an update reads the weights in the compute dtype, forward and backward for each micro-batch, and
    reads and writes the trained ones with their moments once. A decode step, or a chunk of prompts, reads
    the weights and the caches in use once. Communication between chips is in neither bound.
    """
    config, model, hardware = job.config, job.model, chip(job.slice)
    heads, head = model.num_heads * model.head_dim, model.vocab_size * model.hidden_size
    body = parameter_count(model) - (head if model.tie_word_embeddings else 2 * head)
    item = jnp.dtype(config.model.dtype).itemsize
    if program == "train":
        rows, length = minibatch_rows(config), row_lengths(config.rollout.max_tokens)[-1]
        scored = min(loss_tokens(config), length)
        backward = 1 if model.lora else 2
        remat = config.model.remat
        operations = rows * (
            (1 + backward + (remat in ("block", "offload"))) * 2 * body * length
            + (3 + (remat != "none")) * model.num_layers * 2 * length * length * heads
            + (2 + backward) * 2 * head * scored
        )
        budget, shards = config.training.microbatch_tokens, row_shards(job.mesh)
        microbatches = rows // microbatch_rows(rows, length, budget, shards)
        trained = parameter_count(model) - (parameter_count(replace(model, lora=None)) if model.lora else 0)
        moved = microbatches * 2 * item * (body + head) / job.mesh.shape["tensor"]
        moved += 2 * 3 * 4 * trained / (job.mesh.size / job.mesh.shape["data"])
        return {
            "operations": operations / job.mesh.size / hardware.operations,
            "bytes": moved / hardware.bandwidth,
        }
    engine = job.engine
    rows, width, steps, logits = {
        "prefill": (engine.prefill_rows, engine.chunk, 1, 0),
        "generate": (engine.lanes, 1, engine.block, head),
    }[program]
    operations = rows * width * (2 * (body + logits) + model.num_layers * 4 * engine.length * heads)
    mesh = job.sampling_mesh
    dtype = jnp.dtype(stored_dtype(config.rollout.cache, config.model.dtype))
    moved = item * (body + logits) * mesh.shape["data"] + cache_bytes(model, rows, rows, engine.length, dtype)
    return {
        "operations": steps * operations / mesh.size / hardware.operations,
        "bytes": steps * moved / mesh.size / hardware.bandwidth,
    }
