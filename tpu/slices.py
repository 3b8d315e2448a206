"""TPU slices by their names on Google Cloud: topology, and the published memory and speed of a chip."""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from mapo_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Memory and speed of one chip. https://cloud.google.com/tpu/docs/system-architecture-tpu-vm"""

    memory: float  # bytes that programs may use, from the compiler's message when one does not fit
    operations: float  # bfloat16 operations a second
    bandwidth: float  # bytes a second of its memory
    interconnect: float  # bytes a second that it can receive from other chips: half of both directions


GB = 1e9
CHIPS = {
    "v5e": Chip(15.75 * 2**30, 197e12, 819 * GB, 200 * GB),
    "v5p": Chip(95.74 * 2**30, 459e12, 2765 * GB, 600 * GB),
    "v6e": Chip(31.25 * 2**30, 918e12, 1640 * GB, 400 * GB),
}

# A v5p slice is named by its cores, two to a chip; the others by their chips.
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8",
}  # fmt: skip
TOPOLOGIES = {
    **{f"v5e-{chips}": f"v5e:{shape}" for chips, shape in _FLAT.items()},
    **{f"v5p-{cores}": f"v5p:{shape}" for cores, shape in _CUBE.items()},
    **{f"v6e-{chips}": f"v6e:{shape}" for chips, shape in _FLAT.items()},
}
ONE_HOST = {
    "v5e": "v5e-4",
    "v5p": "v5p-8",
    "v6e": "v6e-4",
}  # slices as large as one host of the larger slices

# Settings of libtpu on a machine without a TPU: no query of the cloud's metadata, no warnings.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}


def chip(name: str) -> Chip:
    """The chip of a slice. Raises UserError for an unknown slice."""
    _check_name(name)
    return CHIPS[name.split("-")[0]]


def slice_devices(name: str) -> list[jax.Device]:
    """The devices of a slice, for compilation; the slice need not exist.

    Raises:
      UserError: an unknown slice, or libtpu is missing.
    """
    _check_name(name)
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[name]).devices)
    except (RuntimeError, ImportError) as error:
        raise UserError(
            f"this machine cannot compile for TPUs ({' '.join(str(error).split())[:200]}); "
            "install libtpu: pip install -r requirements-tpu.txt"
        ) from error


def _check_name(name: str) -> None:
    if name not in TOPOLOGIES:
        raise UserError(f"there is no slice {name!r}; known are {', '.join(TOPOLOGIES)}")
