"""Models by name: `org/name` or `org/name@revision` of the Hugging Face Hub.

Such an id can be given wherever a model folder is taken. huggingface_hub downloads into its own cache, with
its progress bars, its token (HF_TOKEN, `hf auth login`) and its offline mode (HF_HUB_OFFLINE=1).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from mapo_jax.errors import UserError
from mapo_jax.files import as_path

_FORM = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_SMALL = ["*.json", "*.jinja", "merges.txt", "tokenizer.model"]
_PATTERNS = {"allow_patterns": [*_SMALL, "*.safetensors"], "ignore_patterns": ["*/*"]}


class HubId(NamedTuple):
    """A model on the Hub."""

    repo: str  # org/name
    revision: str | None  # branch, tag or commit; None: main

    @property
    def name(self) -> str:
        """The name without its organisation."""
        return self.repo.partition("/")[2]

    @property
    def command(self) -> str:
        """The command that downloads it."""
        return f"hf download {self.repo}" + (f" --revision {self.revision}" if self.revision else "")


def hub_id(name: Path | str) -> HubId | None:
    """What `name` means on the Hub; None if it means a folder.

    A folder that exists wins. Below a folder that exists, a name without a revision is a path: `runs/tniy`,
    where there is a folder `runs`, is a mistyped run and not a model of the organisation `runs`.
    """
    match = _FORM.fullmatch(str(name))
    if match is None or as_path(name).exists():
        return None
    if match[2] is None and Path(str(name)).parent.exists():
        return None
    return HubId(match[1], match[2])


def fetch(name: Path | str, *, weights: bool = True) -> Path | str:
    """The folder of a model: `name` itself, or the one in huggingface_hub's cache, downloaded if needed.

    Args:
      weights: False leaves the weights out.

    Raises:
      UserError: the Hub has no such model, does not give it to this user, or cannot be reached.
    """
    model = hub_id(name)
    if model is None:
        return name
    import httpx2  # both take a while
    from huggingface_hub import errors, snapshot_download

    patterns = _PATTERNS if weights else _PATTERNS | {"allow_patterns": _SMALL}
    page = f"https://huggingface.co/{model.repo}"
    try:
        return Path(snapshot_download(model.repo, revision=model.revision, **patterns))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{model.repo} is gated: accept its terms at {page}, then `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{model.repo} has no revision {model.revision!r}; see {page}/commits") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"there is neither a folder {name} nor a model {model.repo} on the Hugging Face Hub; check the "
            "name, or, if it is private, `hf auth login` or set HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, httpx2.HTTPError) as error:
        raise UserError(
            f"there is no folder {name}, and the model of that name is not (wholly) in Hugging Face's cache "
            f"and cannot be fetched from here; run `{model.command}` where huggingface.co can be reached, "
            "and without HF_HUB_OFFLINE"
        ) from error


def cached(name: Path | str) -> Path | str | None:
    """The folder as of `fetch`, if nothing of it need be downloaded; else None."""
    model = hub_id(name)
    if model is None:
        return name
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(model.repo, revision=model.revision, local_files_only=True, **_PATTERNS)
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
