"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")
_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32,
    "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+)[ (].*\{$")
_BRANCHES = ("true_computation", "false_computation", "branch_computations")
_CALL = re.compile(
    r"\b(calls|to_apply|condition|body|true_computation|false_computation|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= [su](?:32|64)\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collectives:
    """All collectives of one kind in a program.

    Attributes:
        kind: XLA's name, such as `all-gather`.
        count: How often a device takes part in one while the program runs.
        bytes: Bytes of the arrays that a device gets or gives, whichever is larger, in all of these together.
        unknown_loops: Whether some are in a loop of unknown length; those are counted for one turn.
    """

    kind: str
    count: int
    bytes: int
    unknown_loops: bool


def collectives(text: str) -> list[Collectives]:
    """Count the collectives of a compiled program, those in loops as often as the loop turns.

    Of a condition's branches the one that sends most counts.

    Args:
        text: `compiled.as_text()`.

    Returns:
        One entry a kind that occurs, in the order of `KINDS`.
    """
    computations, entry = _computations(text)
    totals: dict[str, tuple[int, int, bool]] = {}
    for kind, size, times, unknown in _walk(entry, computations, _communicating(computations), 1, False):
        count, bytes_, before = totals.get(kind, (0, 0, False))
        totals[kind] = (count + times, bytes_ + times * size, before or unknown)
    return [Collectives(kind, *totals[kind]) for kind in KINDS if kind in totals]


def array_bytes(shapes: str) -> int:
    """Bytes of all arrays named in a piece of XLA text, such as `(f32[8,128]{1,0}, bf16[4])`; numbers narrower than a byte are packed."""
    total = 0
    for dtype, dimensions in _ARRAY.findall(shapes):
        size = _BITS.get(dtype, 8 if dtype.startswith("f8") else 0)
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        total += (size + 7) // 8
    return total


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by its name, and the name of the one that the program starts with."""
    found: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        header = None if line.startswith((" ", "HloModule")) else _HEADER.match(line)
        if header:
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def _walk(
    name: str, computations: Mapping[str, list[str]], communicating: set[str], times: int, unknown: bool
) -> Iterator[tuple[str, int, int, bool]]:
    """Kind, bytes, number of executions, and whether that number is a lower bound, of every collective below a computation."""
    for line in computations.get(name, []):
        if match := _COLLECTIVE.search(line):
            yield match[2], _size(match[2], match[1], bool(match[3]), line), times, unknown
        branches = []
        for role, callee in _calls(line):
            if callee in communicating:
                turns = _turns(line, computations) if role == "body" else 1
                below = _walk(callee, computations, communicating, times * (turns or 1), unknown or turns is None)
                if role in _BRANCHES:
                    branches.append(list(below))
                else:
                    yield from below
        yield from max(branches, key=lambda found: sum(size * count for _, size, count, _ in found), default=())


def _turns(line: str, computations: Mapping[str, list[str]]) -> int | None:
    """How often a loop turns: said on its own line (CPU), or by its condition `counter < constant`, whose counter of a scan begins at 0."""
    if match := _TURNS.search(line):
        return int(match[1])
    condition = next((name for role, name in _calls(line) if role == "condition"), "")
    lines = list(computations.get(condition, []))
    lines += [inner for line in lines for _, callee in _calls(line) for inner in computations.get(callee, [])]
    compared = [line for line in lines if " compare(" in line]
    limits = [match[1] for line in lines if (match := _CONSTANT.search(line))]
    plain = len(compared) == len(limits) == 1 and "direction=LT" in compared[0] and not any(" and(" in line for line in lines)
    return int(limits[0]) if plain else None


def _communicating(computations: Mapping[str, list[str]]) -> set[str]:
    """Computations with a collective in them or below them."""
    found = {name for name, lines in computations.items() if any(_COLLECTIVE.search(line) for line in lines)}
    callees = {name: {callee for line in lines for _, callee in _calls(line)} for name, lines in computations.items()}
    while more := {name for name, below in callees.items() if name not in found and below & found}:
        found |= more
    return found


def _calls(line: str) -> list[tuple[str, str]]:
    """Roles and names of the computations that a line calls; the end of an asynchronous call names what its start has begun."""
    if " async-done(" in line or " async-update(" in line:
        return []
    return [(role, name) for role, names in _CALL.findall(line) for name in re.findall(r"[\w.\-]+", names)]


def _size(kind: str, shape: str, started: bool, line: str) -> int:
    """Bytes of the larger side of one collective."""
    if started and kind in ("all-gather", "collective-permute"):
        shape = _elements(shape)[1]  # what went in, what comes out, and counters
    size = array_bytes(shape)
    # The result of a reduce-scatter is one part of what each device gives.
    return size * _group(line) if kind == "reduce-scatter" else size


def _elements(shape: str) -> list[str]:
    """Elements of a tuple's shape."""
    parts, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "({[") - (character in ")}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _group(line: str) -> int:
    """Devices that take part together, from `replica_groups=` in its three notations: `{{0,1},{2,3}}`, `[2,2]<=[4]`, `mesh['x'=2,'y'=2] {'y'}`."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    match = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1])) if match else {}
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2])) if match else 1
