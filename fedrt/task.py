"""Tasks as values: what a silo is asked to do, how it answers, and what became of its result."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from fedrt.errors import FailureReason
from fedrt.payload import Manifest
from fedrt.spec import LocalSpec


class TaskKind(enum.Enum):
    """What a silo is asked to do."""

    INITIALIZE = "initialize"  # compute the initial shared tensors that need CLIP
    TRAIN = "train"  # train locally and return the change of the shared tensors
    EVALUATE = "evaluate"  # measure the received tensors together with the silo's private ones


class RefusalReason(enum.Enum):
    """Why a silo does not take a task."""

    BUSY = "busy"
    DRAINING = "draining"
    METHOD_MISMATCH = "method_mismatch"
    POLICY = "policy"


class Verdict(enum.Enum):
    """What the coordinator did with a result."""

    ACCEPTED = "accepted"  # durably stored; counts in its round
    LATE = "late"  # the round was already closed
    DUPLICATE = "duplicate"  # an earlier copy was accepted
    INVALID = "invalid"  # failed validation
    UNKNOWN_TASK = "unknown_task"  # no such task


@dataclass(frozen=True)
class Task:
    """One unit of work for one silo. Offering the same `task_id` again is harmless."""

    task_id: str
    experiment_id: str
    round_number: int
    kind: TaskKind
    local: LocalSpec
    schema_sha256: bytes
    time_limit: float  # seconds, counted from acceptance
    seed: int


@dataclass(frozen=True)
class Success:
    """What a finished task produced; the tensors travel apart.

    `received_sha256`: the digest (hex) of the shared tensors that the work began from; empty if there were none or the
    silo does not say.
    """

    example_count: int
    metrics: Mapping[str, float]
    work_duration: float  # seconds
    received_sha256: str = ""


@dataclass(frozen=True)
class Failure:
    """Why a task did not succeed. The message holds no paths, data values or stack traces."""

    reason: FailureReason
    message: str


Outcome = Success | Failure


@dataclass(frozen=True)
class Result:
    """The outcome of a task with the description of its tensors, if it has any."""

    task_id: str
    outcome: Outcome
    manifest: Manifest | None
