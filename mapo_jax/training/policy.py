"""A policy as it lies on the disk: a Hugging Face folder, or a run's checkpoint with its model files."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from mapo_jax.config import RolloutConfig
from mapo_jax.errors import UserError
from mapo_jax.files import as_path, copy_files, in_bucket, local_folder, write_whole
from mapo_jax.model.huggingface import load_params, read_config, write_config
from mapo_jax.model.qwen import Params, QwenConfig, parameter_shapes
from mapo_jax.model.sharding import param_shardings
from mapo_jax.rollout.chat import ChatFormat
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.sampling import Sampling
from mapo_jax.tokenizer import load_tokenizer
from mapo_jax.training.checkpoint import CHECKPOINTS_FOLDER, restore_params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FOLDER = "model"  # of a run: config.json and tokenizer, everything but weights


@dataclass(frozen=True)
class Policy:
    """What talks: architecture, tokenizer, and how dialogues become token rows. Weights are kept apart."""

    config: QwenConfig
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat


def load_policy(
    path: Path | str, rollout: RolloutConfig, *, mesh: Mesh | None = None, step: int | None = None
) -> tuple[Policy, Params]:
    """Loads a policy and its weights, float32, each array onto its own devices.

    Args:
      path: a Hugging Face folder, or a run folder.
      rollout: how dialogues are rendered.
      mesh: where the weights go.
      step: of a run: which checkpoint; the latest by default.

    Raises:
      UserError: neither kind of folder, or one that cannot be read; names the file and what is wrong.
    """
    policy = read_policy(path, rollout)
    config = policy.config
    if not _is_run(path):
        return policy, load_params(path, config, mesh)
    template = parameter_shapes(config)
    if mesh is not None:
        template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            template,
            param_shardings(config, mesh),
        )
    return policy, restore_params(path, template, step=step)


def read_policy(path: Path | str, rollout: RolloutConfig) -> Policy:
    """A policy without its weights; arguments and errors as of `load_policy`."""
    path = as_path(path)
    folder = path / MODEL_FOLDER if _is_run(path) else path
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is neither a Hugging Face model folder (no config.json) nor a run folder")
    with local_folder(folder) as here:
        tokenizer = load_tokenizer(here)
        config = read_config(here)
    chat = ChatFormat(tokenizer, rollout.history, rollout.system_prompt)
    policy = Policy(config, tokenizer, chat)
    _check_fit(policy, rollout, path)
    return policy


def _is_run(path: Path | str) -> bool:
    return (as_path(path) / CHECKPOINTS_FOLDER).is_dir()


def make_engine(
    policy: Policy,
    rollout: RolloutConfig,
    temperature: float,
    *,
    dtype: str,
    mesh: Mesh | None,
    processes: int = 1,
) -> Engine:
    """The sampler of a policy, without weights yet: by default with a slot for every dialogue of a step.

    Args:
      mesh: of the devices it samples on.
      processes: how many have such a sampler, each with its share of the slots and lanes.

    Raises:
      UserError: the slots or lanes cannot be shared evenly.
    """
    sizes = {"slots": rollout.slots or rollout.scenarios * rollout.rollouts, "lanes": rollout.lanes}
    for name, size in sizes.items():
        if size is not None and size % processes:
            raise UserError(f"`rollout.{name}` is {size}; it must be a multiple of the {processes} processes")
    return Engine(
        policy.config,
        slots=sizes["slots"] // processes,
        lanes=sizes["lanes"] and sizes["lanes"] // processes,
        length=rollout.max_tokens,
        max_reply_tokens=rollout.max_reply_tokens,
        stop_ids=policy.chat.stop_ids,
        vocabulary_size=policy.chat.vocabulary_size,
        sampling=Sampling(temperature=temperature),
        dtype=dtype,
        mesh=mesh,
    )


def save_model_files(run_folder: Path | str, policy: Policy) -> None:
    """Writes what a run's checkpoints lack to be a model: its shape and its tokenizer."""
    folder = as_path(run_folder) / MODEL_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if in_bucket(folder):
        with tempfile.TemporaryDirectory(prefix="mapo_jax.") as here:
            policy.tokenizer.save_pretrained(here)
            copy_files(Path(here), folder)
            write_config(Path(here), policy.config)
            write_whole(folder / "config.json", (Path(here) / "config.json").read_bytes())
        return
    policy.tokenizer.save_pretrained(folder)
    write_config(folder, policy.config)  # last: its presence says that the rest is there


def _check_fit(policy: Policy, rollout: RolloutConfig, path: Path) -> None:
    if rollout.max_tokens > policy.config.max_position_embeddings:
        raise UserError(
            f"`rollout.max_tokens` is {rollout.max_tokens}; it must be at most the "
            f"{policy.config.max_position_embeddings} positions of the model {path}"
        )
    if policy.chat.vocabulary_size > policy.config.vocab_size:
        raise UserError(
            f"the tokenizer in {path} has {policy.chat.vocabulary_size} ids but the model only "
            f"{policy.config.vocab_size}; they do not belong together"
        )
