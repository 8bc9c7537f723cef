"""What reaches the orchestrator: one message for each thing that happened, in the order in which it did."""

import asyncio
from dataclasses import dataclass

from coordinator.blobs import Blob, Landed, remove_arrival
from coordinator.experiments import Experiment
from coordinator.presence import Session
from coordinator.records import TensorsRef
from fedrt.session.frames import Hello
from fedrt.spec import ExperimentSpec
from fedrt.task import RefusalReason, Result, TaskKind


@dataclass(frozen=True)
class ArrivedTensors:
    """Tensors of a result on their way into the store: their reference, and their bytes or where these lie."""

    ref: TensorsRef
    blob: Blob


@dataclass(frozen=True)
class PackedTensors:
    """Tensors the coordinator made, on their way into the store: their reference and their bytes."""

    ref: TensorsRef
    data: memoryview


@dataclass(frozen=True)
class SessionOpened:
    """A silo has been welcomed."""

    session: Session
    hello: Hello


@dataclass(frozen=True)
class SessionClosed:
    """A session has ended, for whatever reason."""

    session: Session


@dataclass(frozen=True)
class SiloDrained:
    """A silo said that it is stopping."""

    session: Session


@dataclass(frozen=True)
class ResultArrived:
    """A result that passed validation, with its tensors, if it has any."""

    silo_id: str
    result: Result
    tensors: ArrivedTensors | None

    def discard(self) -> None:
        """Remove the tensors if they lie in a file that nobody takes over."""
        if self.tensors is not None and isinstance(self.tensors.blob, Landed):
            remove_arrival(self.tensors.blob.path)


@dataclass(frozen=True)
class ResultInvalid:
    """A result that failed validation."""

    silo_id: str
    task_id: str
    message: str


@dataclass(frozen=True)
class OfferRefused:
    """A silo does not take a task."""

    silo_id: str
    task_id: str
    reason: RefusalReason
    message: str


@dataclass(frozen=True)
class RoundAggregated:
    """The tensors that an `Aggregate` effect computed."""

    experiment_id: str
    round_number: int
    kind: TaskKind
    attempt: int
    shared: PackedTensors
    memory: PackedTensors | None


@dataclass(frozen=True)
class AggregationFailed:
    """An `Aggregate` effect could not be performed."""

    experiment_id: str
    message: str


@dataclass(frozen=True)
class CreateOrdered:
    """An operator wants an experiment; `initial` are its initial tensors unless a silo must compute them."""

    experiment_id: str
    spec: ExperimentSpec
    initial: PackedTensors | None
    done: asyncio.Future[Experiment]


@dataclass(frozen=True)
class CancelOrdered:
    """An operator wants an experiment to end."""

    experiment_id: str
    done: asyncio.Future[Experiment]


@dataclass(frozen=True)
class TimePassed:
    """A deadline may have passed."""


Message = (
    SessionOpened
    | SessionClosed
    | SiloDrained
    | ResultArrived
    | ResultInvalid
    | OfferRefused
    | RoundAggregated
    | AggregationFailed
    | CreateOrdered
    | CancelOrdered
    | TimePassed
)
