"""Writes a policy and its weights as a Hugging Face folder that reproduces the training rows."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mapo_jax.config import RolloutConfig
from mapo_jax.errors import UserError
from mapo_jax.files import disk_errors, write_whole
from mapo_jax.model.huggingface import save_params, write_config
from mapo_jax.model.qwen import Params
from mapo_jax.model.tensor_names import Reader
from mapo_jax.running.policy import Policy
from mapo_jax.tokenizer import write_tokenizer


def write_model_folder(
    folder: Path | str,
    policy: Policy,
    params: Params | Reader,
    rollout: RolloutConfig,
    *,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes weights, config.json, the tokenizer with the rows' chat template, and generation_config.json.

    Args:
      folder: an existing folder.
      params: the weights, or a reader of them.
      rollout: sampling of the training, which becomes the default for generation.
      dtype: of the weights: float32 or bfloat16.
      max_shard_bytes: largest weights file.
    """
    folder = Path(folder)
    stop = list(policy.chat.stop_ids)
    pad = policy.tokenizer.pad_token_id
    token_ids = {"eos_token_id": stop, **({} if pad is None else {"pad_token_id": pad})}
    save_params(folder, params, policy.config, dtype=dtype, max_shard_bytes=max_shard_bytes)
    write_config(folder, policy.config, dtype=dtype, token_ids=token_ids)
    write_tokenizer(folder, policy.tokenizer, policy.chat.template)
    generation = {
        "do_sample": True,
        "temperature": rollout.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": rollout.max_reply_tokens,
        **token_ids,
    }
    write_whole(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, renamed to it at the end of the block; removed after an error.

    `target` may be an empty folder.

    Raises:
      UserError: the disk is full, or the folder cannot be created.
      FileExistsError: `target` was created meanwhile; it is unchanged.
    """
    with disk_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
            temporary.mkdir()
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"cannot write to {target}: {error.strerror}; choose another place") from error
        try:
            yield temporary
            _sync(temporary)
            try:
                os.rename(temporary, target)
            except OSError as error:
                if target.is_dir() and any(target.iterdir()):
                    raise FileExistsError(str(target)) from error
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _sync(folder: Path) -> None:
    # After a power cut a renamed folder must not hold files that were not synced.
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
