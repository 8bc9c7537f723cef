"""What left the building, read from a silo's own record, and checked against what its method may send."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrt.tensors import Scope, TensorSpec, of_scope
from silo.departures import read_lines

MESSAGES = frozenset({"Hello", "Heartbeat", "TaskReply", "TaskProgress", "TaskResult", "PayloadChunk", "Drain"})
METRICS = frozenset({"accuracy", "auroc", "calibration_error", "loss", "macro_f1"})  # means over many images
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class DepartedTensor:
    """A tensor that left: how often, and how many bytes that was in all."""

    name: str
    shape: tuple[int, ...]
    element_type: str
    times: int
    byte_count: int


@dataclass(frozen=True)
class Departed:
    """All that left one silo: messages by kind, tensors, and the names of the metrics in its results."""

    messages: Mapping[str, int]
    tensors: tuple[DepartedTensor, ...]
    metrics: frozenset[str]

    @property
    def byte_count(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.byte_count for tensor in self.tensors)

    def tensor(self, name: str, shape: tuple[int, ...], element_type: str) -> DepartedTensor | None:
        """The tensor of that description, if it left."""
        same = (
            tensor
            for tensor in self.tensors
            if (tensor.name, tensor.shape, tensor.element_type) == (name, shape, element_type)
        )
        return next(same, None)


def read_departures(path: Path) -> Departed:
    """Add up a silo's departures.jsonl."""
    return add_up(read_lines(path))


def add_up(entries: Iterable[Mapping[str, Any]]) -> Departed:
    """Add up the entries of a record."""
    messages, times, sizes = Counter[str](), Counter[tuple[str, tuple[int, ...], str]](), Counter[Any]()
    metrics: set[str] = set()
    for entry in entries:
        messages[entry["message"]] += entry["count"]
        metrics |= entry.get("metrics", {}).keys()
        for tensor in entry.get("tensors", []):
            key = (tensor["name"], tuple(tensor["shape"]), tensor["type"])
            times[key] += 1
            sizes[key] += tensor["bytes"]
    tensors = tuple(DepartedTensor(*key, times[key], sizes[key]) for key in sorted(times))
    return Departed(dict(sorted(messages.items())), tensors, frozenset(metrics))


def objections(departed: Departed, specs: Iterable[TensorSpec], received_byte_count: int) -> list[str]:
    """What should not have left; empty if only the shared tensors did, as declared, and arrived byte for byte."""
    shared = {spec.name: spec.shape for spec in of_scope(specs, Scope.SHARED)}
    found = [f"messages of the unknown kind {kind!r}" for kind in departed.messages if kind not in MESSAGES]
    found += [f"the unknown metric {name!r}" for name in sorted(departed.metrics - METRICS)]
    for tensor in departed.tensors:
        if tensor.name not in shared:
            found.append(f"tensor {tensor.name!r}, which is not shared")
        elif tensor.shape != shared[tensor.name] or tensor.element_type != "FLOAT32":
            found.append(f"tensor {tensor.name!r} as {tensor.element_type} {tensor.shape}, not as declared")
        elif tensor.byte_count != tensor.times * math.prod(tensor.shape) * FLOAT32_BYTES:
            found.append(f"tensor {tensor.name!r} with {tensor.byte_count} bytes, more or less than it holds")
    if departed.byte_count != received_byte_count:
        found.append(f"{departed.byte_count} bytes of tensors, of which the coordinator received {received_byte_count}")
    return found
