"""What a compiled program sends between devices, read from its text."""

import dataclasses
import math
import re

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one execution: how many, the bytes of their results, kinds."""

    count: int = 0
    bytes: int = 0
    kinds: frozenset[str] = frozenset()

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.count + other.count,
            self.bytes + other.bytes,
            self.kinds | other.kinds,
        )

    def times(self, n: int) -> "Traffic":
        return Traffic(self.count * n, self.bytes * n, self.kinds)


def collectives(text: str) -> tuple[Traffic, Traffic]:
    """The least and the most that one execution sends.

    Of branches the cheapest or the dearest is taken; loops count as often as they run.

    Args:
      text: `compiled.as_text()`.

    Returns:
      The least and the most.

    Raises:
      ValueError: if a loop that communicates does not say how often it runs.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)

    def traffic(name: str, choose) -> Traffic:
        total = Traffic()
        for line in bodies[name]:
            found = re.search(r"= (.*?) ([a-z][a-z\-]*?)(?:-start)?\(", line)
            if found is None:
                continue
            result, operation = found[1], found[2]
            if operation in KINDS:
                total += Traffic(1, _size(result), frozenset([operation]))
            elif operation == "while":
                body = traffic(_called(line, "body")[0], choose)
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                if body.count and trips is None:
                    raise ValueError(f"a loop of unknown length: {line.strip()}")
                total += body.times(int(trips[1]) if trips else 1)
            elif operation == "conditional":
                branches = _called(line, "branch_computations") or [
                    *_called(line, "true_computation"),
                    *_called(line, "false_computation"),
                ]
                options = [traffic(branch, choose) for branch in branches]
                total += choose(options, key=lambda option: option.bytes)
            elif operation == "call":
                total += traffic(_called(line, "to_apply")[0], choose)
        return total

    return traffic(entry, min), traffic(entry, max)


def _called(line: str, attribute: str) -> list[str]:
    """The names of the computations in an attribute of an operation."""
    found = re.search(attribute + r"=(\{[^}]*\}|[^,\s]+)", line)
    return re.findall(r"%?([\w.\-]+)", found[1]) if found else []


def _size(result: str) -> int:
    """Bytes of a shape, or of a tuple of shapes."""
    return sum(
        _BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result)
    )
