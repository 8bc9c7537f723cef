"""What the coordinator writes down: results, checkpoints and events, as values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.blobs import Blob
from coordinator.experiments import Experiment
from fedrt.payload import TensorHeader
from fedrt.task import TaskKind, Verdict


@dataclass(frozen=True)
class TensorsRef:
    """Tensors kept in the blob store: their headers and the digest (hex) of their packed bytes."""

    headers: tuple[TensorHeader, ...]
    sha256: str

    @property
    def byte_count(self) -> int:
        """The bytes of all tensors."""
        return sum(header.byte_count for header in self.headers)


@dataclass(frozen=True)
class TaskRecord:
    """One task of one silo, from its offer on. `verdict` is None until its result is settled."""

    task_id: str
    experiment_id: str
    silo_id: str
    round_number: int
    kind: TaskKind
    attempt: int
    verdict: Verdict | None = None
    message: str = ""
    example_count: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    work_duration: float = 0.0
    tensors: TensorsRef | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What an experiment had learned after a round (0: the initial tensors). `memory` is the server rule's own."""

    experiment_id: str
    round_number: int
    shared: TensorsRef
    memory: TensorsRef | None = None


@dataclass(frozen=True)
class SiloRecord:
    """A silo the coordinator has met."""

    silo_id: str
    software_version: str
    device: str
    methods: tuple[str, ...]
    last_seen_time: float
    connected: bool
    draining: bool = False


@dataclass(frozen=True)
class ExperimentChanged:
    """An experiment changed its state, stage or message."""

    experiment_id: str
    state: str
    round_number: int
    kind: TaskKind
    message: str
    end_time: float | None


@dataclass(frozen=True)
class Contribution:
    """What one silo contributed to a round."""

    silo_id: str
    example_count: int
    metrics: Mapping[str, float]
    work_duration: float
    byte_count: int


@dataclass(frozen=True)
class RoundClosed:
    """A round ended. `metrics` are means over the contributors; see `mean_metrics`."""

    experiment_id: str
    round_number: int
    kind: TaskKind
    attempt: int
    contributions: tuple[Contribution, ...]
    absences: tuple[tuple[str, str], ...]
    metrics: Mapping[str, float]
    succeeded: bool
    duration: float


@dataclass(frozen=True)
class SiloChanged:
    """A silo connected, disconnected or began to drain."""

    silo: SiloRecord


@dataclass(frozen=True)
class SiloSetAside:
    """A silo failed repeatedly and is left out of the rounds before `until_round` that can do without it."""

    experiment_id: str
    silo_id: str
    until_round: int
    message: str


Event = ExperimentChanged | RoundClosed | SiloChanged | SiloSetAside


@dataclass(frozen=True)
class NumberedEvent:
    """An event with its place in the order of all events, and its time in Unix seconds."""

    number: int
    time: float
    event: Event


@dataclass
class Changes:
    """What one transaction writes; collected while the machines step, then committed at once."""

    experiments: dict[str, Experiment] = field(default_factory=dict)
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    silos: dict[str, SiloRecord] = field(default_factory=dict)
    blobs: dict[str, Blob] = field(default_factory=dict)  # by hex digest
    events: list[Event] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any((self.experiments, self.tasks, self.checkpoints, self.silos, self.blobs, self.events))


def mean_metrics(contributions: tuple[Contribution, ...], kind: TaskKind = TaskKind.TRAIN) -> dict[str, float]:
    """Means of each metric over the silos that report it; summed in order of the names.

    Of training, weighted by examples, as the tensors are. Of an evaluation, every silo counts the same, as the papers
    have it: a silo's splits differ in size, and macro-F1, AUROC and calibration error are no means over examples.
    """
    names = sorted({name for contribution in contributions for name in contribution.metrics})
    means: dict[str, float] = {}
    for name in names:
        weights = [
            (c.metrics[name], c.example_count if kind is TaskKind.TRAIN else 1)
            for c in contributions
            if name in c.metrics and c.example_count
        ]
        total = sum(weight for _, weight in weights)
        mean = sum(value * (weight / total) for value, weight in weights) if total else math.nan
        if math.isfinite(mean):
            means[name] = mean
    return means
