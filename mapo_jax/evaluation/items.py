"""Finds a benchmark's items: a file, or a name whose file is downloaded from its authors."""

import urllib.request
from collections.abc import Callable
from pathlib import Path

from mapo_jax.commands import cache_folder
from mapo_jax.errors import UserError
from mapo_jax.files import write_whole

_GITHUB = "https://raw.githubusercontent.com"
_EQBENCH = f"{_GITHUB}/EQ-bench/EQ-Bench/2f6eab448812177bda543711390d81b97686b81c/data"
_EMOBENCH = f"{_GITHUB}/Sahandfer/EmoBench/3b4f84312541f8469e909965e1fff3691ef85c62/data"

HOMES = {
    "eqbench-v2": f"{_EQBENCH}/eq_bench_v2_questions_171.json",
    "emobench-ea": f"{_EMOBENCH}/EA.jsonl",
    "emobench-eu": f"{_EMOBENCH}/EU.jsonl",
}
"""Files that can be fetched by name. Both benchmarks are under the MIT licence of their authors."""

TIMEOUT = 30.0  # seconds without data
MAX_BYTES = 50_000_000


def find_items(source: str, note: Callable[[str], None] = lambda text: None) -> Path:
    """A file with the items: `source` itself, or one of HOMES, fetched once into the user's cache.

    Args:
      note: called with a message before a download.

    Raises:
      UserError: neither a file nor a known name, or the download failed.
    """
    if Path(source).is_file():
        return Path(source)
    if source not in HOMES:
        known = ", ".join(HOMES)
        raise UserError(f"there is no file {source}; give a file, or a name that is fetched: {known}")
    url = HOMES[source]
    file = cache_folder("items") / Path(url).name
    if not file.is_file():
        note(f"fetching {url}")
        write_whole(file, _fetch(url))
    return file


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot fetch {url} ({error}); fetch it elsewhere and give the file") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{url} holds more than {MAX_BYTES:,} bytes, so it is not what was expected")
    return content
