"""Which packages of a requirements file this machine lacks, for machines without a package index.

    python benchmarks/missing.py [requirements-cuda.txt ...]

Prints one requirement per line, also those of installed packages, and of extras such as `jax[cuda13]`. Fetch
them where there is an index: `pip download --no-deps --only-binary=:all: -d wheels REQUIREMENT ...` takes the
same lines. Install them by `pip install --no-index --no-deps wheels/*` and run this again, because a package
that is not installed does not tell what it needs. Exit status 1 if any is missing.
Needs the package `packaging`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def requirements(file: Path) -> Iterator[Requirement]:
    """The requirements of a file and of the files that it names with `-r`."""
    for line in file.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r"):
            yield from requirements(file.parent / text[2:].strip())
        elif text:
            yield Requirement(text)


def missing(wanted: Iterator[Requirement]) -> list[str]:
    """Requirements that no installed package meets, those of installed packages included."""
    queue, seen, lacking = list(wanted), set(), []
    for requirement in queue:
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            found = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            lacking.append(str(requirement))
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            lacking.append(f"{requirement}  # {found.version} is installed")
        for text in found.requires or []:
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                needed.marker = None
                queue.append(needed)
    return lacking


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[1] / "requirements-cuda.txt"
    parser.add_argument("file", type=Path, nargs="*", default=[default], help="requirements files")
    lacking = missing(each for file in parser.parse_args().file for each in requirements(file))
    print("\n".join(lacking) or "nothing is missing")
    return bool(lacking)


if __name__ == "__main__":
    raise SystemExit(main())
