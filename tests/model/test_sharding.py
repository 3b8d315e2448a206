import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from mapo_jax.config import MeshConfig
from mapo_jax.errors import UserError
from mapo_jax.model import sharding
from mapo_jax.model.qwen import hidden_states, init_params, parameter_shapes
from tests.forked import run_on_devices


def test_one_device_needs_no_thought(qwen3, qwen3_params):
    """A trivial mesh: same fresh weights, and a jitted forward pass on sharded arguments."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    params = init_params(qwen3, 5, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, init_params(qwen3, 5))

    tokens = np.arange(12).reshape(2, 6)
    positions = np.broadcast_to(np.arange(6), (2, 6))
    forward = jax.jit(hidden_states, static_argnums=1)
    placed = jax.device_put(qwen3_params, sharding.param_shardings(parameter_shapes(qwen3), mesh))
    rows = jax.device_put((tokens, positions), sharding.batch_sharding(mesh))
    np.testing.assert_allclose(
        forward(placed, qwen3, *rows), hidden_states(qwen3_params, qwen3, tokens, positions), atol=1e-5
    )


def test_every_parameter_of_every_family_has_axes(any_config):
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(any_config))
    for path, leaf in leaves:
        assert len(sharding.PARAMETER_AXES["/".join(entry.key for entry in path)]) == leaf.ndim


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 1, 3), (-1, 1, 3)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(UserError, match=r"do not fill the 1 devices"):
        sharding.make_mesh(MeshConfig(**dict(zip(sharding.MESH_AXES, sizes, strict=True))), jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `make_mesh` asks of a device."""

    id: int
    process_index: int
    coords: tuple[int, ...] | None = None
    platform: str = "tpu"


def grid(size, host):
    """The chips of a slice in no order; each host has a block of `host`."""
    places = list(np.ndindex(*size))
    hosts = [tuple(p // h for p, h in zip(place, host, strict=True)) for place in places]
    numbers = {name: number for number, name in enumerate(sorted(set(hosts), key=lambda name: name[::-1]))}
    chips = [Chip(i, numbers[name], place) for i, (place, name) in enumerate(zip(places, hosts, strict=True))]
    np.random.default_rng(0).shuffle(chips)
    return chips


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize(
    ("size", "host"), [((16, 16, 1), (2, 2, 1)), ((4, 4, 4), (2, 2, 1)), ((4, 2, 1), (2, 2, 1))]
)
def test_tensor_lies_on_neighbours_within_a_host(size, host, tensor):
    mesh = sharding.make_mesh(MeshConfig(tensor=tensor), grid(size, host))
    assert set(mesh.devices.flat) == set(grid(size, host))

    def distance(a, b):
        return sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True))

    for group in mesh.devices.reshape(-1, tensor):
        assert len({chip.process_index for chip in group}) == 1
        assert all(distance(a, b) == 1 for a, b in zip(group, np.roll(group, 1), strict=True))  # a ring
    firsts = mesh.devices.reshape(-1, 4)[:, 0]  # of each host
    assert all(distance(a, b) in host for a, b in itertools.pairwise(firsts))


def test_devices_that_lie_nowhere_keep_their_order_within_their_process():
    devices = [Chip(number, number % 2, platform="cpu") for number in range(8)]
    found = sharding.make_mesh(MeshConfig(data=2, tensor=2), devices).devices
    assert [[d.id for d in row] for row in found.reshape(2, 4)] == [[0, 2, 4, 6], [1, 3, 5, 7]]


SHARDED = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import jax, numpy as np
from conftest import QWEN3
import dataclasses
import itertools
from mapo_jax.config import MeshConfig
from mapo_jax.errors import UserError
from mapo_jax.model import head, huggingface, qwen, sharding

assert len(jax.devices()) == 8
config = dataclasses.replace(QWEN3, vocab_size=132, tie_word_embeddings=False)
mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
params = qwen.init_params(config, 5, mesh)
gate = params["layers"]["mlp"]["gate"]["kernel"]
assert gate.sharding.shard_shape(gate.shape) == (3, 24, 40), gate.sharding
alone = qwen.init_params(config, 5)
jax.tree.map(np.testing.assert_array_equal, params, alone)

folder = Path(sys.argv[1])
huggingface.save_params(folder, params, config, dtype="float32", max_shard_bytes=40_000)
loaded = huggingface.load_params(folder, config, mesh)
jax.tree.map(np.testing.assert_array_equal, loaded, alone)
assert jax.tree.all(jax.tree.map(lambda one, other: one.sharding == other.sharding, loaded, params))

def score(params, tokens, positions):
    hidden = qwen.hidden_states(params, config, tokens, positions)
    return head.token_logprobs(params, config, hidden, tokens, chunk=16)[0]

rows = np.arange(48).reshape(4, 12), np.broadcast_to(np.arange(12), (4, 12))
placed = jax.device_put(rows, sharding.batch_sharding(mesh))
np.testing.assert_allclose(jax.jit(score)(params, *placed), jax.jit(score)(alone, *rows), atol=1e-5)

try:
    sharding.param_shardings(qwen.parameter_shapes(QWEN3), mesh)
except UserError as error:
    assert "vocabulary (131" in str(error) and "mesh.tensor=2" in str(error), error
else:
    raise AssertionError("a vocabulary of 131 cannot be halved")
print("sharded and equal")
"""


def test_eight_devices_create_load_and_compute_the_same(tmp_path):
    assert "sharded and equal" in run_on_devices(SHARDED, 8, [tmp_path, Path(__file__).parent])


def test_indivisible_heads_are_named(qwen3):
    # An abstract mesh stands for devices that this machine does not have.
    mesh = jax.sharding.AbstractMesh((1, 1, 4), sharding.MESH_AXES)
    config = dataclasses.replace(qwen3, vocab_size=132)
    with pytest.raises(UserError, match=r"kv_heads \(2.*mesh\.tensor=4"):
        sharding.param_shardings(parameter_shapes(config), mesh)
