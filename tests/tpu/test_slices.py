"""Slices and shapes, compared with published figures; libtpu is not needed."""

import json
import math

import pytest

from mapo_jax.config import load_config
from mapo_jax.errors import UserError
from mapo_jax.model.qwen import parameter_count
from tpu import slices
from tpu.shapes import SHAPES, model_shape


@pytest.mark.parametrize("name", slices.TOPOLOGIES)
def test_a_slice_is_named_by_its_chips_or_cores(name):
    kind, number = name.split("-")
    topology = slices.TOPOLOGIES[name].split(":")[1]
    chips = math.prod(map(int, topology.split("x")))
    assert chips * (2 if kind == "v5p" else 1) == int(number)


def test_an_unknown_slice_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"no slice 'v5p-100'; known are .*v5p-128"):
        slices.chip("v5p-100")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_the_published_ones(shared_data, name):
    published = json.loads((shared_data / "qwen_configs.json").read_text())[name]
    shape = SHAPES[name]
    assert parameter_count(shape) == published["params"]
    for ours, theirs in (
        ("hidden_size", "hidden"),
        ("num_layers", "layers"),
        ("num_heads", "q"),
        ("num_kv_heads", "kv"),
        ("head_dim", "head_dim"),
        ("intermediate_size", "ff"),
        ("vocab_size", "vocab"),
        ("tie_word_embeddings", "tie"),
        ("rope_theta", "rope_theta"),
        ("max_position_embeddings", "max_pos"),
    ):
        assert getattr(shape, ours) == published[theirs], ours


def test_a_folder_wins_over_a_published_shape_and_a_stranger_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_shape(load_config(None, ["model.path=models/Qwen3-8B"]), layers=2).num_layers == 2
    with pytest.raises(UserError, match=r"'models/Other': no such folder.*Qwen3-8B"):
        model_shape(load_config(None, ["model.path=models/Other"]))
