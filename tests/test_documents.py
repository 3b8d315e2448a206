"""Documents: the files, names and headings that they refer to exist, and their commands parse."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from mapo_jax.config import load_config

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


COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*python3? -m (mapo_jax[\w.]*)( .*)")
PLACEHOLDERS = ("key=value", "...", "[key=value", "...]")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Module and arguments of every command in a document; a module without arguments is only named."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    found = []
    for match in filter(None, (COMMAND.match(line.strip()) for line in lines)):
        words = shlex.split(match[2].split(" > ")[0], comments=True)
        found.append((match[1], [word.strip("[]") for word in words if word not in PLACEHOLDERS]))
    return [(module, words) for module, words in found if words]


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_commands_parse(document, monkeypatch):
    """With the commands' own parsers; nothing is run. Settings are read over the named configuration."""
    for name, words in commands(document.read_text()):
        module = importlib.import_module(name)
        if name.endswith(".scenario"):  # has no parser
            assert words[0] == "check" and len(words) == 2
            continue
        monkeypatch.setattr(module, "run_command", lambda command: 0)
        try:
            assert module.main(words) == 0
        except SystemExit as ended:
            pytest.fail(f"python -m {name} {shlex.join(words)}: exit status {ended.code}")
        recipe = words[words.index("--config") + 1] if "--config" in words else None
        settings = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)+=", word)]
        load_config(None if recipe == "FILE" else recipe, settings)


def test_the_documents_commands_are_found():
    found = [command for document in DOCUMENTS for command in commands(document.read_text())]
    assert len(found) > 40
    assert ("mapo_jax.warmstart", ["warmstart.data=good.jsonl", "model.path=FOLDER"]) in found
