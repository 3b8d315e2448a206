"""Implementations of attention for whole rows and for decoded tokens, and the choice between them.

Causal attention over whole rows (`row_attention`):

| name   | runs on | packed rows | notes |
|--------|---------|-------------|-------|
| xla    | everything | yes | `attention.causal_attention`; scores of one block of queries at a time |
| splash | TPU (on a CPU interpreted, for tests) | yes | JAX's Pallas kernel; no scores in memory |
| cudnn  | NVIDIA GPU | no | `jax.nn.dot_product_attention`; bfloat16 only |

Attention of a decoded token to its cache (`decode_attention`): `attention.cached_attention` anywhere, which
reads whole caches, or JAX's Pallas kernel for TPUs or for GPUs, which read only the pages of a cache in use.

The platform is that of the mesh, not of the process: so a TPU program can be compiled without a TPU.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.decode_attention import mqa
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from mapo_jax.errors import UserError
from mapo_jax.model.attention import cached_attention, causal_attention
from mapo_jax.model.cache import LayerCache
from mapo_jax.model.qwen import CacheAttention, QwenConfig, RowAttention
from mapo_jax.model.sharding import RULES, activation_spec, platform, row_shards

LANES = 128  # width of a TPU vector register: splash cuts a row into multiples of it
SPLASH_BLOCK = 512  # most tokens of a block of queries or keys
PAGE = 512  # most tokens of a page
PAGE_MULTIPLE = 16  # a bfloat16 tile on a TPU has so many rows
GPU_BLOCK = 128  # most tokens that a GPU's kernel loads at once; a power of 2
GPU_HEADS = (16, 32, 64, 128, 256)
CUDNN_HEAD_DIM = 128  # largest head of cuDNN's backward pass


def row_attention(
    name: str, mesh: Mesh, config: QwenConfig, dtype: str, *, packed: bool = False
) -> RowAttention:
    """The attention of the setting `model.attention`.

    Args:
      name: xla, splash, cudnn, or auto: splash on TPUs, cudnn on GPUs where it supports the model, else xla.
      mesh: of the rows.
      config, dtype: the model, and its compute dtype.
      packed: whether rows hold several texts, separated by segments.

    Raises:
      UserError: the implementation does not support it; names the limit and the alternative.
    """
    name = attention_name(name, mesh, config, dtype, packed=packed)
    if name == "splash":
        return functools.partial(_splash, mesh=mesh, interpret=mesh.devices.flat[0].platform == "cpu")
    return {"xla": causal_attention, "cudnn": _cudnn}[name]


def attention_name(name: str, mesh: Mesh, config: QwenConfig, dtype: str, *, packed: bool = False) -> str:
    """The implementation that `row_attention` uses; same arguments and errors."""
    platform = mesh.devices.flat[0].platform
    if name == "auto":
        preferred = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
        name = "xla" if _limit(preferred, platform, config, dtype, packed) else preferred
    if limit := _limit(name, platform, config, dtype, packed):
        raise UserError(f"`model.attention` is {name!r}, which {limit}; choose xla or auto")
    return name


def stored_dtype(cache: str, dtype: str) -> str:
    """In which the setting `rollout.cache` stores keys and values; `dtype` is that of computation."""
    return "int8" if cache == "int8" else dtype


def decode_attention(cache: str, mesh: Mesh | None, config: QwenConfig, dtype: str) -> CacheAttention:
    """The attention of the setting `rollout.cache`, for one token of each slot.

    Args:
      cache: exact or int8, or paged: exact, and read by JAX's kernel, only its used pages.
      mesh: of the slots.
      config, dtype: the model, and its compute dtype.

    Raises:
      UserError: the kernel does not support it; names the limit and the alternative.
    """
    if cache != "paged":
        return cached_attention
    kind, size = platform(mesh), config.head_dim
    limits = {
        f"runs on TPUs and GPUs, not on the mesh's {kind}": kind not in ("tpu", "gpu"),
        f"computes in bfloat16, not in `model.dtype` {dtype}": dtype != "bfloat16",
        f"takes heads of a multiple of {LANES}, not the model's {size}": kind == "tpu" and size % LANES,
        f"takes heads of {GPU_HEADS}, not the model's {size}": kind == "gpu" and size not in GPU_HEADS,
    }
    if limit := next((limit for limit, holds in limits.items() if holds), None):
        raise UserError(
            f"`rollout.cache` is 'paged', whose kernel {limit}; begin a new run with rollout.cache=exact"
        )
    return functools.partial(_paged, mesh=mesh, attend={"tpu": _tpu_slots, "gpu": _gpu_slots}[kind])


def check_remat(name: str, mesh: Mesh) -> None:
    """Raises UserError if the setting `model.remat` cannot act on the mesh's devices."""
    if name == "offload" and mesh.devices.flat[0].platform == "cpu":
        raise UserError(
            "`model.remat` is 'offload', which moves what is kept of a layer from an accelerator to its "
            "host's memory; on a CPU it is there already: choose block"
        )


def _limit(name: str, platform: str, config: QwenConfig, dtype: str, packed: bool) -> str | None:
    """Why an implementation cannot be used, to follow the word "which"; None if it can."""
    if name == "splash" and platform not in ("tpu", "cpu"):
        return f"runs on TPUs, not on the mesh's {platform}"
    if name == "cudnn":
        if platform != "gpu":
            return f"runs on GPUs, not on the mesh's {platform}"
        if dtype != "bfloat16":
            return f"computes in bfloat16, not in `model.dtype` {dtype}"
        if config.head_dim > CUDNN_HEAD_DIM or config.head_dim % 8:
            return f"takes heads of up to {CUDNN_HEAD_DIM} in steps of 8, not the model's {config.head_dim}"
        if packed:
            return "takes one text to a row, not packed rows"
    return None


def _paged(query, cache: LayerCache, positions, *, mesh: Mesh | None, attend: CacheAttention):
    """One token of each slot by `attend`, which gets one device's slots and heads."""
    if mesh is None:
        return attend(query, cache, positions)
    heads = activation_spec("slot_heads")
    specs = (heads, activation_spec("cache"), PartitionSpec(RULES["slots"]))
    attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(query, cache, positions)


def _tpu_slots(query, cache: LayerCache, positions):
    """Each KV head of a slot is a sequence of its own, of consecutive pages."""
    slots, _, heads, size = query.shape
    groups, length = cache.values.shape[1:3]
    page = _page(length, PAGE_MULTIPLE)
    shape = (slots * groups, length // page)
    pages = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
    # From a bfloat16 query the kernel would round its sums after every page, where groups are of 8 heads.
    attended = paged_attention(
        (query.astype(jnp.float32) * size**-0.5).reshape(slots * groups, heads // groups, size),
        *(array.reshape(1, -1, page, size) for array in (cache.keys, cache.values)),
        lengths=jnp.repeat(_used(positions, length), groups),
        page_indices=pages,
        pages_per_compute_block=1,
    )
    return attended.reshape(query.shape).astype(query.dtype)


def _gpu_slots(query, cache: LayerCache, positions, *, interpret: bool = False):
    """Each KV head of a slot is a sequence of its own, whose pages are attended to in parallel."""
    slots, _, heads, size = query.shape
    groups, length = cache.values.shape[1:3]
    block = math.gcd(length, GPU_BLOCK)
    attended = mqa(
        query.reshape(slots * groups, heads // groups, size),
        *(array.reshape(slots * groups, length, size) for array in (cache.keys, cache.values)),
        kv_seq_len=jnp.repeat(_used(positions, length), groups),
        k_splits=length // _page(length, block),
        block_k=block,
        interpret=interpret,
    )
    return attended.reshape(query.shape)


def _page(length: int, multiple: int) -> int:
    """The largest multiple of `multiple`, up to PAGE, that divides the cache's length."""
    return max(p for p in range(multiple, PAGE + 1, multiple) if length % p == 0)


def _used(positions, length: int):
    """Tokens of each slot that its new token attends to. A position beyond the cache is that of an idle lane,
    whose output is meaningless."""
    return jnp.where(positions < length, positions + 1, 1)[:, 0]


def _cudnn(query, key, value, segments=None):
    # Rows are right-padded, so that with the causal mask no token attends to padding.
    if segments is not None:
        raise UserError("`model.attention` is 'cudnn', which takes one text to a row; choose xla or auto")
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


def _splash(query, key, value, segments=None, *, mesh: Mesh, interpret: bool):
    """Splash attention of each device's rows and heads, without communication."""
    batch, length, _, size = query.shape
    if batch % row_shards(mesh):
        raise UserError(
            f"{batch} rows at a time cannot be cut over the {row_shards(mesh)} devices of mesh.data x "
            "mesh.fsdp; use more of mesh.tensor, or begin a new run with another "
            "`training.minibatch_scenarios`"
        )
    # Padding comes last, so that no token attends to it; its output is cut off.
    block = min(SPLASH_BLOCK, -(-length // LANES) * LANES)
    padding = ((0, 0), (0, -length % block))
    if segments is not None:
        segments = jnp.pad(segments, padding, constant_values=-1)
    query, key, value = (jnp.pad(x, (*padding, (0, 0), (0, 0))) for x in (query * size**-0.5, key, value))
    attend = functools.partial(_splash_rows, block=block, interpret=interpret)
    heads, groups = activation_spec("heads"), activation_spec("kv_heads")
    specs = (heads, groups, groups, None if segments is None else activation_spec("tokens"))
    attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(query, key, value, segments)[:, :length]


def _splash_rows(query, key, value, segments, *, block: int, interpret: bool):
    batch, length, heads, size = query.shape
    share = heads // key.shape[2]
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * share)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = splash.BlockSizes(**dict.fromkeys(names, block))
    kernel = splash.make_splash_mqa_single_device(mask=mask, block_sizes=sizes, interpret=interpret)

    def row(query, key, value, segments):
        ids = None if segments is None else splash.SegmentIds(segments, segments)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(query, key, value)

    query = query.reshape(batch, length, -1, share, size).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    attended = jax.vmap(row)(query, key, value, segments)  # [B, G, H/G, L, E]
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)
