"""Collective operations and types of arrays in the text of a compiled program."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
          "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (" + "|".join(KINDS) + r")(?:-start)?\(", re.MULTILINE
)


@dataclass(frozen=True)
class Collective:
    """One collective operation in a program's text; in a loop it runs more than once."""

    kind: str
    dtype: str
    shape: tuple[int, ...]  # of its largest operand or result on each device

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return size_of(self.dtype, self.shape)


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array, without padding."""
    return math.prod(shape) * _BYTES[dtype]


def shapes_of(type: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a result's type, in their order."""
    found = _SHAPE.findall(type)
    return [(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in found]


def collectives(text: str) -> list[Collective]:
    """Every collective in a compiled program's text; asynchronous ones count once, at their start."""
    operations = []
    for result, kind in _OPERATION.findall(text):
        if shapes := shapes_of(result):
            dtype, shape = max(shapes, key=lambda pair: math.prod(pair[1]))
            operations.append(Collective(kind, dtype, shape))
    return operations
