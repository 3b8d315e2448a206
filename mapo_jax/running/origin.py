"""What a run was made with: command, versions, commit, machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

import mapo_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def start_row(mesh: Mesh) -> dict[str, Any]:
    """One start of a run, as JSON values."""
    program = Path(sys.argv[0])
    module = program.resolve().parent == Path(mapo_jax.__file__).resolve().parent
    name = f"python -m mapo_jax.{program.stem}" if module else shlex.quote(sys.argv[0])
    return {
        "time": round(time.time(), 3),
        "command": f"{name} {shlex.join(sys.argv[1:])}".rstrip(),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "commit": commit(Path(mapo_jax.__file__).parent),
        "versions": {
            "mapo_jax": mapo_jax.__version__,
            "Python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
    }


def commit(folder: Path) -> str | None:
    """The commit of the checkout in a folder, with `+` if files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else it is the folder of another repository
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno", ".") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
