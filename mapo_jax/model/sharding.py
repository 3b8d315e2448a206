"""Shardings: tables of which array axis is cut along which mesh axis, and functions over them."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mapo_jax.config import MeshConfig
from mapo_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. Every weight is cut along its width by fsdp, and along its other large axis by
# tensor, so that the two matrices of attention and of the MLP pair up with one reduction each (Megatron).
RULES: dict[str, str | tuple[str, ...] | None] = {
    "rows": ("data", "fsdp"),
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocabulary": "tensor",
    "head_dim": None,
    "layers": None,
    "norm": None,
    "rank": None,
    "length": None,  # tokens of a row
    "features": None,  # the width of hidden states, whose rows are cut already
    # Between layers a row is cut over the devices that share its heads, for norms and residuals; so is what
    # the backward pass keeps (sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198).
    "residual_length": "tensor",
    "slots": ("data", "fsdp"),
    "cache_length": None,
    # Decoding has one token per lane: it moves hidden states to the weights, not the other way round, and
    # cuts the hidden states as the weights are cut (Pope et al. 2022, arXiv:2211.05102, section 3.2.2).
    "lanes": "data",
    "lane_features": "fsdp",
    "sampling_lanes": ("data", "fsdp", "tensor"),
}

# For rollout on several processes: the devices of each hold every weight whole, cut by tensor alone. A decode
# step reads every weight once, so transferring it between hosts would cost far more than the computation.
ROLLOUT_RULES = RULES | {"width": None}

# Parameter path -> logical axis of each array axis.
PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    "embed/embedding": ("vocabulary", "width"),
    "layers/attention_norm/scale": ("layers", "norm"),
    "layers/attention/q/kernel": ("layers", "width", "heads", "head_dim"),
    "layers/attention/q/bias": ("layers", "heads", "head_dim"),
    "layers/attention/q_norm/scale": ("layers", "head_dim"),
    "layers/attention/k/kernel": ("layers", "width", "kv_heads", "head_dim"),
    "layers/attention/k/bias": ("layers", "kv_heads", "head_dim"),
    "layers/attention/k_norm/scale": ("layers", "head_dim"),
    "layers/attention/v/kernel": ("layers", "width", "kv_heads", "head_dim"),
    "layers/attention/v/bias": ("layers", "kv_heads", "head_dim"),
    "layers/attention/o/kernel": ("layers", "heads", "head_dim", "width"),
    "layers/mlp_norm/scale": ("layers", "norm"),
    "layers/mlp/gate/kernel": ("layers", "width", "mlp"),
    "layers/mlp/up/kernel": ("layers", "width", "mlp"),
    "layers/mlp/down/kernel": ("layers", "mlp", "width"),
    "norm/scale": ("norm",),
    "head/kernel": ("width", "vocabulary"),
}

# Adapters are cut as the axes of their kernel are.
for _kernel in [path for path in PARAMETER_AXES if path.startswith("layers/") and path.endswith("/kernel")]:
    _layers, *_axes = PARAMETER_AXES[_kernel]
    _inner = 2 if "/o/" in _kernel else 1  # axes that are summed over
    _module = _kernel.removesuffix("kernel")
    PARAMETER_AXES[_module + "lora_a"] = (_layers, *_axes[:_inner], "rank")
    PARAMETER_AXES[_module + "lora_b"] = (_layers, "rank", *_axes[_inner:])

# Other arrays -> logical axis of each array axis. Optimizer moments and gradients are cut like parameters.
ACTIVATION_AXES: dict[str, tuple[str, ...]] = {
    "tokens": ("rows", "length"),  # and everything of a batch that is [B, L]
    "hidden": ("rows", "length", "features"),
    "mlp": ("rows", "length", "mlp"),
    "residual": ("rows", "residual_length", "features"),
    "looked_up": ("lanes", "residual_length", "lane_features"),  # of the embedding, whose width is cut
    "heads": ("rows", "length", "heads", "head_dim"),
    "kv_heads": ("rows", "length", "kv_heads", "head_dim"),
    "cache": ("slots", "kv_heads", "cache_length", "head_dim"),
    "slot_heads": ("slots", "length", "heads", "head_dim"),
    "slot_kv_heads": ("slots", "length", "kv_heads", "head_dim"),
    "lane_heads": ("lanes", "length", "heads", "head_dim"),
    "lane_hidden": ("lanes", "length", "lane_features"),
    "lane_logits": ("lanes", "vocabulary"),  # as the head makes them
    "sampled_logits": ("sampling_lanes", "features"),  # a device samples for a few lanes
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over all `devices` (default: all there are).

    `tensor`, which communicates most, connects neighbours within a host, so that a host can sample by itself;
    the other axes connect neighbouring hosts. `jax.make_mesh` would map each mesh axis to an axis of the TPU
    slice, across several hosts, and has no mesh at all for 4 x 64 on 16 x 16 chips.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    product = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % product == 0:
        sizes[sizes.index(-1)] = len(devices) // product
        product = len(devices)
    if product != len(devices):
        raise UserError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor} do not fill the "
            f"{len(devices)} devices there are; "
            "make the product of the sizes equal to the number of devices, or leave one size at -1"
        )
    # Auto axes: shardings are propagated by the compiler, not part of the types.
    ordered = np.asarray(host_order(devices)).reshape(sizes)
    return Mesh(ordered, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def host_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Devices host by host, each beside a neighbour.

    TPUs have grid coordinates: the devices follow one path through their host, the hosts one through the
    slice. Other devices keep their order within their host.
    """
    hosts: dict[tuple[int, int], list[jax.Device]] = {}
    for device in devices:
        hosts.setdefault((getattr(device, "slice_index", None) or 0, device.process_index), []).append(device)
    if not all(getattr(device, "coords", None) for device in devices):
        return [device for key in sorted(hosts) for device in hosts[key]]
    corners = {
        key: tuple(map(min, zip(*(device.coords for device in group), strict=True)))
        for key, group in hosts.items()
    }
    path = snake(corners.values())
    for group in hosts.values():
        inner = snake(device.coords for device in group)
        group.sort(key=lambda device: (inner[tuple(device.coords)], device.id))
    ordered = sorted(hosts, key=lambda key: (key[0], path[corners[key]]))
    return [device for key in ordered for device in hosts[key]]


def snake(places: Iterable[Sequence[int]]) -> dict[tuple[int, ...], int]:
    """Numbers the places of a full grid along a path on which each is a neighbour of the one before."""
    places = {tuple(place) for place in places}
    axes = [sorted(set(values)) for values in zip(*places, strict=True)]
    numbers = {}
    for place in places:
        number = 0
        for value, values in zip(reversed(place), reversed(axes), strict=True):
            index = values.index(value)
            number = number * len(values) + (len(values) - 1 - index if number % 2 else index)
        numbers[place] = number
    return numbers


def param_shardings(
    shapes: Mapping[str, Any], mesh: Mesh, rules: Mapping[str, str | tuple[str, ...] | None] = RULES
) -> dict[str, Any]:
    """The tree of `Params` with a NamedSharding for each array.

    Args:
      shapes: the tree of arrays or of their shapes, as of `qwen.parameter_shapes`.
      rules: RULES, or ROLLOUT_RULES.

    Raises:
      UserError: a dimension of the model is no multiple of the mesh axis that it is cut along.
    """

    def sharding(path, leaf):
        name = "/".join(entry.key for entry in path)
        axes = PARAMETER_AXES[name]
        for dimension, size in zip(axes, leaf.shape, strict=True):
            mesh_axis = rules[dimension]
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise UserError(
                    f"the model's {dimension} ({size}, in {name}) cannot be cut into mesh.{mesh_axis}="
                    f"{mesh.shape[mesh_axis]} equal parts; choose a mesh.{mesh_axis} that divides {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*(rules[dimension] for dimension in axes)))

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """A tree of arrays or shapes as `jax.ShapeDtypeStruct`s with these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def decoding_shardings(shapes: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """`param_shardings` for what `qwen.for_decoding` returns: each layer is cut like the stack of them."""
    shardings = param_shardings(shapes, mesh)
    count = jax.tree.leaves(shapes["layers"])[0].shape[0]
    layer = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), shardings["layers"])
    return shardings | {"layers": [layer] * count}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays [B, ...] whose first axis counts rows: over data and fsdp together."""
    return NamedSharding(mesh, PartitionSpec(RULES["rows"]))


def activation_spec(name: str) -> PartitionSpec:
    """Mesh axes of an array of ACTIVATION_AXES."""
    return PartitionSpec(*(RULES[axis] for axis in ACTIVATION_AXES[name]))


def constrain(array: jax.Array, name: str, mesh: Mesh | None) -> jax.Array:
    """Fixes the sharding of an array inside a compiled program; on one device, does nothing."""
    if mesh is None or mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, activation_spec(name)))


def gather_rows(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """From "residual" to "hidden"; the gradient is summed, then cut."""
    # Cut in its own precision first: the compiler would gather the float32 numbers that a norm computes with.
    return constrain(constrain(array, "residual", mesh), "hidden", mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def cut_rows(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """From sums not yet made to "residual"; the gradient is gathered once for all products that need it."""
    return constrain(array, "residual", mesh)


cut_rows.defvjp(
    lambda array, mesh: (cut_rows(array, mesh), None),
    lambda mesh, _, gradient: (gather_rows(gradient, mesh),),
)


def row_shards(mesh: Mesh | None) -> int:
    """Number of shards of rows and of slots."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["rows"])


def platform(mesh: Mesh | None) -> str:
    """cpu, gpu or tpu: of the mesh, or of the first device."""
    return (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform


def sharding_table(shapes: Mapping[str, Any], mesh: Mesh) -> list[str]:
    """One line for each parameter and each kind of other array.

    `embed/embedding  4096/tensor x 128/fsdp = 2048 x 64`: sizes, mesh axes that they are cut along, and the
    shape on each device.
    """

    def cut(sizes: Sequence[Any], spec: PartitionSpec) -> str:
        axes = ("+".join(axis) if isinstance(axis, tuple) else axis for axis in spec)
        pairs = zip(sizes, axes, strict=True)
        return " x ".join(f"{size}/{axis}" if axis else f"{size}" for size, axis in pairs)

    table = []
    parameters = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, leaf), placed in zip(parameters, jax.tree.leaves(param_shardings(shapes, mesh)), strict=True):
        name = "/".join(entry.key for entry in path)
        local = " x ".join(map(str, placed.shard_shape(leaf.shape)))
        table.append(f"{name:<30} {cut(leaf.shape, placed.spec)} = {local}")
    table += [f"{name:<30} {cut(axes, activation_spec(name))}" for name, axes in ACTIVATION_AXES.items()]
    return table
