"""Adapters in PEFT's format, against PEFT itself where it is installed and against matrices added by hand."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mapo_jax.errors import UserError
from mapo_jax.model.head import logits
from mapo_jax.model.huggingface import load_params, save_params, write_config
from mapo_jax.model.peft import base_folder, is_adapter
from mapo_jax.model.qwen import QwenConfig, hidden_states, init_params
from mapo_jax.model.sharding import make_mesh

CONFIG = QwenConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
RANK, ALPHA = 3, 7


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    params = init_params(CONFIG, 0)
    save_params(folder, params, CONFIG, dtype="float32")
    write_config(folder, CONFIG, dtype="float32")
    return folder, params


def matrices(rng):
    """A and B for one projection of the second layer: `[rank, in]` and `[out, rank]`."""
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    return {
        f"{name}.lora_A.weight": rng.standard_normal((RANK, 16), np.float32),
        f"{name}.lora_B.weight": rng.standard_normal((32, RANK), np.float32),
    }


def adapter(folder, base, tensors, **settings):
    folder.mkdir(exist_ok=True)
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(content | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("settings", "scale"), [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / RANK**0.5)]
)
def test_the_low_rank_matrices_are_added_to_their_own(base, tmp_path, settings, scale):
    folder, params = base
    tensors = matrices(np.random.default_rng(0))
    adapters = adapter(tmp_path / "adapters", folder, tensors, **settings)
    assert is_adapter(adapters) and not is_adapter(folder) and base_folder(adapters) == folder
    loaded = load_params(adapters, CONFIG)
    a, b = tensors.values()
    expected = jax.tree.map(np.array, params)
    expected["layers"]["attention"]["q"]["kernel"][1] += (scale * (b @ a)).T.reshape(16, 4, 8)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6), loaded, expected
    )
    meshed = load_params(adapters, CONFIG, make_mesh_of_one())
    jax.tree.map(np.testing.assert_array_equal, meshed, loaded)


def make_mesh_of_one():
    from mapo_jax.config import MeshConfig

    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))


def test_peft_computes_the_same_logits(base, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder, _ = base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapters")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
    positions = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    params = load_params(tmp_path / "adapters", CONFIG)
    ours = logits(params, CONFIG, hidden_states(params, CONFIG, tokens, positions))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
        with model.disable_adapter():
            plain = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(theirs - plain).max() > 0.1  # the adapters matter


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "only LORA is read"),
        ({"use_dora": True}, "`use_dora` is true, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ({"base_model_name_or_path": "Qwen/Qwen3-8B"}, "'Qwen/Qwen3-8B', and there is no model folder"),
    ],
)
def test_what_is_more_than_plain_adapters_is_refused(base, tmp_path, settings, message):
    adapters = adapter(tmp_path / "a", base[0], matrices(np.random.default_rng(0)), **settings)
    with pytest.raises(UserError, match=message):
        load_params(adapters, CONFIG)


def test_adapters_that_do_not_fit_are_named(base, tmp_path):
    tensors = matrices(np.random.default_rng(0))
    (a, down), (b, up) = tensors.items()
    other = adapter(tmp_path / "a", base[0], {a.replace("layers.1", "layers.7"): down, b: up})
    with pytest.raises(UserError, match=r"layers.7.*to which the base model has no matrix"):
        load_params(other, CONFIG)
    for wrong in ({a: down}, {a: down[:, :5].copy(), b: up}, {a: down, b: up[:, :2].copy()}):
        with pytest.raises(UserError, match=r"q_proj.lora_A.weight and its B do not fit"):
            load_params(adapter(tmp_path / "a", base[0], wrong), CONFIG)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(UserError, match="truncated or damaged"):
        load_params(tmp_path / "a", CONFIG)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        load_params(tmp_path / "a", CONFIG)
