"""A policy and its weights: read from a Hugging Face folder or a run folder, and its sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mapo_jax.config import LoraConfig, RolloutConfig
from mapo_jax.errors import UserError
from mapo_jax.files import as_path, damaged_file, disk_errors, local_folder, write_checksums
from mapo_jax.hub import cached, fetch, hub_id
from mapo_jax.model.backends import decode_attention, stored_dtype
from mapo_jax.model.huggingface import check_weights, load_params, read_config, write_config
from mapo_jax.model.lora import ADAPTERS, LoRA, join, low_rank, merge, split
from mapo_jax.model.peft import base_folder, is_adapter, read_adapter_config, write_adapter_config
from mapo_jax.model.qwen import Params, QwenConfig, in_precision, parameter_shapes
from mapo_jax.model.sharding import param_shardings, with_shardings
from mapo_jax.model.tensor_names import Reader
from mapo_jax.rollout.device import Device
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.rollout.sampling import Sampling
from mapo_jax.running.checkpoint import open_params, restore_params
from mapo_jax.running.published import published_shape
from mapo_jax.running.run_folder import BASE_FOLDER, CHECKPOINTS_FOLDER, checkpoint_folder
from mapo_jax.tokenizer import load_tokenizer, write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FOLDER = "model"  # of a run: config.json and the tokenizer


@dataclass(frozen=True)
class Policy:
    """Architecture, tokenizer, and how dialogues become token rows; without the weights."""

    config: QwenConfig
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat


def load_policy(
    path: Path | str,
    rollout: RolloutConfig,
    *,
    mesh: Mesh | None = None,
    step: int | None = None,
    dtype: str = "float32",
) -> tuple[Policy, Params]:
    """Loads a policy and its weights onto the devices of `mesh`; adapters of a run are merged.

    Args:
      path: a Hugging Face folder or id (downloaded if needed), a folder of LoRA adapters in PEFT's format, or
        a run folder.
      rollout: how dialogues are rendered.
      mesh: where the weights go.
      step: checkpoint of a run; the newest by default.
      dtype: of the weights except norms, which are float32.

    Raises:
      UserError: no such folder, one that cannot be read, or weights that are not finite.
    """
    path = fetch(path)
    policy = read_policy(path, rollout)
    policy, params = _load(path, policy, mesh, step, dtype)
    _refuse_not_finite(path, params, mesh)
    return policy, params


def _load(
    path: Path | str, policy: Policy, mesh: Mesh | None, step: int | None, dtype: str
) -> tuple[Policy, Params]:
    config = policy.config
    if not _is_run(path):
        return policy, load_params(path, config, mesh, dtype=dtype)
    template = parameter_shapes(config)
    if mesh is not None:
        template = with_shardings(template, param_shardings(template, mesh))
    checkpoint = checkpoint_folder(path, step)
    if config.lora is None:
        return policy, restore_params(checkpoint, in_precision(template, dtype))
    adapters, base = split(template)
    params = join(restore_params(as_path(path) / BASE_FOLDER, base), restore_params(checkpoint, adapters))
    policy = replace(policy, config=replace(config, lora=None))
    merged = jax.jit(
        lambda params: in_precision(merge(params, config.lora), dtype),
        out_shardings=None if mesh is None else param_shardings(parameter_shapes(policy.config), mesh),
    )
    return policy, merged(params)


def _refuse_not_finite(path: Path | str, params: Params, mesh: Mesh | None) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    check = jax.jit(
        lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]), out_shardings=everywhere
    )
    finite = np.asarray(check([leaf for _, leaf in leaves]))
    bad = [
        jax.tree_util.keystr(key, simple=True, separator="/")
        for (key, _), fine in zip(leaves, finite, strict=True)
        if not fine
    ]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"the weights in {path} are not finite: {bad[0]}{more}; give a sound copy of the model"
        )


def open_weights(run: Path | str, config: QwenConfig, *, step: int | None = None) -> Reader:
    """Opens the weights of a run's checkpoint to be read one by one, with adapters merged.

    Args:
      config: of the run's policy, adapters included.
      step: which checkpoint; the newest by default.
    """
    checkpoint = checkpoint_folder(run, step)
    if config.lora is None:
        return open_params(checkpoint, parameter_shapes(config))
    adapters, base = split(parameter_shapes(config))
    read_adapter = open_params(checkpoint, adapters)
    read_base = open_params(as_path(run) / BASE_FOLDER, base)

    def read(path: str, layer: int | None) -> np.ndarray:
        weight = read_base(path, layer).astype(np.float32)
        module, kind = path.rsplit("/", 1)
        if kind != "kernel" or module.rsplit("/", 1)[-1] not in config.lora.targets:
            return weight
        a, b = (read_adapter(f"{module}/{name}", layer) for name in ADAPTERS)
        return weight + low_rank(a, b, config.lora, weight.shape)

    return read


def model_files(path: Path | str) -> Path:
    """The folder with config.json and the tokenizer: of a run, an adapter's base model, or `path` itself."""
    path = as_path(path)
    if _is_run(path):
        return path / MODEL_FOLDER
    return base_folder(path) if is_adapter(path) else path


def read_policy(path: Path | str, rollout: RolloutConfig) -> Policy:
    """A policy without its weights; arguments and errors as of `load_policy`."""
    folder, is_run = model_files(path), _is_run(path)
    if is_run:
        _refuse_damage(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is neither a Hugging Face model folder (no config.json) nor a run folder")
    with local_folder(folder) as local:
        tokenizer, model = load_tokenizer(local), read_config(local)
        if is_run:
            model = replace(model, lora=read_adapter_config(local))
    policy = Policy(model, tokenizer, ChatFormat(tokenizer, rollout.history, rollout.system_prompt))
    _check_fit(policy, rollout, path)
    return policy


def read_shape(path: Path | str) -> QwenConfig:
    """The shape of the model in a folder, or of a Hugging Face id, of which no weights are downloaded.

    Raises:
      UserError: there is no such folder or id, or its configuration cannot be read.
    """
    model = hub_id(path)
    if model is not None and (folder := cached(path)) is None and (shape := published_shape(model)):
        return shape
    folder = model_files(path if model is None else folder or fetch(path, weights=False))
    if not folder.is_dir():
        raise UserError(f"`model.path` is {str(path)!r}; there is no such folder")
    return read_config(folder)


def check_policy(path: Path | str, rollout: RolloutConfig) -> None:
    """Raises what `load_policy` would raise, except for errors found only by reading all weights.

    Of a Hugging Face id nothing is checked that is not in the cache.
    """
    if (path := cached(path)) is None:
        return
    policy = read_policy(path, rollout)
    if _is_run(path):
        checkpoint_folder(path)
    else:
        check_weights(path, policy.config)


def _refuse_damage(folder: Path) -> None:
    file = damaged_file(folder) if (folder / "config.json").is_file() else "config.json"
    if file is not None:
        raise UserError(
            f"{folder / file}, which the run needs to go on, is missing or not as the run wrote it; put it "
            "back from a copy, or start a new run in another run.directory"
        )


def adapters(config: LoraConfig) -> LoRA | None:
    """The adapters that `lora` configures; None if all weights are trained."""
    return LoRA(config.rank, config.alpha, tuple(config.targets)) if config.rank else None


def _is_run(path: Path | str) -> bool:
    return (as_path(path) / CHECKPOINTS_FOLDER).is_dir()


def make_engine(
    model: QwenConfig,
    stop_ids: Sequence[int],
    vocabulary_size: int,
    rollout: RolloutConfig,
    temperature: float,
    *,
    dtype: str,
    mesh: Mesh | None,
    device: Device | None = None,
) -> Engine:
    """The sampler of one process, without weights yet, with a slot for each of its dialogues of a step.

    Args:
      rollout: the process's share of a step (`processes.share_of`).
      mesh: the devices to sample on.
      device: as of `Engine`.
    """
    dialogues = rollout.scenarios * rollout.rollouts
    return Engine(
        model,
        slots=dialogues,
        resident=min(rollout.slots or dialogues, dialogues),
        length=rollout.max_tokens,
        max_reply_tokens=rollout.max_reply_tokens,
        stop_ids=stop_ids,
        vocabulary_size=vocabulary_size,
        sampling=Sampling(temperature=temperature),
        copy_weights=rollout.copy_weights,
        dtype=dtype,
        cache_dtype=stored_dtype(rollout.cache, dtype),
        attention=decode_attention(rollout.cache, mesh, model, dtype),
        mesh=mesh,
        device=device,
    )


def save_model_files(run_folder: Path | str, policy: Policy) -> None:
    """Writes what a model needs besides a checkpoint: its shape and its tokenizer.

    Raises:
      UserError: the disk is full.
    """
    folder = as_path(run_folder) / MODEL_FOLDER
    with disk_errors(folder), local_folder(folder, write=True) as local:
        write_tokenizer(local, policy.tokenizer)
        if policy.config.lora is not None:
            write_adapter_config(local, policy.config.lora)
        write_config(local, policy.config)
        write_checksums(local)


def _check_fit(policy: Policy, rollout: RolloutConfig, path: Path | str) -> None:
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
