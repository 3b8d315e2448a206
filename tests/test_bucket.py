"""A run folder in a bucket: the same code, over a backend of `epath` that keeps gs:// on a disk.

Arrays are not covered here: tensorstore speaks to the storage itself. A whole run was held once against an
emulator of the storage; docs/design.md says how.
"""

import contextlib
import json
import os

import pytest
from etils.epath import backend, gpath

from mapo_jax.config import load_config
from mapo_jax.errors import UserError
from mapo_jax.files import append_line, as_path, copy_files, in_bucket, local_folder, write_whole
from mapo_jax.running import metrics
from mapo_jax.running.metrics import MetricWriter
from mapo_jax.running.run_folder import best_steps, claim, cut_back, whole_steps


class Bucket(backend._OsPathBackend):
    """gs://... as files below a folder; objects are neither renamed nor appended to, folders not made."""

    def __init__(self, root):
        self.root, self.writable = root, True

    def _at(self, path):
        return os.path.join(self.root, os.fspath(path).removeprefix("gs://"))

    def open(self, path, mode):
        assert "a" not in mode
        if "w" in mode:
            if not self.writable:
                raise PermissionError(13, "403: no storage.objects.create access", os.fspath(path))
            os.makedirs(os.path.dirname(self._at(path)), exist_ok=True)
        return super().open(self._at(path), mode)

    def exists(self, path):
        return super().exists(self._at(path))

    def isdir(self, path):
        return super().isdir(self._at(path))

    def listdir(self, path):
        return super().listdir(self._at(path))

    def glob(self, path):
        return [f"gs://{os.path.relpath(found, self.root)}" for found in super().glob(self._at(path))]

    def makedirs(self, path, **_):
        pass

    def mkdir(self, path, **_):
        pass

    def remove(self, path):
        super().remove(self._at(path))

    def rename(self, path, dst):
        raise AssertionError("an object was renamed")

    def replace(self, path, dst):
        raise AssertionError("an object was renamed")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    held = Bucket(str(tmp_path))
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", held)
    return held


def test_objects_are_written_whole_and_lines_appended(bucket, tmp_path):
    write_whole("gs://b/run/x/file", "one\n")
    append_line("gs://b/run/x/file", b"two\n")
    append_line("gs://b/run/x/other", b"three\n")
    assert (tmp_path / "b/run/x/file").read_text() == "one\ntwo\n"
    assert as_path("gs://b/run/x/other").read_text() == "three\n"
    assert in_bucket(as_path("gs://b/run")) and str(as_path("gs://b/run") / "x") == "gs://b/run/x"
    with local_folder("gs://b/run/x") as here:
        assert sorted(file.name for file in here.iterdir()) == ["file", "other"]
    copy_files(as_path("gs://b/run/x"), as_path("gs://b/copy"))
    assert (tmp_path / "b/copy/file").read_text() == "one\ntwo\n"


def test_a_run_is_claimed_continued_and_refused_there(bucket, tmp_path):
    config = load_config(None, ["run.directory=gs://b/run"])
    with claim("gs://b/run", config) as continues:
        assert not continues
    with claim("gs://b/run", config) as continues:
        assert continues
    with pytest.raises(UserError, match=r"gs://b/run holds a run with training.seed=0, not 1"):
        claim("gs://b/run", load_config(None, ["training.seed=1"])).__enter__()
    write_whole("gs://b/photos/cat.png", b"")
    with pytest.raises(UserError, match=r"gs://b/photos holds files but no run \(cat.png"):
        claim("gs://b/photos", config).__enter__()


def test_a_bucket_that_cannot_be_written_is_one_sentence(bucket, tmp_path):
    bucket.writable = False
    with pytest.raises(UserError, match=r"`run.directory` gs://b/run cannot be used \(.*403.*\); check the"):
        claim("gs://b/run", load_config()).__enter__()
    assert not (tmp_path / "b").exists()


def test_without_its_library_a_bucket_says_what_to_install():
    with contextlib.suppress(ImportError):
        import gcsfs  # noqa: F401

        pytest.skip("gcsfs is installed")
    with pytest.raises(UserError, match=r"cannot be used \(.*gcs.*\); pip install gcsfs"):
        claim("gs://b/run", load_config()).__enter__()


def test_metrics_are_written_row_by_row_and_cut_back(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "EVENTS_COPIED_EVERY", 0.0)
    with MetricWriter("gs://b/run") as writer:
        for step in range(4):
            writer.write(step, {"reward/mean": step / 2})
        writer.write(3, {"reward/mean": 1.5})  # repeated after a kill: not written again
        (events,) = (tmp_path / "b/run/tensorboard").iterdir()
        assert events.stat().st_size > 100
    rows = [json.loads(line) for line in (tmp_path / "b/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for step in (1, 3):
        write_whole(f"gs://b/run/dialogues/step_{step:06d}-00000-of-00002.jsonl", "x\n")
        write_whole(f"gs://b/run/evaluations/step_{step:06d}.json", json.dumps({"return/mean": -step}))
    cut_back("gs://b/run", 2)
    assert len((tmp_path / "b/run/metrics.jsonl").read_text().splitlines()) == 3
    assert [file.name for file in (tmp_path / "b/run/dialogues").iterdir()] == [
        "step_000001-00000-of-00002.jsonl"
    ]
    assert best_steps("gs://b/run", [1, 3]) == [1]


def test_a_checkpoint_without_its_mark_is_none(bucket, tmp_path):
    """Nothing can be renamed in a bucket: a finished save leaves a file `commit_success.txt`."""
    for step in (10, 20):
        write_whole(f"gs://b/run/checkpoints/{step}/state/array", "x")
    write_whole("gs://b/run/checkpoints/10/commit_success.txt", "ok")
    assert whole_steps("gs://b/run") == [10]
