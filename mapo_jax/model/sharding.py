"""Which axis of which array lies on which axis of the device mesh: two tables, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mapo_jax.config import MeshConfig
from mapo_jax.errors import UserError
from mapo_jax.model.qwen import QwenConfig, parameter_shapes

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
}

# For rollout on several processes: each has all of every weight on its own devices, cut by tensor alone. A
# decode step reads every weight once, so one that has to travel first would cost far more than it computes.
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


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over all `devices` (default: all there are).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    given = 1
    for size in sizes:
        given *= size if size != -1 else 1
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
        given = len(devices)
    if given != len(devices):
        shape = ", ".join(
            f"mesh.{axis}={size}"
            for axis, size in zip(MESH_AXES, (config.data, config.fsdp, config.tensor), strict=True)
        )
        raise UserError(
            f"{shape} do not fill the {len(devices)} devices there are; "
            "make the product of the sizes equal to the number of devices, or leave one size at -1"
        )
    # Auto axes: shardings are propagated by the compiler, not part of the types.
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_shardings(
    config: QwenConfig, mesh: Mesh, rules: Mapping[str, str | tuple[str, ...] | None] = RULES
) -> dict[str, Any]:
    """The tree of `Params` with a NamedSharding in the place of each array.

    Args:
      rules: RULES, or ROLLOUT_RULES.

    Raises:
      UserError: a dimension of the model does not divide by the mesh axis that it is cut along.
    """

    def sharding(path, leaf):
        name = "/".join(entry.key for entry in path)
        axes = PARAMETER_AXES[name]
        for dimension, size in zip(axes, leaf.shape, strict=True):
            mesh_axis = rules[dimension]
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise UserError(
                    f"the model's {dimension} ({size}, in {name}) cannot be cut into "
                    f"mesh.{mesh_axis}={mesh.shape[mesh_axis]} equal parts; "
                    f"choose a mesh.{mesh_axis} that divides {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*(rules[dimension] for dimension in axes)))

    return jax.tree_util.tree_map_with_path(sharding, parameter_shapes(config))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis are rows, [B, ...]: over data and fsdp together."""
    return NamedSharding(mesh, PartitionSpec(RULES["rows"]))
