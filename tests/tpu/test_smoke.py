"""The smoke test of a slice, on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "tpu" / "smoke.py"


@pytest.fixture(scope="module")
def smoke():
    spec = importlib.util.spec_from_file_location("smoke", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_is_well_here(tmp_path):
    done = subprocess.run(
        [sys.executable, FILE, "--storage", tmp_path / "smoke"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert [line[:14].strip() for line in said] == ["devices", "collective", "storage", "training step"]
    assert "361,216 parameters" in said[3]
    assert list((tmp_path / "smoke").iterdir()) == []  # nothing is left behind


def test_what_fails_is_said_and_makes_the_exit_status(smoke, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smoke, "join", lambda: None)  # this process has used its devices already
    monkeypatch.setattr(smoke, "training_step", lambda: "skipped here")
    (tmp_path / "file").write_text("no folder")
    assert smoke.main(["--storage", str(tmp_path / "file")]) == 1
    said = capsys.readouterr().out
    assert "storage" in said and "FAILED" in said and "collective" in said
