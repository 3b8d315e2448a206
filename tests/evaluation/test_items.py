import http.server
import threading

import pytest

from mapo_jax.errors import UserError
from mapo_jax.evaluation import items


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of our own for the items, and an empty cache."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "EA.jsonl").write_text('{"qid": "1"}\n')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "www"))

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(items, "HOMES", {"emobench-ea": f"{url}/EA.jsonl", "lost": f"{url}/lost.json"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    server.shutdown()
    server.server_close()


def test_items_are_fetched_once(home):
    said = []
    file = items.find_items("emobench-ea", said.append)
    assert file.read_text() == '{"qid": "1"}\n' and len(said) == 1
    assert items.find_items("emobench-ea", said.append) == file and len(said) == 1


def test_what_cannot_be_had_is_named(home, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot fetch .*lost.json .*404"):
        items.find_items("lost")
    with pytest.raises(UserError, match=r"no file nothing.json; .*emobench-ea"):
        items.find_items("nothing.json")
    monkeypatch.setattr(items, "MAX_BYTES", 3)
    with pytest.raises(UserError, match="more than 3 bytes"):
        items.find_items("emobench-ea")
    assert not (tmp_path / "cache" / "mapo_jax" / "items" / "EA.jsonl").exists()


def test_a_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    assert items.find_items(str(tmp_path / "mine.json")) == tmp_path / "mine.json"
