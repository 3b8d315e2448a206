"""Attention by several implementations: equal numbers, and clear refusals. Kernels are interpreted."""

import contextlib
import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pallas_tpu

from mapo_jax.config import MeshConfig, load_config
from mapo_jax.errors import UserError
from mapo_jax.model import backends
from mapo_jax.model.attention import cached_attention, causal_attention
from mapo_jax.model.cache import LayerCache
from mapo_jax.model.qwen import hidden_states
from mapo_jax.model.sharding import make_mesh
from mapo_jax.train import train

# Four query heads on two key/value heads; a length that no block divides.
ROWS, LENGTH, HEADS, GROUPS, SIZE = 2, 200, 4, 2, 16


def mesh_of(platform):
    """What the choice asks of a mesh on a platform that is not here."""
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)], object))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = [(ROWS, LENGTH, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def packed_segments():
    segments = np.zeros((ROWS, LENGTH), np.int32)
    segments[0, 70:] = 1  # a cut inside a block, and
    segments[1, 128:] = 1  # at the end of one
    segments[1, 190:] = 2
    return segments


@pytest.mark.parametrize("segments", [None, packed_segments()], ids=["one text", "packed"])
def test_splash_equals_xla_forward_and_backward(monkeypatch, qwen3, mesh, arrays, segments):
    """Two blocks of 128, the second one ragged; grouped heads; a weighted sum for the gradient."""
    monkeypatch.setattr(backends, "SPLASH_BLOCK", 128)
    splash = backends.row_attention("splash", mesh, qwen3, "float32")
    *inputs, weights = arrays

    def value_and_gradient(attend):
        def total(inputs):
            output = attend(*inputs, segments)
            return jnp.sum(output * weights), output

        return jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)

    (_, found), gradient = value_and_gradient(splash)
    (_, expected), right = value_and_gradient(causal_attention)
    # Both in float32; they sum up to 200 terms of order 1 in another order.
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for one, other in zip(gradient, right, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_padding_changes_nothing_before_it(qwen3, mesh, arrays):
    splash = jax.jit(backends.row_attention("splash", mesh, qwen3, "float32"))
    query, key, value, _ = (array[:, :130] for array in arrays)
    changed = [array.copy() for array in (query, key, value)]
    for array in changed:
        array[:, 100:] = 7.0
    before, after = splash(query, key, value, None), splash(*changed, None)
    np.testing.assert_array_equal(before[:, :100], after[:, :100])
    assert np.isfinite(after).all()


def test_a_model_computes_the_same_with_splash(qwen3, qwen3_params, mesh):
    tokens = np.arange(2 * 20).reshape(2, 20)
    positions = np.broadcast_to(np.arange(20), (2, 20))
    splash = backends.row_attention("splash", mesh, qwen3, "float32")
    found = jax.jit(hidden_states, static_argnums=1, static_argnames=("attention", "mesh"))(
        qwen3_params, qwen3, tokens, positions, attention=splash, mesh=mesh
    )
    expected = hidden_states(qwen3_params, qwen3, tokens, positions)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "packed", "chosen"),
    [
        ("cpu", "float32", False, "causal_attention"),
        ("cpu", "bfloat16", False, "causal_attention"),
        ("tpu", "bfloat16", False, "_splash"),
        ("tpu", "float32", True, "_splash"),
        ("gpu", "bfloat16", False, "_cudnn"),
        ("gpu", "bfloat16", True, "causal_attention"),
        ("gpu", "float32", False, "causal_attention"),
    ],
)
def test_auto_follows_the_platform_and_what_it_can_do(qwen3, platform, dtype, packed, chosen):
    config = dataclasses.replace(qwen3, head_dim=64)
    found = backends.row_attention("auto", mesh_of(platform), config, dtype, packed=packed)
    assert getattr(found, "func", found).__name__ == chosen


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "head_dim", "packed", "words"),
    [
        ("cudnn", "cpu", "bfloat16", 64, False, "runs on GPUs, not on the mesh's cpu"),
        ("cudnn", "tpu", "bfloat16", 64, False, "runs on GPUs, not on the mesh's tpu"),
        ("splash", "gpu", "bfloat16", 64, False, "runs on TPUs, not on the mesh's gpu"),
        ("cudnn", "gpu", "float32", 64, False, "bfloat16, not in `model.dtype` float32"),
        ("cudnn", "gpu", "bfloat16", 256, False, "up to 128 in steps of 8, not the model's 256"),
        ("cudnn", "gpu", "bfloat16", 20, False, "up to 128 in steps of 8, not the model's 20"),
        ("cudnn", "gpu", "bfloat16", 64, True, "not packed rows"),
    ],
)
def test_what_an_implementation_cannot_do_is_refused(qwen3, name, platform, dtype, head_dim, packed, words):
    config = dataclasses.replace(qwen3, head_dim=head_dim)
    with pytest.raises(UserError, match=r"`model.attention` is") as refusal:
        backends.row_attention(name, mesh_of(platform), config, dtype, packed=packed)
    assert words in str(refusal.value) and "choose xla or auto" in str(refusal.value)


def test_cudnn_refuses_segments_that_come_unannounced(qwen3, arrays):
    config = dataclasses.replace(qwen3, head_dim=64)
    cudnn = backends.row_attention("cudnn", mesh_of("gpu"), config, "bfloat16")
    with pytest.raises(UserError, match="one text to a row"):
        cudnn(*arrays[:3], packed_segments())


@pytest.mark.gpu
def test_cudnn_equals_xla_forward_and_backward(qwen3, arrays):
    mesh = make_mesh(MeshConfig(), jax.devices("gpu")[:1])
    config = dataclasses.replace(qwen3, head_dim=SIZE)
    cudnn = backends.row_attention("cudnn", mesh, config, "bfloat16")
    *inputs, weights = (jnp.asarray(array, jnp.bfloat16) for array in arrays)

    def gradient(attend):
        return jax.jit(
            jax.grad(lambda inputs: jnp.sum((attend(*inputs, None) * weights).astype(jnp.float32)))
        )(inputs)

    for one, other in zip(gradient(cudnn), gradient(causal_attention), strict=True):
        # bfloat16 has 8 bits; sums of up to 200 terms of order 1
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (one, other)), atol=0.1, rtol=0.05)


KERNELS = {"tpu": backends._tpu_slots, "gpu": functools.partial(backends._gpu_slots, interpret=True)}


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize(("heads", "length"), [(4, 96), (16, 528)], ids=["one page", "pages of 176"])
def test_paged_attention_equals_xlas(mesh, kind, heads, length):
    """Slots of different lengths, with large numbers beyond them in the cache; the last slot is idle."""
    rng = np.random.default_rng(2)
    positions = np.array([0, length - 1, length // 2, length])[:, None]
    query = rng.standard_normal((4, 1, heads, 128))
    keys, values = rng.standard_normal((2, 4, GROUPS, length, 128))
    unused = np.arange(length) > positions
    values = np.where(unused[:, None, :, None], 1e6, values)
    query, keys, values = (jnp.asarray(array, jnp.bfloat16) for array in (query, keys, values))
    arguments = query, LayerCache(keys, values), jnp.asarray(positions)
    expected = jax.jit(cached_attention)(*arguments)[:3]
    # Both results, and the scores' weights of one, are rounded to bfloat16: outputs of a slot with one token
    # are of order 1, of the others a tenth.
    for place in (None, mesh):
        with pallas_tpu.force_tpu_interpret_mode() if kind == "tpu" else contextlib.nullcontext():
            attend = functools.partial(backends._paged, mesh=place, attend=KERNELS[kind])
            found = jax.jit(attend)(*arguments)[:3]
        np.testing.assert_allclose(
            *(np.asarray(a, np.float32) for a in (found, expected)), atol=0.002, rtol=2**-7
        )


@pytest.mark.parametrize("length", [96, 1600, 6400])
def test_the_gpus_kernel_is_lowered_without_a_gpu(length):
    """To what a GPU's compiler gets."""
    query = jax.ShapeDtypeStruct((3, 1, 4, 128), jnp.bfloat16)
    cache = LayerCache(*[jax.ShapeDtypeStruct((3, GROUPS, length, 128), jnp.bfloat16)] * 2)
    traced = jax.jit(backends._gpu_slots).trace(query, cache, jax.ShapeDtypeStruct((3, 1), jnp.int32))
    assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "length"), [(4, 96), (16, 528)])
def test_paged_attention_on_a_gpu_equals_xlas(heads, length):
    rng = np.random.default_rng(2)
    positions = jnp.asarray([0, length - 1, length // 2])[:, None]
    query, keys, values = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((3, 1, heads, 128), *[(3, GROUPS, length, 128)] * 2)
    )
    arguments = query, LayerCache(keys, values), positions
    found, exact = (jax.jit(attend)(*arguments) for attend in (backends._gpu_slots, cached_attention))
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (found, exact)), 2**-6, 0.004)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "words"),
    [
        ("cpu", "bfloat16", 128, "runs on TPUs and GPUs, not on the mesh's cpu"),
        ("tpu", "float32", 128, "computes in bfloat16, not in `model.dtype` float32"),
        ("tpu", "bfloat16", 64, "takes heads of a multiple of 128, not the model's 64"),
        ("gpu", "bfloat16", 96, r"takes heads of (16, 32, 64, 128, 256), not the model's 96"),
    ],
)
def test_what_paged_attention_cannot_do_is_refused(qwen3, platform, dtype, head_dim, words):
    config = dataclasses.replace(qwen3, head_dim=head_dim)
    choose = functools.partial(backends.decode_attention, mesh=mesh_of(platform), config=config, dtype=dtype)
    assert choose("exact") is choose("int8") is cached_attention
    with pytest.raises(
        UserError, match=r"`rollout.cache` is 'paged', whose kernel .*; begin a new run with ro"
    ) as refusal:
        choose("paged")
    assert words in str(refusal.value)


def test_a_run_is_told_before_its_warm_start_that_a_cpu_has_no_pages(tmp_path):
    config = load_config(None, [f"run.directory={tmp_path / 'run'}", "rollout.cache=paged"])
    with pytest.raises(UserError, match=r"not on the mesh's cpu; begin a new run with rollout\.cache=exact"):
        train(config)
    assert not list((tmp_path / "run").glob("model/*"))


def test_what_a_cpu_has_anyway_is_not_moved_there():
    backends.check_remat("offload", mesh_of("tpu"))
    backends.check_remat("block", mesh_of("cpu"))
    with pytest.raises(UserError, match=r"`model.remat` is 'offload', .* choose block"):
        backends.check_remat("offload", mesh_of("cpu"))
