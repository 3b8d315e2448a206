"""Benchmarks start; those for accelerators run on the CPU with the tiny shape and give right figures."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import SCRIPT, run_forked

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


STARTING = """
import os, runpy, sys
folder = os.path.dirname(sys.argv[1])
for file in sys.argv[1:]:
    path, sys.argv = sys.path[:], [file, "--help"]
    sys.path[0] = folder  # as Python does for a script
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    # The next must find the checkout by itself.
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(os.path.dirname(folder)) and "site-packages" not in file:
            del sys.modules[name]
"""


def test_they_start_where_only_the_requirements_are_installed(tmp_path):
    """One after the other in one process of another folder, which has imported the requirements once."""
    files = sorted(BENCHMARKS.glob("*.py"))
    command = [sys.executable, "-c", STARTING, *map(str, files)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(files) > 10
    for file in files:
        assert f"usage: {file.name}" in done.stdout


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def decode():
    return load("decode")


def test_ahead(tmp_path, monkeypatch, capsys):
    """Its figures, for runs whose times are known: the devices need 2 s of a step, and N steps ahead hide a
    part of the world's time."""
    ahead = load("ahead")
    calls = []

    def train(config, console):
        (collect,) = [ahead.stages.collect]
        n, world = config.rollout.ahead, 0.0 if collect is real else 7.0
        calls.append((n, world))
        seconds = max(2.0, (2.0 + world) / (n + 1))
        row = {"reward/mean": 0.0, "timing_s/step": seconds, "perf/device_busy": 2.0 / seconds}
        rows = [
            {"step": k} | row | {"timing_s/unix": seconds * k} for k in range(1, config.training.steps + 1)
        ]
        Path(config.run.directory).mkdir(parents=True)
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (Path(config.run.directory) / "metrics.jsonl").write_text(text)

    real = ahead.stages.collect
    monkeypatch.setattr(ahead.train, "train", train)
    monkeypatch.setattr(sys, "argv", ["ahead.py", "--tiny", "--json", str(tmp_path / "ahead.json")])
    assert ahead.main() == 0
    assert calls == [(0, 0.0), *((n, 0.0) for n in range(3)), *((n, 7.0) for n in range(3))]
    result = json.loads((tmp_path / "ahead.json").read_text())
    assert result["ratio"] == {"1": pytest.approx(2.0), "2": pytest.approx(3.0)}
    assert result["compute_bound_ratio"] == {"1": pytest.approx(1.0), "2": pytest.approx(1.0)}
    assert result["world_share"] == pytest.approx(3.5) and result["device_seconds"] == pytest.approx(2.0)
    assert result["device_busy"]["2"] == pytest.approx(2 / 3)
    assert "steps per hour" in capsys.readouterr().out


GPU = BENCHMARKS / "gpu.sh"


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The folder of the script for a GPU, in its small form: the parts whose programs no other test runs."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [GPU, folder, "--tiny", "update_4b", "decode_4b", "smollm2"]
    environment = {key: value for key, value in os.environ.items() if key != "SMOLLM2"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles faster
    done = subprocess.run(
        command, env=environment | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=400
    )
    logs = "".join(file.read_text() for file in folder.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return folder


def test_gpu_parts(gpu):
    rows = [line.split("\t") for line in (gpu / "summary.tsv").read_text().splitlines()]
    results = {part: result for part, result, _ in rows}
    assert results == {"part": "result", "smollm2": "left out: SMOLLM2 is no folder"} | dict.fromkeys(
        ("update_4b", "decode_4b"), "done"
    )


def test_gpu_parts_have_limits_and_are_independent(tmp_path):
    """A part that fails or outlasts its limit is said, and the others still run; all limits: 12 minutes."""
    python, clock = tmp_path / "python", tmp_path / "timeout"
    python.write_text('#!/bin/bash\necho "$@"\n[[ "$*" = *decode* ]] && exit 3\nexit 0\n')
    clock.write_text('#!/bin/bash\necho "${@:3:1}" >>"$(dirname "$0")/limits"\nshift 3\n"$@" || exit\n'
                     '[[ "$*" = *rollout* ]] && exit 124\nexit 0\n')  # fmt: skip
    for file in (python, clock):
        file.chmod(0o755)
    (tmp_path / "model").mkdir()
    environment = os.environ | {
        "PYTHON": str(python), "SMOLLM2": str(tmp_path / "model"), "PATH": f"{tmp_path}:{os.environ['PATH']}"
    }  # fmt: skip
    done = subprocess.run(
        [GPU, tmp_path / "out"], env=environment, capture_output=True, text=True, timeout=60
    )
    rows = [line.split("\t")[:2] for line in done.stdout.splitlines()]
    assert done.returncode == 1
    words = f"benchmarks/decode.py --shape 4b --json {tmp_path / 'out' / 'decode_4b.json'}"
    assert (
        ["decode_4b", f"failed: {words}"] in rows
        and ["rollout", "out of time"] in rows
        and rows[-1] == ["smollm2", "done"]
    )
    assert [part for part, result in rows if result == "done"] == [
        "smoke", "update_0.6b", "update_1.7b", "update_4b", "train", "smollm2"
    ]  # fmt: skip
    limits = [int(line) for line in (tmp_path / "limits").read_text().split()]
    assert len(limits) == len(rows) == 10 and sum(limits) <= 12 * 60
    unknown = subprocess.run([GPU, tmp_path / "out", "no"], capture_output=True, text=True, timeout=60)
    assert unknown.returncode == 2 and "'no' is no part" in unknown.stderr


def test_missing_packages(tmp_path, capsys, monkeypatch):
    """Also of a file that the file names, of an extra, and of a version that is too old."""
    missing = load("missing")
    (tmp_path / "base.txt").write_text("numpy  # any\nno-such-package>=2\n\n")
    file = tmp_path / "all.txt"
    file.write_text("-r base.txt\nrich<1\njax[cuda13]\n")
    monkeypatch.setattr(sys, "argv", ["missing.py", str(file)])
    assert missing.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no-such-package>=2" and lines[1].startswith("rich<1  # ")
    assert any(line.startswith("jax-cuda13-plugin[with-cuda]") for line in lines[2:])
    file.write_text("numpy\n")
    assert missing.main() == 0 and capsys.readouterr().out == "nothing is missing\n"


def test_decode(gpu):
    result = json.loads((gpu / "decode_4b.json").read_text())
    (row,) = result["rows"]
    # Embedding 512 x 64; per layer q and o 64 x 64, k and v 64 x 32, MLP 3 x 64 x 128, norms 2 x 64 + 2 x 16;
    # the last norm 64. Two bytes each.
    weights = 2 * (512 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 160) + 64)
    # 2 rows x 2 layers x keys and values x 2 heads of 16 bytes and a scale; 60 tokens midway.
    cache = 2 * 2 * 2 * 2 * (16 + 4) * 60
    assert row["bytes_per_step"] == weights + cache
    assert row["bound"] == pytest.approx(2 * result["bytes_per_second"] / (weights + cache))
    assert row["share"] == pytest.approx(row["tokens_per_second"] / row["bound"])
    assert "tiny" in (gpu / "decode_4b.log").read_text()


def test_published_shapes(decode):
    """Qwen3's published parameter counts: 0.6 and 4.0 billion, 0.44 and 3.6 billion without embedding."""
    from mapo_jax.model.qwen import parameter_count

    for name, total, rest in (("0.6b", 0.6e9, 0.44e9), ("4b", 4.0e9, 3.6e9)):
        config = decode.SHAPES[name]
        count, embedding = parameter_count(config), config.vocab_size * config.hidden_size
        assert count == pytest.approx(total, rel=0.02)
        assert count - embedding == pytest.approx(rest, rel=0.02)


def test_no_room(decode):
    with pytest.raises(SystemExit, match="no room"):
        decode.measure(decode.SHAPES["tiny"], {}, 2, 12, "bfloat16", 2, 4)


def test_update(gpu):
    """FLOPs by hand; an attention that is not available is listed with the reason."""
    result = json.loads((gpu / "update_4b.json").read_text())
    (row,), (left_out,) = result["rows"], result["left_out"]
    # Per layer q and o 64 x 64, k and v 64 x 32, MLP 3 x 64 x 128; 512 tokens. Two products of 4 heads of 16
    # with half of all pairs; the head for 256 tokens. Forward once, backward twice.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    pairs = 2 * 256 * 257 // 2
    flops = 3 * (2 * weights * 512 + 2 * 2 * 2 * 4 * 16 * pairs + 2 * 64 * 512 * 256)
    assert row["flops"] == pytest.approx(flops)
    assert row["mfu"] == pytest.approx(flops / row["seconds"] / result["flops_per_second"])
    assert left_out["attention"] == "cudnn" and "runs on GPUs" in left_out["reason"]


@pytest.mark.slow
def test_serve(tmp_path):
    """The server's throughput against its engine's, and the time to the first token."""
    options = "--quick --rounds 1 --no-transformers"
    arguments = [BENCHMARKS / "serve.py", "--json", tmp_path / "serve.json", *options.split()]
    done = run_forked(SCRIPT, arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "serve.json").read_text())
    speeds = result["tokens_per_second"]
    assert result["ratio"] == {"engine": pytest.approx(speeds["server"] / speeds["engine"])}
    firsts = result["first_token_seconds"]["server"]
    assert set(firsts) == {"1", "4"} and 0 < firsts["1"]["median"] <= firsts["1"]["most"]
    assert "transformers" in result["left_out"]


@pytest.mark.slow
def test_soak(tmp_path):
    """Rude clients: every reply is its own, all slots are free at the end, memory stays."""
    arguments = [BENCHMARKS / "soak.py", "--requests", "300", "--json", tmp_path / "soak.json"]
    done = run_forked(SCRIPT, arguments, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["problems"] == [] and result["status"] == 0
    assert 200 < result["kept_lines"] <= 350 and result["seconds"]["p99"] >= result["seconds"]["median"]
