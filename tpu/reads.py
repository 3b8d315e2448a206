"""The bytes that a compiled program reads of a chip's memory, from its text.

A TPU's compiler copies weights and caches to the chip's fast memory ahead of their use, and
`Compiled.cost_analysis` counts both reads. In the text, arrays in other than the main memory have a space,
`S(1)`, in their layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tpu.hlo import shapes_of, size_of

_START = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{(?: // .*)?$")
_ELSEWHERE = re.compile(r"S\(\d+\)")
# Operations that move nothing, and those whose operands are counted where they are used.
_NO_READS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
_TAKES_PARTS = {"slice", "dynamic-slice", "gather"}
_IN_PLACE = {"dynamic-update-slice", "scatter"}


@dataclass(frozen=True)
class _Operation:
    type: str
    kind: str
    operands: tuple[str, ...]
    text: str  # the rest of the line
    root: bool  # whether it is the computation's result

    def called(self, *names: str) -> list[str]:
        """Computations that the attributes of these names give."""
        found = re.findall(rf"\b(?:{'|'.join(names)})=\{{?(%[\w.\-]+(?:, %[\w.\-]+)*)", self.text)
        return [name.strip("% ") for group in found for name in group.split(",")]


_Computation = dict[str, _Operation]


def bytes_read(text: str) -> int:
    """Bytes of the chip's memory that the program's operations read, those in a loop once.

    An operand counts whole, with these exceptions: arrays in other memory count 0; of a copy to other memory
    counts what is copied; of an operand of which a fused computation only takes parts (a lookup), those; an
    operand that is changed in place, 0. Kernels written by hand count as if they read all of their operands.
    """
    computations, entry = _parse(text)
    total, todo, seen = 0, [entry], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        operations = computations[name]
        for operation in operations.values():
            todo += operation.called("body", "condition", "branch_computations", "true_computation")
            todo += operation.called("false_computation")
            if operation.kind == "call":
                todo += operation.called("to_apply")
            total += sum(_reads(computations, operations, operation))
    return total


def _reads(
    computations: dict[str, _Computation], operations: _Computation, operation: _Operation
) -> Iterator[int]:
    if operation.kind in _NO_READS or operation.kind.endswith("-done"):
        return
    for position, name in enumerate(operation.operands):
        given = operations.get(name)
        if given is None or given.type.startswith("(") or _ELSEWHERE.search(given.type):
            continue
        if operation.kind in ("copy-start", "slice-start"):
            # Operand, result and a counter: a slice is not larger than what it is taken from.
            yield min(size_of(*shape) for shape in shapes_of(operation.type) if shape[1])
        else:
            yield _taken(computations, operation, position, size_of(*shapes_of(given.type)[0]))


def _taken(computations: dict[str, _Computation], operation: _Operation, position: int, whole: int) -> int:
    """Bytes that an operation reads of its operand at this position."""
    if operation.kind in _IN_PLACE and position == 0:
        return 0
    if operation.kind in _TAKES_PARTS and position == 0:
        return min(whole, size_of(*shapes_of(operation.type)[0]))
    if operation.kind != "fusion":
        return whole
    inner = computations[operation.called("calls")[0]]
    names = _views(computations, inner, position)
    uses = [
        (op, index)
        for name, op in inner.items()
        for index, operand in enumerate(op.operands)
        if operand in names and name not in names
    ]
    return min(whole, sum(_taken(computations, op, index, whole) for op, index in uses))


def _views(computations: dict[str, _Computation], inner: _Computation, position: int) -> set[str]:
    """The names in a computation under which it has its parameter at this position, unchanged."""
    mark = f"({position})"
    names = {name for name, op in inner.items() if op.kind == "parameter" and op.text.startswith(mark)}

    def passes(operation: _Operation) -> bool:
        given = [index for index, operand in enumerate(operation.operands) if operand in names]
        if not given or operation.kind not in ("bitcast", "fusion"):
            return False
        if operation.kind == "bitcast":
            return True
        called = computations[operation.called("calls")[0]]
        views = set().union(*(_views(computations, called, index) for index in given))
        return any(called[name].root for name in views)

    while more := {name for name, op in inner.items() if name not in names and passes(op)}:
        names |= more
    return names


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if start := _START.match(line):
            current = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif line == "}":
            current = None
        elif current is not None and " = " in line:
            name, rest = line.split(" = ", 1)
            end = _closing(rest) if rest.startswith("(") else rest.index(" ")
            kind, rest = rest[:end], rest[end:].strip()
            called, arguments = rest.split("(", 1)[0], rest[rest.index("(") :]
            operands = re.findall(r"%([\w.\-]+)", arguments[: _closing(arguments)])
            root = name.strip().startswith("ROOT")
            name = name.replace("ROOT", "").strip("% ")
            current[name] = _Operation(kind, called, tuple(operands), arguments, root)
    return computations, entry


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the first one."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"parentheses are not closed in {text[:80]!r}")
