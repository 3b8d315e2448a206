"""Documents: the files, names and headings that they refer to exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "tpu" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
USERS_FILES = {"my_judge.py"}  # which a reader is asked to write


def module(name: str) -> Path | None:
    """The file that a document means by a path."""
    candidates = (ROOT / name, ROOT / "mapo_jax" / name, ROOT / "tpu" / name)
    return next((file for file in candidates if file.exists()), None)


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_files_and_names_exist(document):
    text = document.read_text()
    for name, symbol in re.findall(r"`([\w/.]+\.(?:py|sh))(?::\s+([\w.]+))?`", text):
        if name in USERS_FILES:
            continue
        file = module(name)
        assert file is not None, f"there is no file {name}"
        for identifier in filter(None, symbol.split(".")):
            assert re.search(rf"\b{identifier}\b", file.read_text()), f"{name} has no {identifier}"
    for folder in re.findall(r"`(mapo_jax/[\w/]+/|tests/[\w/]+/|docs/|configs/)`", text):
        assert (ROOT / folder).is_dir(), folder


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith("http"):
            continue
        path, _, fragment = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), link
