"""The smoke test of a slice, on the CPU."""

import importlib.util
from pathlib import Path

import jax
import pytest


@pytest.fixture(scope="module")
def smoke():
    file = Path(__file__).resolve().parents[2] / "tpu" / "smoke.py"
    spec = importlib.util.spec_from_file_location("smoke", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_is_well_here(smoke, tmp_path, capsys):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert smoke.main(["--storage", str(tmp_path / "smoke")]) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in said] == ["devices", "collective", "storage", "training step"]
    assert "361,216 parameters" in said[3]
    assert list((tmp_path / "smoke").iterdir()) == []  # nothing is left behind


def test_what_fails_is_said_and_makes_the_exit_status(smoke, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smoke, "training_step", lambda: "skipped here")
    (tmp_path / "file").write_text("no folder")
    assert smoke.main(["--storage", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().out
    assert "storage" in said and "FAILED" in said and "collective" in said
