"""What the text of a compiled program says of its collectives."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|branch_computations|called_computations)=\{?([^},]*(?:,\s*%[\w.\-]+)*)\}?"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Collective:
    """One collective operation of the program."""

    kind: str
    dtype: str
    shape: tuple[int, ...]  # of the largest array that it gives each device
    times: int  # how often it runs, as far as the trip counts of its loops are known

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of one run's result on each device."""
        return self.elements * _BYTES[self.dtype]


def collectives(text: str) -> list[Collective]:
    """Every collective in a compiled program's text."""
    times = _multiplicities(text)
    found = []
    for name, line in _lines(text):
        match = _OPERATION.match(line)
        if match:
            shapes = [
                (dtype, tuple(int(size) for size in sizes.split(",") if size))
                for dtype, sizes in _SHAPE.findall(match.group(1))
            ]
            if shapes:
                dtype, shape = max(shapes, key=lambda pair: math.prod(pair[1]))
                found.append(Collective(match.group(2), dtype, shape, times[name]))
    return found


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """(computation, line) pairs."""
    name = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("{")[0].split("(")[0]:
            name = header.group(2)
        yield name, line


def _multiplicities(text: str) -> dict[str, int]:
    """How often each computation runs: trip counts of the loops around it multiplied; 1 where unknown."""
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, line in _lines(text):
        if " = " not in line:
            continue
        trips = _TRIPS.search(line)
        for group in _CALLED.findall(line):
            for called in re.findall(r"%?([\w.\-]+)", group):
                callers[called].append((name, int(trips.group(1)) if trips and " while(" in line else 1))

    known: dict[str, int] = {}

    def count(name: str, depth: int = 0) -> int:
        if name not in known and depth < 100:
            known[name] = 1
            known[name] = sum(count(caller, depth + 1) * trips for caller, trips in callers[name]) or 1
        return known.get(name, 1)

    return defaultdict(lambda: 1, {name: count(name) for name in list(callers)})
