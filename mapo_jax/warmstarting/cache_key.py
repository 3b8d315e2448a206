"""What determines the result of a warm start, and the hash of it that names the folder in the cache."""

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import tokenizers

from mapo_jax.config import Config
from mapo_jax.errors import UserError
from mapo_jax.hub import fetch

_PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    "environment/scripted",
    "environment/card_schema.py",
    "environment/dialogue.py",
    "environment/scenario.py",
    "environment/state.py",
    "model",
    "warmstart.py",
    "warmstarting",
    "rollout/rows.py",
    "tokenizer.py",
    "learning/optimizer.py",
    "learning/train_state.py",
    "learning/update.py",
)


def cache_key(config: Config) -> str:
    """The name of the result's folder: a hash of everything that determines it."""
    text = json.dumps(determinants(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def determinants(config: Config) -> dict[str, Any]:
    """Everything that determines the result, as JSON values: settings, texts, and the code that makes it."""
    settings = config.warmstart.model_dump(exclude={"cache", "min_naming_ratio"})
    if settings["data"] is not None:
        settings["data"] = _digest([Path(settings["data"])])
    model = config.model.model_dump()
    if model["path"] is not None:
        model["fresh"] = None
        model["path"] = _listing(Path(fetch(model["path"])))
    cards = Path(config.environment.scenarios or _PACKAGE / "environment" / "scenarios")
    return {
        "model": model,
        "warmstart": settings,
        "rollout": config.rollout.model_dump(
            include={"history", "system_prompt", "max_turns", "max_tokens", "temperature"}
        ),
        "delayed_opening": config.environment.delayed_opening,
        "seed": config.training.seed,
        "cards": _digest(sorted(cards.glob("*.yaml")) if cards.is_dir() else [cards]),
        "code": _digest(list(chain.from_iterable(map(_source_files, _SOURCES)))),
        "versions": {"jax": jax.__version__, "tokenizers": tokenizers.__version__},
    }


def _source_files(source: str) -> list[Path]:
    """A module, or the modules and tables of a package."""
    path = _PACKAGE / source
    return [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".py", ".yaml"))


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from error
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _listing(folder: Path) -> list[str]:
    """Names, sizes and times of a model folder's files: reading gigabytes of weights would take too long."""
    if not folder.is_dir():
        raise UserError(f"`model.path` is {folder}, which is no folder; give a model folder")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [f"{f.relative_to(folder)} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
