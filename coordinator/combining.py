"""Turns the stored results of a round into the next shared tensors; the same inputs give the same bits."""

import hashlib
from dataclasses import dataclass

from coordinator.inbox import PackedTensors
from coordinator.records import Checkpoint, TaskRecord, TensorsRef
from coordinator.store import Store
from fedrt.aggregation import ServerState, Update
from fedrt.errors import DamageError, TensorError
from fedrt.payload import headers_of, pack, unpack
from fedrt.spec import ExperimentSpec
from fedrt.task import TaskKind
from fedrt.tensors import Scope, Tensors, all_finite, check_tensors, initial_tensors, of_scope


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
    """What a server rule works on. Large tensors are mapped, not read."""

    state: ServerState
    updates: tuple[Update, ...]


def gather(store: Store, tasks: list[TaskRecord], checkpoint: Checkpoint | None, current: memoryview | None) -> Inputs:
    """Fetch the results of a round; `current` are the packed tensors of the checkpoint before it.

    Raises `StorageError` if a blob is missing or damaged.
    """
    shared = unpack(checkpoint.shared.headers, current) if checkpoint and current is not None else {}
    memory = _tensors(store, checkpoint.memory) if checkpoint and checkpoint.memory else {}
    updates = [Update(task.silo_id, _tensors(store, task.tensors), task.example_count) for task in tasks]
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


def _tensors(store: Store, ref: TensorsRef | None) -> Tensors:
    if ref is None:
        raise DamageError("a stored result has no tensors; restore the state directory from a backup")
    return unpack(ref.headers, store.blob(ref))
