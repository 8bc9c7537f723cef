"""The contract between the daemon and its worker: an order goes in, an outcome or a `WorkError` comes out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedrt.spec import LocalSpec
from fedrt.task import TaskKind
from fedrt.tensors import Tensors

OWN = ""  # the name under which a daemon that is one silo holds its images

OnProgress = Callable[[int, int], None]  # (steps done, steps planned or 0)


@dataclass(frozen=True)
class WorkOrder:
    """What the worker is to do. `private` is empty before the first accepted round of an experiment.

    `silo` says whose images, where several virtual silos share the worker. `checkpoint` is the path of the file to
    go on from, if it is there and of this very work, and to write to; empty for no checkpoints.
    """

    task_id: str
    experiment_id: str
    kind: TaskKind
    local: LocalSpec
    round_number: int
    seed: int
    shared: Tensors
    private: Tensors = field(default_factory=dict)
    silo: str = OWN
    checkpoint: str = ""


@dataclass(frozen=True)
class WorkOutcome:
    """`shared`: the delta (TRAIN), the values (INITIALIZE) or nothing (EVALUATE); `private`: new private values."""

    shared: Tensors
    private: Tensors
    example_count: int
    metrics: Mapping[str, float]
    duration: float  # seconds


@dataclass(frozen=True)
class WorkerReport:
    """What the worker holds: the model it loaded, where it runs, and the data it found."""

    architecture: str
    weights_sha256: str
    context_dim: int
    feature_dim: int
    device: str  # for example "cuda:NVIDIA H200" or "cpu"
    memory_bytes: int
    class_counts: Mapping[str, Mapping[str, int]]  # split -> class name -> readable examples
    unreadable_count: int
    methods: tuple[str, ...]  # whose local half is installed
    hosted: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)  # the same of each virtual silo

    @property
    def example_count(self) -> int:
        """Training examples."""
        return sum(self.class_counts.get("train", {}).values())

    def of(self, silo: str) -> "WorkerReport":
        """What one virtual silo holds."""
        return replace(self, class_counts=self.hosted[silo], hosted={})


class Worker(Protocol):
    """Runs one order at a time, in another process so that its crash is a failed task."""

    async def describe(self) -> WorkerReport:
        """Load the model and the data index if that has not happened. Raises `ConfigurationError` if it cannot."""

    @property
    def report(self) -> WorkerReport | None:
        """What `describe` would say, as far as it is known without waiting: the counts may shrink during work."""

    async def run(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        """Do the work. Raises `WorkError`. Cancelling the coroutine stops the work."""

    async def stop(self) -> None:
        """End the process, if there is one."""
