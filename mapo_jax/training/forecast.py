"""What a run would be, before anything is spent: shape, memory, tokens and calls."""

from __future__ import annotations

from pathlib import Path

from mapo_jax.config import Config, FreshModelConfig, to_yaml
from mapo_jax.errors import UserError
from mapo_jax.model.huggingface import read_config
from mapo_jax.model.qwen import QwenConfig, parameter_count
from mapo_jax.model.sharding import make_mesh, sharding_table
from mapo_jax.training.checkpoint import CHECKPOINTS_FOLDER
from mapo_jax.training.policy import MODEL_FOLDER

GIB = 2**30


def fresh_model(config: FreshModelConfig, vocabulary: int, positions: int) -> QwenConfig:
    """The shape of the small Qwen3 that the warm start builds."""
    return QwenConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_layers=config.layers,
        num_heads=config.heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_size,
        rope_theta=config.rope_theta,
        max_position_embeddings=positions,
    )


def forecast(config: Config) -> str:
    """The resolved configuration, the mesh, and what a step holds, samples and calls. Nothing is written.

    Memory is what is certain before compilation: weights, moments, gradient, reference and KV cache, cut
    evenly over the mesh; activations come on top.

    Raises:
      UserError: the model folder cannot be read, or the mesh does not fit the devices.
    """
    mesh = make_mesh(config.mesh)
    model = _model(config)
    count = parameter_count(model)
    rollout, training = config.rollout, config.training
    dialogues = rollout.scenarios * rollout.rollouts
    turns = dialogues * rollout.max_turns
    item = 4 if config.model.dtype == "float32" else 2
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * item * dialogues * rollout.max_tokens
    cut = mesh.shape["fsdp"] * mesh.shape["tensor"]
    memory = {
        "weights (float32)": 4 * count / cut,
        "gradient (float32)": 4 * count / cut,
        "AdamW's moments (float32)": 8 * count / cut,
        "frozen reference (float32)": 4 * count / cut if config.algorithm.kl_coefficient else 0,
        f"KV cache ({config.model.dtype})": cache / mesh.size,
    }
    memory["together, without activations"] = sum(memory.values())
    updates = training.epochs * rollout.scenarios // training.minibatch_scenarios
    world = "scripted: free of charge" if config.environment.family == "scripted" else "live: see below"
    most = "" if config.model.path else "at most "  # the tokenizer may find fewer tokens than it may have
    lines = [
        to_yaml(config),
        f"devices   {mesh.size} x {mesh.devices.flat[0].device_kind}: "
        + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        f"model     {most}{count:,} parameters "
        f"({model.family}, {model.num_layers} layers x {model.hidden_size})",
        "sharding  size/mesh axis = size on each device",
        *(f"  {line}" for line in sharding_table(model, mesh)),
        "memory    per device",
        *(f"  {name:<30} {size / GIB:9.3f} GiB" for name, size in memory.items() if size),
        "a step",
        f"  dialogues                      {dialogues:9,} ({rollout.scenarios} x {rollout.rollouts})",
        f"  sampled tokens, at most        {turns * rollout.max_reply_tokens:9,}",
        f"  tokens trained on, at most     {dialogues * rollout.max_tokens * training.epochs:9,}"
        f" in {updates} updates",
        f"  judge calls, at most           {turns:9,} ({world})",
        f"the run   {training.steps} steps, {training.steps * turns:,} judge calls at most",
    ]
    return "\n".join(lines)


def _model(config: Config) -> QwenConfig:
    if config.model.path is None:
        fresh = config.model.fresh
        return fresh_model(fresh, fresh.vocabulary, config.rollout.max_tokens)
    path = Path(config.model.path)
    folder = path / MODEL_FOLDER if (path / CHECKPOINTS_FOLDER).is_dir() else path
    if not folder.is_dir():
        raise UserError(f"`model.path` is {config.model.path!r}; there is no such folder")
    return read_config(folder)
