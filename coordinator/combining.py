"""Turns the stored results of a round into the next shared tensors; the same inputs give the same bits."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from coordinator.inbox import PackedTensors
from coordinator.records import Checkpoint, TaskRecord, TensorsRef
from fedrt.aggregation import ServerState, Update
from fedrt.errors import DamageError, TensorError
from fedrt.payload import headers_of, pack, unpack
from fedrt.spec import ExperimentSpec
from fedrt.task import TaskKind
from fedrt.tensors import Array, Scope, Tensors, all_finite, check_tensors, initial_tensors, of_scope

ReadBlob = Callable[[TensorsRef], memoryview]  # raises `StorageError` if the bytes are missing or damaged


def packed(tensors: Tensors) -> PackedTensors:
    """Tensors ready for the store."""
    data = pack(tensors)
    return PackedTensors(TensorsRef(headers_of(tensors), hashlib.sha256(data).hexdigest()), data)


def initial_shared(spec: ExperimentSpec) -> PackedTensors | None:
    """The initial shared tensors, or None if the method has none. Only for methods that do not need CLIP for it."""
    specs = of_scope(spec.local.tensors(), Scope.SHARED)
    return packed(initial_tensors(specs, spec.seed)) if specs else None


@dataclass(frozen=True)
class Inputs:
    """What a server rule works on."""

    state: ServerState
    updates: tuple[Update, ...]


class StoredTensors(Mapping[str, Array]):
    """Tensors that stay in the store: each look at one reads it anew, so that a round of many silos needs no memory.

    Looking raises `StorageError` if the bytes are missing or damaged, or the disk refuses.
    """

    def __init__(self, ref: TensorsRef, read: ReadBlob) -> None:
        self._ref, self._read = ref, read

    def __getitem__(self, name: str) -> Array:
        return unpack(self._ref.headers, self._read(self._ref))[name]

    def __iter__(self) -> Iterator[str]:
        return (header.name for header in self._ref.headers)

    def __len__(self) -> int:
        return len(self._ref.headers)


def gather(read: ReadBlob, tasks: list[TaskRecord], checkpoint: Checkpoint | None) -> Inputs:
    """The results of a round, by silo, and the state before it.

    Raises `StorageError` if a blob is missing or damaged.
    """
    shared = unpack(checkpoint.shared.headers, read(checkpoint.shared)) if checkpoint else {}
    memory = unpack(checkpoint.memory.headers, read(checkpoint.memory)) if checkpoint and checkpoint.memory else {}
    updates = [Update(task.silo_id, StoredTensors(_tensors_of(task), read), task.example_count) for task in tasks]
    return Inputs(ServerState(shared, memory), tuple(sorted(updates, key=lambda update: update.silo_id)))


def combine(spec: ExperimentSpec, kind: TaskKind, inputs: Inputs) -> tuple[PackedTensors, PackedTensors | None]:
    """The new shared tensors, and the server rule's memory if it has one.

    Raises `TensorError` if the rule breaks the declared shapes or overflows.
    """
    if kind is TaskKind.INITIALIZE:
        return packed(inputs.updates[0].delta), None
    new = spec.local.method().aggregate(inputs.state, inputs.updates)
    check_tensors(of_scope(spec.local.tensors(), Scope.SHARED), new.shared)
    if broken := sorted(name for name, array in new.memory.items() if not all_finite(array)):
        raise TensorError(f"the server rule's memory {broken[0]!r} has values that are not finite")
    return packed(new.shared), packed(new.memory) if new.memory else None


def _tensors_of(task: TaskRecord) -> TensorsRef:
    if task.tensors is None:
        raise DamageError(f"the result of task {task.task_id!r} has no tensors; restore the store from a backup")
    return task.tensors
