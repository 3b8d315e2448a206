"""A dry run refuses the model folders that a run refuses, with the same words."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mapo_jax.config import load_config
from mapo_jax.errors import UserError
from mapo_jax.model.huggingface import SINGLE, save_params, write_config
from mapo_jax.model.lora import LoRA
from mapo_jax.model.qwen import QwenConfig, init_params
from mapo_jax.model.tensor_names import EMBEDDING, HEAD
from mapo_jax.running.forecast import forecast, model_shape
from mapo_jax.running.policy import load_policy, read_policy, save_model_files
from mapo_jax.tokenizer import train_tokenizer, write_tokenizer


@pytest.fixture
def folder(tmp_path):
    config = QwenConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
    )
    write_tokenizer(tmp_path, train_tokenizer(["I feel tired."], 300, max_tokens=2048))
    save_params(tmp_path, init_params(config, 0), config, dtype="float32")
    write_config(tmp_path, config, dtype="float32")
    return tmp_path


def other_head(folder):
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {HEAD: tensors[EMBEDDING] + np.float32(1)}, folder / SINGLE)


def fewer_weights(folder):
    tensors = load_file(folder / SINGLE)
    del tensors[EMBEDDING]
    save_file(tensors, folder / SINGLE)


def two_kinds(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_head, f"{HEAD} that differs from the embedding"),
        (fewer_weights, f"lack the tensor {EMBEDDING}"),
        (lambda folder: (folder / SINGLE).unlink(), "holds no weights"),
        (lambda folder: (folder / SINGLE).write_bytes(b"x" * 9), "truncated or damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot read the tokenizer"),
        (two_kinds, r"both a model \(config.json\) and adapters \(adapter_config.json\)"),
    ],
)
def test_what_a_run_refuses(folder, damage, message):
    config = load_config(None, [f"model.path={folder}", "run.directory=unused"])
    assert "parameters" in forecast(config)
    damage(folder)
    with pytest.raises(UserError, match=message) as by_the_run:
        load_policy(folder, config.rollout)
    with pytest.raises(UserError) as by_the_dry_run:
        forecast(config)
    assert str(by_the_dry_run.value) == str(by_the_run.value)


def test_a_run_with_adapters_is_no_folder_of_two_kinds(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints").mkdir()
    config = load_config(None, [f"model.path={folder}", "run.directory=unused"])
    policy, _ = load_policy(folder, config.rollout)
    lora = LoRA(2, 4.0, ("q",))
    save_model_files(run, replace(policy, config=replace(policy.config, lora=lora)))
    assert read_policy(run, config.rollout).config.lora == lora
    config = load_config(None, [f"model.path={run}", "run.directory=unused"])
    assert model_shape(config) == policy.config
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        forecast(config)
