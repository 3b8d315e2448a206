"""A policy and its weights as a Hugging Face folder that reproduces the rows it was trained on."""

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
from mapo_jax.files import write_whole
from mapo_jax.model.huggingface import save_params, write_config
from mapo_jax.model.qwen import Params
from mapo_jax.model.tensor_names import Reader
from mapo_jax.running.metrics import full_disk_is_a_user_error
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
    """Writes weights, config.json, the tokenizer with the chat template of the rows, generation_config.json.

    Args:
      folder: an existing folder.
      params: the weights, or what reads them one by one.
      rollout: how the policy sampled; becomes the default of those who generate with it.
      dtype: of the weights: float32 or bfloat16.
      max_shard_bytes: of one weights file.
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
    """A temporary folder beside `target`, which takes its name when the block ends well.

    `target` may be an empty folder. After an error nothing is left.

    Raises:
      UserError: the disk is full, or the place cannot be written to.
      FileExistsError: meanwhile something else took the name; it is left as it is.
    """
    with full_disk_is_a_user_error(target):
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
    # A folder whose name survives a power cut must not hold files that did not.
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
