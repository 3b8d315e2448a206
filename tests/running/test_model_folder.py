import os
import stat

import pytest

from mapo_jax.errors import UserError
from mapo_jax.files import append_line, write_whole
from mapo_jax.running.model_folder import whole_folder


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "model"
    with whole_folder(target) as temporary:
        (temporary / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    assert [file.name for file in target.parent.iterdir()] == ["model"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "model") as temporary:
        (temporary / "a.txt").write_text("a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_who_comes_second_loses_nothing_of_the_firsts(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(FileExistsError), whole_folder(target) as slow:
        (slow / "a.txt").write_text("slow")
        with whole_folder(target) as fast:
            (fast / "a.txt").write_text("fast")
    assert (target / "a.txt").read_text() == "fast"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_files_and_folders_have_the_users_mode(tmp_path):
    umask = os.umask(0o077)
    try:
        with whole_folder(tmp_path / "model") as temporary:
            write_whole(temporary / "config.json", "{}")
            append_line(temporary / "rows.jsonl", b"{}\n")
    finally:
        os.umask(umask)
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.rglob("*")}
    assert modes == {"model": 0o700, "config.json": 0o600, "rows.jsonl": 0o600}


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), whole_folder(tmp_path / "file" / "model"):
        pass
