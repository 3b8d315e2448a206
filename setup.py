"""What pyproject.toml cannot say: extras from the requirements files, and configs/ in the package."""

from collections.abc import Iterator
from pathlib import Path

from setuptools import find_namespace_packages, setup


def requirements(name: str) -> Iterator[str]:
    """The lines of a requirements file and of those that it names, except for requirements.txt."""
    for line in Path(__file__).with_name(name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            included = line.removeprefix("-r ")
            yield from () if included == "requirements.txt" else requirements(included)
        elif line:
            yield line


setup(
    packages=[*find_namespace_packages(include=["mapo_jax*"]), "mapo_jax.configs"],
    package_dir={"mapo_jax.configs": "configs"},
    package_data={"mapo_jax.configs": ["*.yaml", "schema.json"]},
    extras_require={
        extra: list(requirements(f"requirements-{extra}.txt"))
        for extra in ("tpu", "cuda", "serve", "docs", "dev")
    },
)
