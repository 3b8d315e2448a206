"""A forecast of each device's memory by kind, from shapes: during updates, and while dialogues are held.

Arrays that live for the whole run are counted from their shapes and shardings. An update's additional memory
is computed per device from its micro-batch:

- residuals of the backward pass: what `jax.vjp` of one layer keeps under the remat policy, for every layer;
- the work of one layer: its residuals without remat, two blocks of attention scores, its gathered weights and
  their gradient, and a few hidden states;
- or, if larger, the work of the head: its gathered matrix and gradient, and four times a chunk's logits.

The compiler orders its buffers differently, so its figure differs: by at most 10 % on a CPU
(tests/learning/test_scale.py), and by at most 7 % for the updates that were compiled for TPU slices, or, with
adapters, up to 14 % too large (tests/tpu/test_compile.py). Those all have remat block: with none or minimal a
TPU's compiler also casts all weights before the loop over layers, which is not counted.
"""

import functools
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mapo_jax.config import Config
from mapo_jax.learning.batch import microbatch_rows, row_lengths
from mapo_jax.learning.optimizer import make_optimizer
from mapo_jax.learning.programs import loss_tokens, minibatch_rows
from mapo_jax.learning.train_state import abstract_state, trained_and_frozen
from mapo_jax.model import head, qwen
from mapo_jax.model.attention import causal_attention, query_block, rotary_angles
from mapo_jax.model.backends import attention_name, stored_dtype
from mapo_jax.model.qwen import Params, QwenConfig, in_precision, parameter_shapes, sums_in_place
from mapo_jax.model.sharding import RULES, param_shardings, row_shards, with_shardings
from mapo_jax.rollout.capacity import cache_bytes, copies_weights
from mapo_jax.rollout.completion import role_engines
from mapo_jax.running import processes as hosts
from mapo_jax.running.policy import read_shape

GIB = 2**30
TPU_WORK = 0.89  # factor of the work of a layer or of the head on a TPU, whose compiler shares more of it
BATCH_BYTES = 4 + 4 + 1 + 4 + 4 + 4  # per token of `batch.Batch`


@dataclass(frozen=True)
class Forecast:
    """Bytes of each device by kind; kinds without memory are absent."""

    held: dict[str, float]  # during the whole run, with the engines of roles
    update: dict[str, float]  # in addition, during updates
    rollout: dict[str, float]  # in addition, while dialogues are held
    roles: float = 0.0  # of what is held: the engines of roles

    @property
    def most(self) -> float:
        """The peak."""
        return sum(self.held.values()) + max(sum(self.update.values()), sum(self.rollout.values()))


def forecast_memory(config: Config, model: QwenConfig, mesh: Mesh) -> Forecast:
    """The memory that a run will need.

    Args:
      model: its shape, with adapters if any.
    """
    length = row_lengths(config.rollout.max_tokens)[-1]
    dtype = config.model.dtype
    shapes, optimizer = parameter_shapes(model, dtype), make_optimizer(config.optimizer, 1)
    shardings, reference = param_shardings(parameter_shapes(model), mesh), config.algorithm.kl_coefficient > 0
    state = abstract_state(shapes, optimizer, shardings=shardings, reference=reference)
    trained = _bytes(state.params)
    held = {
        "weights that are trained": trained,
        f"frozen weights ({dtype})": _bytes(state.base),
        "AdamW's moments": _bytes(state.opt_state),
        "frozen reference": _bytes(state.reference),
    }
    engines = engines_memory(config, mesh)
    held |= engines
    total, shards = minibatch_rows(config), row_shards(mesh)
    rows = microbatch_rows(total, length, config.training.microbatch_tokens, shards)
    share = _device_share(model, mesh)
    attention = attention_name(config.model.attention, mesh, model, dtype)
    microbatch = _Microbatch(share, rows // shards, length, dtype, attention, mesh.shape["tensor"])
    in_place = sums_in_place(config.model.remat, model)
    work = max(_layer_work(microbatch), _head_work(config, microbatch, model, mesh, in_place))
    if mesh.devices.flat[0].platform == "tpu":
        work *= TPU_WORK
    remat = config.model.remat
    kept_layers = 2 if remat == "offload" else model.num_layers  # one is moved while the next is computed
    update = {
        "rows of a mini-batch": BATCH_BYTES * total // shards * length,
        "gradient": trained if rows == total or in_place else 2 * trained,
        f"kept for the backward pass (remat {remat})": kept_layers * _kept(microbatch, remat),
        "work of one layer or of the head": work,
    }
    rollout = rollout_memory(config, model, mesh, state.weights)
    if config.rollout.ahead:  # dialogues are held while updates run
        held, rollout = held | rollout, {}
    phases = ({kind: size for kind, size in sizes.items() if size} for sizes in (held, update, rollout))
    return Forecast(*phases, roles=sum(engines.values()))


def engines_memory(config: Config, mesh: Mesh) -> dict[str, float]:
    """Memory of the frozen models that play roles on this machine, and of their caches.

    Raises:
      UserError: the shape of such a model cannot be read.
    """
    dtype = config.model.dtype
    own_mesh = hosts.rollout_mesh(mesh, hosts.Processes(0, hosts.process_count(mesh)))
    weights = caches = 0.0
    for engine in role_engines(config.environment):
        model = read_shape(engine.folder)
        shapes = with_shardings(parameter_shapes(model), param_shardings(parameter_shapes(model), own_mesh))
        weights += _bytes(in_precision(shapes, dtype))
        caches += (
            cache_bytes(model, engine.slots, engine.slots, engine.tokens, jnp.dtype(dtype)) / own_mesh.size
        )
    return {f"models of roles ({dtype})": weights, f"KV caches of roles ({dtype})": caches}


def rollout_memory(config: Config, model: QwenConfig, mesh: Mesh, weights: Params) -> dict[str, float]:
    """Memory while dialogues are held: each process has its share of them on its devices.

    `weights` are `jax.ShapeDtypeStruct`s with shardings.
    """
    processes = hosts.Processes(0, hosts.process_count(mesh))
    share, own_mesh = hosts.share_of(config.rollout, processes.count), hosts.rollout_mesh(mesh, processes)
    dtype = config.model.dtype
    dialogues = share.scenarios * share.rollouts
    resident = min(share.slots or dialogues, dialogues)
    steps = 1 + share.ahead  # under way at once, each with caches and weights of its own
    vocabulary = _device_share(model, mesh).vocab_size
    cache_dtype = stored_dtype(share.cache, dtype)
    caches = cache_bytes(model, resident, resident, share.max_tokens, jnp.dtype(cache_dtype)) / own_mesh.size
    logits = 3 * 4 * -(-resident // row_shards(own_mesh)) * vocabulary
    sizes = {f"KV caches ({cache_dtype})": steps * caches, "logits of the lanes": logits}
    whole = 0
    if share.ahead:  # which updates leave alone
        trained, frozen = trained_and_frozen(in_precision(weights, dtype))
        sizes[f"weights of {steps} steps ({dtype})"] = steps * _bytes(trained) + _bytes(frozen)
    if processes.count > 1:
        weights = hosts.abstract_rollout_weights(weights, model, own_mesh, dtype)
        whole = _bytes(weights)
    if not copies_weights(share.copy_weights, own_mesh):
        return {f"weights of a host ({dtype})": steps * whole} | sizes
    copy = hosts.abstract_rollout_weights(weights, model, own_mesh, dtype, RULES)
    # The gathered weights are freed before caches are allocated, unless other steps are under way.
    more = whole if share.ahead else max(0, whole - sum(sizes.values()))
    return {f"copy of the weights ({dtype})": steps * _bytes(copy), "more, while it is made": more} | sizes


def device_memory(mesh: Mesh) -> int | None:
    """Memory of each device in bytes; None if unknown (a device that is only compiled for)."""
    devices = list(mesh.devices.flat)
    try:
        limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        limit = None
    if limit is None and devices[0].platform == "cpu":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(mesh.local_devices)
    return limit


def _bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _device_share(model: QwenConfig, mesh: Mesh) -> QwenConfig:
    """The model with one device's share of the heads, of the MLP and of the vocabulary."""
    tensor = mesh.shape["tensor"]
    return replace(
        model,
        num_heads=model.num_heads // tensor,
        num_kv_heads=model.num_kv_heads // tensor,
        intermediate_size=model.intermediate_size // tensor,
        vocab_size=model.vocab_size // tensor,
    )


@dataclass(frozen=True)
class _Microbatch:
    """The rows that one device computes at a time."""

    model: QwenConfig  # with the device's share
    rows: int
    length: int
    dtype: str
    attention: str
    parts: int  # that a row is cut into between layers

    @property
    def hidden(self) -> int:
        """Bytes of one array of hidden states."""
        return self.rows * self.length * self.model.hidden_size * jnp.dtype(self.dtype).itemsize


@functools.lru_cache(maxsize=64)
def _kept(batch: _Microbatch, remat: str) -> int:
    """Bytes of one layer's residuals: what its backward pass needs of its forward pass, without weights."""
    config, dtype = batch.model, jnp.dtype(batch.dtype)
    # A fused kernel keeps its inputs and output, but no scores.
    attend = causal_attention if batch.attention == "xla" else jax.checkpoint(causal_attention)

    def place(array, name):  # by shape: gathered, or one part
        if name in ("tokens", "mlp"):
            return array
        return jnp.tile(array, (1, batch.parts, 1)) if name == "hidden" else array[:, :part]

    def layer(x, weights, rotary):
        def block(x, weights):
            def attended(*qkv):
                return attend(*qkv), None

            return qwen.run_block(config, dtype, weights, x, rotary, attended, place)[0]

        if remat != "none":
            block = jax.checkpoint(block, policy=qwen.REMAT[remat])
        return jax.vjp(block, x, weights)[1]

    layers = parameter_shapes(config, batch.dtype)["layers"]
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), layers)
    part = -(-batch.length // batch.parts)
    x = jax.ShapeDtypeStruct((batch.rows, part, config.hidden_size), dtype)
    positions = jax.ShapeDtypeStruct((batch.rows, part * batch.parts), jnp.int32)
    rotary = jax.eval_shape(lambda at: rotary_angles(at, config.head_dim, config.rope_theta), positions)
    kept = jax.tree.leaves(jax.eval_shape(layer, x, weights, rotary))
    # Weights and rotary angles are counted elsewhere.
    elsewhere = {(leaf.shape, leaf.dtype) for leaf in (*jax.tree.leaves(weights), *rotary)}
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in kept if (leaf.shape, leaf.dtype) not in elsewhere)
    if remat == "none" and batch.attention != "xla":
        size += batch.rows * batch.length * config.num_heads * config.head_dim * dtype.itemsize
    return size


def _layer_work(batch: _Microbatch) -> int:
    model, length = batch.model, batch.length
    scores = (batch.attention == "xla") * batch.rows * model.num_heads * query_block(length) * length * 4
    layers = parameter_shapes(model, batch.dtype)["layers"]
    weights = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    return _kept(batch, "none") + 2 * scores + 2 * weights + 3 * batch.hidden


def _head_work(config: Config, batch: _Microbatch, model: QwenConfig, mesh: Mesh, in_place: bool) -> int:
    share = batch.model
    matrix = share.vocab_size * share.hidden_size
    gathered = mesh.shape["fsdp"] > 1 or batch.dtype != "float32"
    scored = batch.rows * min(loss_tokens(config), batch.length)
    logits = min(head.head_chunk(model.vocab_size), scored) * share.vocab_size * 4
    gradient = (model.lora is None and (mesh.shape["fsdp"] > 1 or in_place)) * matrix * 4
    return gathered * matrix * jnp.dtype(batch.dtype).itemsize + gradient + 4 * logits + 3 * batch.hidden
