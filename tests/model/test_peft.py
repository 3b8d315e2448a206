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
    ("settings", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"r": 9, "rank_pattern": {"k_proj": 4, r"layers\.1\..*q_proj": RANK}}, ALPHA / RANK),
        ({"alpha_pattern": {"proj": 1, "q_proj": 2, ".*": 3}}, 2 / RANK),
        ({"use_rslora": True, "alpha_pattern": {"model.layers.1.self_attn.q_proj": 2}}, 2 / RANK**0.5),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, ALPHA / RANK),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, ALPHA / RANK),
        ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, ALPHA / RANK),
        ({"target_modules": r".*\.1\..*q_proj"}, ALPHA / RANK),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, ALPHA / RANK),
        # What says where they come from, and how they were trained.
        (
            {
                "init_lora_weights": "gaussian",
                "lora_dropout": 0.1,
                "peft_version": "0.99",
                "task_type": "CAUSAL_LM",
                "auto_mapping": {"parent_library": "x"},
                "megatron_core": "megatron.core",
                "qalora_group_size": 16,
                "bias": "none",
                "use_dora": False,
                "modules_to_save": [],
                "rank_pattern": {},
                "loftq_config": None,
                "switched_off": False,
            },
            ALPHA / RANK,
        ),
    ],
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\..*q_proj": 5, "k_proj": 2},
            "alpha_pattern": {"up_proj": 3, "layers.0.self_attn.v_proj": 2},
        },
        {"layers_to_transform": [1], "exclude_modules": ["o_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=["plain", "patterns", "some layers"],
)
def test_peft_computes_the_same_logits(base, tmp_path, options):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder, _ = base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", **options
    )
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
        ({"bias": "lora_only"}, '`bias` is "lora_only"'),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out`"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"trainable_token_indices": [3]}, "`trainable_token_indices`"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "`layer_replication`"),
        ({"target_parameters": ["mlp.gate_proj.weight"]}, "`target_parameters`"),
        ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens`"),
        ({"megatron_config": {"x": 1}}, "`megatron_config`"),
        ({"use_qalora": True}, "`use_qalora`"),
        ({"use_bdlora": {"nblocks": 2}}, "`use_bdlora`"),
        ({"arrow_config": {"top_k": 2}}, "`arrow_config`"),
        ({"kasa_config": {"x": 1}}, "`kasa_config`"),
        ({"monteclora_config": {"x": 1}}, "`monteclora_config`"),
        ({"twisted": 1}, "`twisted` is 1, which is not supported"),  # of a PEFT that does not exist yet
        *(
            (
                {"init_lora_weights": start},
                f"`init_lora_weights` is .*{start}.*base whose weights were changed",
            )
            for start in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new")
        ),
        ({"r": 4}, r"q_proj.lora_A.weight has rank 3, but adapter_config.json says 4"),
        ({"rank_pattern": {"q_proj": 2}}, r"has rank 3, but adapter_config.json says 2"),
        ({"target_modules": ["k_proj"]}, r"q_proj.lora_A.weight, which adapter_config.json leaves out"),
        ({"target_modules": ["roj"]}, "leaves out"),
        ({"target_modules": r".*\.k_proj"}, "leaves out"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, "leaves out"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "h"}, "leaves out"),
        ({"exclude_modules": ["q_proj"]}, "leaves out"),
        ({"target_modules": ["q_proj"]}, r"lacks the adapters of model.layers.0.self_attn.q_proj"),
        ({"target_modules": "all-linear"}, "lacks the adapters of model.layers.0.mlp.down_proj"),
        ({"target_modules": "("}, "`target_modules` is .*must be a pattern or a list of names"),
        ({"alpha_pattern": {"(": 1}}, "`alpha_pattern`"),
        ({"r": 0}, "`r` is 0, but it must be a whole number above 0"),
        ({"r": True}, "`r` is true"),
        ({"lora_alpha": "7"}, "`lora_alpha` is"),
        ({"use_rslora": "yes"}, "`use_rslora` is"),
        ({"base_model_name_or_path": "Qwen/Qwen3-8B"}, "'Qwen/Qwen3-8B', and there is no model folder"),
    ],
)
def test_what_is_more_than_plain_adapters_is_refused(base, tmp_path, settings, message):
    adapters = adapter(tmp_path / "a", base[0], matrices(np.random.default_rng(0)), **settings)
    with pytest.raises(UserError, match=message):
        load_params(adapters, CONFIG)


@pytest.mark.parametrize("field", ["defaults", "whole"])
def test_what_peft_writes_by_default_is_read(base, tmp_path, field):
    """Every key of the installed PEFT is known here: a new one with a meaning of its own fails this test."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, base_model_name_or_path=str(base[0])).to_dict()
    if field == "whole":
        settings |= {"task_type": "CAUSAL_LM", "inference_mode": True, "peft_version": "9.9"}
    settings = json.loads(json.dumps(settings, default=list))
    adapters = adapter(tmp_path / "a", base[0], matrices(np.random.default_rng(0)), **settings)
    load_params(adapters, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: {b: np.ones((32, 3))}, r"q_proj.lora_B.weight and its A do not fit"),
        (lambda a, b: {}, "holds no adapters"),
        (
            lambda a, b: {a.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(32)},
            "lora_magnitude_vector, to",
        ),
        (lambda a, b: {b.replace("weight", "bias"): np.ones(32)}, r"lora_B.bias, to which the base"),
        (
            lambda a, b: {a.replace("lora_A", "lora_A.other"): np.ones((3, 16))},
            "lora_A.other.weight, to which",
        ),
        (
            lambda a, b: {a.replace("lora_A", "lora_A.default"): np.ones((3, 16)), a: np.ones((3, 16))},
            "are one",
        ),
        (
            lambda a, b: {"base_model.model.lm_head.lora_A.weight": np.ones((3, 16))},
            "lm_head.lora_A.weight, to",
        ),
        (lambda a, b: {"base_model.model.lm_head.weight": np.ones((64, 16))}, "lm_head.weight, to which"),
        (
            lambda a, b: {"base_model.model.model.embed_tokens.lora_A.weight": np.ones((3, 16))},
            "embed_tokens.lora_A.weight, to which",
        ),
    ],
)
def test_a_tensor_without_a_place_is_named(base, tmp_path, change, message):
    names = matrices(np.random.default_rng(0))
    with pytest.raises(UserError, match=message):
        load_params(adapter(tmp_path / "a", base[0], change(*names)), CONFIG)


def test_a_folder_with_model_and_adapters_is_refused(base, tmp_path):
    adapters = adapter(tmp_path / "a", base[0], matrices(np.random.default_rng(0)))
    write_config(adapters, CONFIG)
    with pytest.raises(UserError, match=r"both a model \(config.json\) and adapters"):
        load_params(adapters, CONFIG)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff"])
def test_a_configuration_that_cannot_be_read_is_named(base, tmp_path, text):
    adapters = adapter(tmp_path / "a", base[0], matrices(np.random.default_rng(0)))
    (adapters / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
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
