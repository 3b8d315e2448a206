"""Against transformers + torch, the independent implementation, on tiny random models."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mapo_jax.errors import UserError
from mapo_jax.model import head, huggingface
from mapo_jax.model.huggingface import (
    INDEX,
    SINGLE,
    check_weights,
    load_params,
    read_config,
    save_params,
    write_config,
)
from mapo_jax.model.qwen import QwenConfig, hidden_states, parameter_count, parameter_shapes
from mapo_jax.model.tensor_names import EMBEDDING, HEAD, as_stored, read_params, tensor_names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # float32; logits are sums of 48 products of order 1, in another order

TOKENS = np.random.default_rng(0).integers(0, 131, (2, 19))
MASK = (np.random.default_rng(1).random((2, 18)) < 0.6).astype(np.float32)


def make_reference(config: QwenConfig):
    """A transformers model of this shape with weights large enough that every part matters."""
    kind = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[config.family]
    reference_config = kind(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    model = transformers.AutoModelForCausalLM.from_config(reference_config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre, scale = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
            weight.copy_(centre + scale * torch.randn(weight.shape, generator=generator))
    return model.float().eval()


def masked_log_likelihood(params, config, tokens, mask):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(params, config, tokens, positions)
    logprobs, _ = head.token_logprobs(params, config, hidden[:, :-1], tokens[:, 1:])
    return jnp.sum(logprobs * mask), head.logits(params, config, hidden)


@pytest.fixture(scope="session")
def reference(any_config, tmp_path_factory):
    """(our config, the transformers model, its folder)"""
    folder = tmp_path_factory.mktemp(any_config.family)
    model = make_reference(any_config)
    model.save_pretrained(folder)
    return any_config, model, folder


def reference_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def test_logits_and_gradients_equal_transformers(reference):
    config, model, folder = reference
    assert read_config(folder) == config
    params = load_params(folder, config)

    step = jax.jit(jax.value_and_grad(masked_log_likelihood, has_aux=True), static_argnums=1)
    (value, found), gradient = step(params, config, TOKENS, MASK)

    model.zero_grad()
    logits = model(torch.from_numpy(TOKENS)).logits
    logprobs = torch.log_softmax(logits[:, :-1], -1)
    chosen = logprobs.gather(-1, torch.from_numpy(TOKENS)[:, 1:, None])[..., 0]
    expected = (chosen * torch.from_numpy(MASK)).sum()
    expected.backward()

    np.testing.assert_allclose(found, logits.detach().numpy(), atol=TOLERANCE)
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    read = read_params(gradient)
    ours = {name: as_stored(read, *place) for name, place in tensor_names(config).items()}
    theirs = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert np.abs(grad).max() > 0, name
        # relative to the tensor's largest entry, which is between 1 and 100
        np.testing.assert_allclose(
            ours[name], grad, atol=TOLERANCE * max(1, np.abs(grad).max()), err_msg=name
        )


@pytest.mark.parametrize("max_shard_bytes", [5e9, 40_000], ids=["one file", "sharded"])
def test_export_reloads_in_transformers(reference, tmp_path, max_shard_bytes):
    config, model, folder = reference
    params = load_params(folder, config)
    save_params(tmp_path, params, config, dtype="float32", max_shard_bytes=max_shard_bytes)
    write_config(tmp_path, config, dtype="float32", token_ids={"eos_token_id": 2})

    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (files == [SINGLE]) == (max_shard_bytes > 1e6) and len(files) != 2
    assert not list(tmp_path.glob(".*"))  # no temporary file is left

    # Every key is produced, and nothing else.
    produced = {name for file in files for name in load_file(tmp_path / file)}
    original = load_file(folder / SINGLE)
    assert produced == original.keys() == tensor_names(config).keys()
    assert sum(array.size for array in original.values()) == parameter_count(config)
    assert ("lm_head.weight" in produced) != config.tie_word_embeddings

    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.dtype == torch.float32 and again.config.eos_token_id == 2
    np.testing.assert_array_equal(reference_logits(again.eval()), reference_logits(model))

    assert read_config(tmp_path) == config
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, config), params)


@pytest.fixture
def saved(qwen3, qwen3_params, tmp_path):
    """A small sharded folder of our own, to be damaged."""
    save_params(tmp_path, qwen3_params, qwen3, dtype="float32", max_shard_bytes=40_000)
    write_config(tmp_path, qwen3, dtype="float32")
    return tmp_path


def test_bfloat16_files_round_to_nearest(qwen3, qwen3_params, saved):
    """And a save into the same folder leaves nothing of the earlier, sharded one."""
    save_params(saved, qwen3_params, qwen3)
    assert [path.name for path in saved.iterdir() if "safetensors" in path.name] == [SINGLE]
    loaded = load_params(saved, qwen3)
    jax.tree.map(
        lambda found, exact: np.testing.assert_array_equal(
            found, np.asarray(exact).astype(jnp.bfloat16).astype(np.float32)
        ),
        loaded,
        qwen3_params,
    )


def edit(folder, **changes):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def test_old_and_new_spellings_of_the_configuration(qwen3, saved):
    edit(saved, rope_parameters=None, dtype=None)  # transformers 4
    assert read_config(saved) == qwen3
    edit(
        saved, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e6}
    )  # transformers 5
    assert read_config(saved) == qwen3
    # As the published Qwen2.5 folders say it: a window that is switched off.
    edit(saved, sliding_window=4096, use_sliding_window=False, max_window_layers=28, rope_scaling={})
    assert read_config(saved) == qwen3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "qwen3_moe"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e6, "factor": 4.0}}, "rope_type"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"num_experts": 8}, "num_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_unsupported_configurations_are_refused_by_key(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(UserError, match=message):
        read_config(saved)


def test_unreadable_configurations(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)
    for text in ('{"model_type": ', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="not valid JSON"):
            read_config(tmp_path)


NORM = "model.layers.1.input_layernorm.weight"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


def frequencies(theta, size=20):
    return (1 / theta ** (np.arange(0, size, 2) / size)).astype(np.float32)


def changed(matrix, row=60):
    copy = matrix.copy()
    copy[row, 7] += 1e-3
    return copy


def damage(folder, config, change):
    """Rewrites the weights as one file, after `change` to the dict of tensors."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    save_file(tensors, folder / SINGLE)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(NORM), f"lack the tensor {NORM}"),
        (lambda tensors: tensors.update(extra=np.zeros(3)), "hold the tensor extra"),
        (
            lambda tensors: tensors.update({HEAD: changed(tensors[EMBEDDING])}),
            f"{HEAD} that differs from the embedding.*`tie_word_embeddings`",
        ),
        (
            lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][:-1].copy()}),
            f"{HEAD} that differs from the embedding",
        ),
        (
            lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)[:-1].copy()}),
            rf"{EMBEDDING}.*\[130, 48\].*\[131, 48\]",
        ),
        (
            lambda tensors: tensors.update({FREQUENCIES: frequencies(1e4)}),
            f"{FREQUENCIES}.*`rope_theta` \\(5e\\+06\\)",
        ),
        (lambda tensors: tensors.update({NORM: np.zeros(47, np.float32)}), rf"{NORM}.*\[47\].*\[48\]"),
        (lambda tensors: tensors.update({NORM: np.zeros(48, np.int8)}), f"{NORM}.*I8"),
    ],
    ids=["missing", "surplus", "other head", "short head", "head alone", "frequencies", "shape", "dtype"],
)
def test_wrong_tensors_are_named(qwen3, saved, change, message):
    damage(saved, qwen3, change)
    with pytest.raises(UserError, match=message):
        load_params(saved, qwen3)
    with pytest.raises(UserError, match=message):  # what a dry run asks
        check_weights(saved, qwen3)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()}),
        lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}),
        lambda tensors: tensors.update({FREQUENCIES: frequencies(5e6)}),
        lambda tensors: tensors.update({"model.rotary_emb.inv_freq": frequencies(5e6).astype(np.float16)}),
    ],
    ids=["tied head", "head alone", "frequencies", "in half precision"],
)
def test_what_a_folder_says_twice_is_read_once(qwen3, qwen3_params, saved, change):
    """As published folders of tied models have it, and those of old versions of transformers."""
    damage(saved, qwen3, change)
    check_weights(saved, qwen3)
    jax.tree.map(np.testing.assert_array_equal, load_params(saved, qwen3), qwen3_params)


@pytest.mark.parametrize("stored", [True, False], ids=["in a file of its own", "only in the index"])
def test_a_tied_head_of_a_sharded_folder_is_read_once(qwen3, qwen3_params, saved, stored):
    (embedding,) = (
        load_file(file)[EMBEDDING] for file in saved.glob("*.safetensors") if EMBEDDING in load_file(file)
    )
    index = json.loads((saved / INDEX).read_text())
    last = sorted(saved.glob("*.safetensors"))[-1]
    index["weight_map"][HEAD] = "model-head.safetensors" if stored else last.name
    if stored:
        save_file({HEAD: embedding}, saved / "model-head.safetensors")
    (saved / INDEX).write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, load_params(saved, qwen3), qwen3_params)


def test_a_large_tied_head_is_compared_block_by_block(qwen3, saved, monkeypatch):
    monkeypatch.setattr(huggingface, "_BLOCK_BYTES", 1000)  # five rows
    damage(saved, qwen3, lambda tensors: tensors.update({HEAD: changed(tensors[EMBEDDING], row=-1)}))
    with pytest.raises(UserError, match="differs from the embedding"):
        check_weights(saved, qwen3)


def test_damaged_files_are_named(qwen3, saved, tmp_path_factory):
    first, second = sorted(saved.glob("*.safetensors"))[:2]

    def fresh_copy():
        folder = tmp_path_factory.mktemp("damaged") / "model"
        shutil.copytree(saved, folder)
        return folder

    folder = fresh_copy()
    whole = (folder / first.name).read_bytes()
    for size in (len(whole) - 1, 100, 0):
        (folder / first.name).write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{first.name} is truncated or damaged"):
            load_params(folder, qwen3)
    (folder / first.name).unlink()
    with pytest.raises(UserError, match=f"{first.name} is missing"):
        load_params(folder, qwen3)

    folder = fresh_copy()
    shutil.copy(folder / second.name, folder / first.name)
    with pytest.raises(UserError, match=first.name):
        load_params(folder, qwen3)

    for text in ("{", "[" * 100_000):
        (folder / INDEX).write_text(text)
        with pytest.raises(UserError, match=INDEX):
            load_params(folder, qwen3)
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_params(folder, qwen3)


HOST = """
import sys, threading, time
import jax
index, folder, address = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(coordinator_address=address, num_processes=2, process_id=index)
from mapo_jax.config import MeshConfig
from mapo_jax.model.huggingface import load_params, read_config
from mapo_jax.model.sharding import make_mesh

def held():  # not the pages of mapped files, which are the system's and may be taken back
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

config, mesh = read_config(folder), make_mesh(MeshConfig(fsdp=4, tensor=2))
before, most, over = held(), 0, threading.Event()

def watch():
    global most
    while not over.wait(0.002):
        most = max(most, held())

watcher = threading.Thread(target=watch)
watcher.start()
params = jax.block_until_ready(load_params(folder, config, mesh))
over.set()
watcher.join()
share = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(share, most - before)
"""


def test_each_of_two_hosts_holds_less_than_twice_its_own_share_while_it_loads(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    config = QwenConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, num_layers=8, num_heads=8, num_kv_heads=8,
        head_dim=64,
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.random(leaf.shape, np.float32), parameter_shapes(config))
    save_params(tmp_path, params, config)
    write_config(tmp_path, config)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(index), str(tmp_path), address],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        ended = [host.communicate(timeout=300) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for host, (output, error) in zip(hosts, ended, strict=True):
        assert host.returncode == 0, error[-2000:]
        share, grown = map(int, output.split()[-2:])
        assert 0.45 * model < share < 0.55 * model  # norms lie on both
        assert grown < 2 * share, f"{grown / 1e6:.0f} MB for a share of {share / 1e6:.0f} MB"
