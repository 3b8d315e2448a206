"""Models by name, from a cache of huggingface_hub that the tests fill; nothing is downloaded."""

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from mapo_jax import train
from mapo_jax.config import load_config
from mapo_jax.errors import UserError
from mapo_jax.evaluation.subject import find_subject
from mapo_jax.hub import cached, fetch, hub_id
from mapo_jax.model.huggingface import write_config
from mapo_jax.model.lora import LoRA
from mapo_jax.model.peft import base_folder, write_adapter_config
from mapo_jax.running import forecast, published
from mapo_jax.running.policy import read_shape

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with two versions of house/small, `main` and `v1`: shapes alone."""
    repo = tmp_path / "hub" / "models--house--small"
    for revision, commit, layers in (("main", COMMIT, 2), ("v1", COMMIT[::-1], 3)):
        folder, reference = repo / "snapshots" / commit, repo / "refs" / revision
        folder.mkdir(parents=True)
        write_config(folder, replace(published.SHAPES["Qwen3-0.6B"], num_layers=layers))
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return repo / "snapshots"


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", None),
        ("Qwen/Qwen3-8B@refs/pr/1", "Qwen/Qwen3-8B", "refs/pr/1"),
        ("runs/tiny@main", "runs/tiny", "main"),
    ],
)
def test_an_id_is_told_from_a_folder(tmp_path, monkeypatch, name, repo, revision):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_id(name) == (repo, revision)
    (tmp_path / name).mkdir(parents=True)
    assert hub_id(name) is None and fetch(name) == name == cached(name)


@pytest.mark.parametrize(
    "name", ["runs/tniy", "tiny", "./a/b", "/a/b", "a/b/c", "gs://a/b", "../a/b", "a/b@", ""]
)
def test_a_path_is_no_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_id(name) is None


def test_a_model_is_taken_from_the_cache(hub):
    assert fetch("house/small") == cached("house/small") == hub / COMMIT
    assert fetch("house/small@v1") == hub / COMMIT[::-1]
    assert read_shape("house/small").num_layers == 2 and read_shape("house/small@v1").num_layers == 3
    options = argparse.Namespace(
        model="house/small", step=None, endpoint=None, config=None, overrides=[], trust_run_world=False
    )
    subject = find_subject(options)
    assert (subject.name, str(subject.home)) == ("small", "evaluations/small")
    assert subject.identity == {"model": "house/small", "commit": COMMIT}
    assert subject.path == str(hub / COMMIT)
    options.step = 3
    with pytest.raises(UserError, match="house/small is no run"):
        find_subject(options)


def test_adapters_name_their_base_on_the_hub(hub, tmp_path):
    write_adapter_config(tmp_path, LoRA(2, 4.0, ("q",)), "house/small")
    assert base_folder(tmp_path) == hub / COMMIT
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | {"revision": "v1"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert base_folder(tmp_path) == hub / COMMIT[::-1]


@pytest.mark.parametrize(
    ("name", "layers"),
    [("Qwen/Qwen3-0.6B", "28 layers x 1024"), ("Qwen/Qwen2.5-0.5B-Instruct@main", "24 layers x 896")],
)
def test_a_dry_run_of_a_known_shape_needs_no_weights(hub, capsys, monkeypatch, name, layers):
    arguments = ["--dry-run", f"model.path={name}", "rollout.max_tokens=1024", "lora.rank=8"]
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: None)  # whatever this machine has
    assert train.main(arguments) == 0
    assert layers in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(forecast, "device_memory", lambda mesh: 2**30)
    assert train.main(arguments) == 2
    assert "has 1.0 GiB" in capsys.readouterr().err


def test_without_network_one_sentence_names_the_command(hub, capsys):
    for arguments in (
        ["--dry-run", "model.path=house/other@v2"],
        ["model.path=house/other@v2", "run.directory=new"],
    ):
        assert train.main(arguments) == 2
        error = capsys.readouterr().err
        assert "`hf download house/other --revision v2`" in error and error.count("\n") == 1
    assert not (hub.parents[2] / "new" / "model").exists()


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("no", response=RESPONSE), "a/b is gated: accept its terms"),
        (errors.RevisionNotFoundError("no", response=RESPONSE), "a/b has no revision 'v9'"),
        (errors.RepositoryNotFoundError("no", response=RESPONSE), "neither a folder a/b@v9 nor a model a/b"),
        (errors.HfHubHTTPError("no", response=RESPONSE), "hf download a/b --revision v9"),
        (errors.IncompleteSnapshotError("no", "x"), r"not \(wholly\) in Hugging Face's cache"),
    ],
)
def test_refusals_of_the_hub_are_one_sentence(monkeypatch, error, message):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message):
        fetch("a/b@v9")


def test_weights_can_be_left_out(monkeypatch):
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: calls.append(options) or "somewhere"
    )
    for weights in (True, False):
        fetch("a/b@v1", weights=weights)
    assert [("*.safetensors" in call["allow_patterns"], call["revision"]) for call in calls] == [
        (True, "v1"),
        (False, "v1"),
    ]
    assert load_config(None, ["model.path=a/b@v1"]).model.path == "a/b@v1"
