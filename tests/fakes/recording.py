"""Sessions on paper: the bytes that a silo and a coordinator said, in order, and what was done to them meanwhile.

One step a line, words between blanks; `#` begins a comment. `scripts/record_protocol.py` writes such files.

    create NAME BASE64           an operator created an experiment; the bytes are its ExperimentSpec
    cancel NAME                  an operator cancelled it
    outcome NAME STATE SHA256    it has ended; the digest is that of the exported tensors, `-` if there are none
    open | cut                   the silo dialled and got through | the connection was cut
    silo KIND BASE64             a frame of the silo, as an OpenSessionRequest
    coordinator KIND BASE64      a frame of the coordinator, as an OpenSessionResponse
    release TASK                 the worker, which had begun the task, was let go on
    stop                         the silo daemon was told to stop
"""

import asyncio
import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedrt.task import TaskKind
from fedrt.tensors import Scope, of_scope
from fedrt.v1 import session_service_pb2 as session_pb
from silo.work import WorkerReport, WorkOrder, WorkOutcome
from tests.fakes.workers import FakeWorker, report

LIMIT = 30.0  # seconds that anything may take
UNKNOWN_FIELD = b"\xfa\x06\x03abc"  # field 111, three bytes; beside no known field it is an unknown frame
CONTEXT_DIM, FEATURE_DIM = 8, 4
HYPERPARAMETERS = '{"context_init":null,"context_length":16}'  # tensors of 512 bytes
# What may differ from one run, or one version, to the next: times, durations, versions, the name of a session.
_VOLATILE = {
    "hello": ("software_version", "capabilities"),
    "welcome": ("session_id", "software_version", "capabilities", "heartbeat_interval", "silence_limit"),
    "heartbeat": ("send_time",),
    "task_offer": ("time_limit",),
    "drain": ("grace_period",),
}


@dataclass(frozen=True)
class Step:
    """One line of a recording."""

    what: str
    words: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.words[0] if self.words else ""

    @property
    def data(self) -> bytes:
        return base64.b64decode(self.words[-1])

    @property
    def message(self) -> Any:
        """The frame, read with this version's contract."""
        kinds = {"silo": session_pb.OpenSessionRequest, "coordinator": session_pb.OpenSessionResponse}
        return kinds[self.what].FromString(self.data)


def frame_step(speaker: str, data: bytes) -> Step:
    kinds = {"silo": session_pb.OpenSessionRequest, "coordinator": session_pb.OpenSessionResponse}
    kind = kinds[speaker].FromString(data).WhichOneof("frame")
    return Step(speaker, (kind, base64.b64encode(data).decode()))


def read(path: Path) -> list[Step]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [Step(what, tuple(words)) for what, *words in map(str.split, lines)]


def write(path: Path, header: str, steps: list[Step]) -> None:
    lines = [f"# {line}" for line in header.splitlines()] + [" ".join((step.what, *step.words)) for step in steps]
    path.write_text("\n".join(lines) + "\n")


def comparable(message: Any) -> Any:
    """The frame without what may differ."""
    kept = type(message).FromString(message.SerializeToString(deterministic=True))
    kind = kept.WhichOneof("frame")
    for name in _VOLATILE.get(kind, ()):
        getattr(kept, kind).ClearField(name)
    if kind == "task_result":
        kept.task_result.success.ClearField("work_duration")
        kept.task_result.success.ClearField("received_sha256")  # which protocol 1.0 had not
        if message.task_result.HasField("failure"):
            kept.task_result.CopyFrom(message.task_result)  # touching `success` above has set it
    return kept


def later(steps: list[Step], speaker: str) -> list[Step]:
    """The same, but this speaker is of a later version: fields and frames that nobody has invented yet."""
    changed = []
    for step in steps:
        if step.what != speaker:
            changed.append(step)
            continue
        message = step.message
        getattr(message, step.kind).MergeFromString(UNKNOWN_FIELD)
        data = message.SerializeToString() + UNKNOWN_FIELD
        changed += [
            Step(speaker, (step.kind, base64.b64encode(data).decode())),
            Step(speaker, ("later", base64.b64encode(UNKNOWN_FIELD).decode())),
        ]
    return changed


def is_advisory(message: Any) -> bool:
    """Frames that come when time passes: nobody answers them."""
    return message.WhichOneof("frame") in ("heartbeat", "task_progress")


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Of names, shapes and bits; `-` if there are none."""
    if not tensors:
        return "-"
    parts = [f"{name}{value.shape}{value.dtype}".encode() + value.tobytes() for name, value in sorted(tensors.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def small_report() -> WorkerReport:
    return report(CONTEXT_DIM, FEATURE_DIM)


def drawn(order: WorkOrder) -> WorkOutcome:
    """A delta drawn from the seed of the task, so that every silo and round has another."""
    shared = {}
    if order.kind is TaskKind.TRAIN:
        draw = np.random.Generator(np.random.Philox(order.seed))
        specs = of_scope(order.local.tensors(), Scope.SHARED)
        shared = {spec.name: draw.standard_normal(spec.shape, np.float32) for spec in specs}
    return WorkOutcome(shared, {}, 10 + order.seed % 7, {"accuracy": 0.5, "loss": 1.0}, 0.25)


@dataclass
class HeldWorker(FakeWorker):
    """Gives what `drawn` draws; waits for `release` in the tasks named in `held`."""

    held: tuple[str, ...] = ()
    _gates: dict[str, asyncio.Event] = field(default_factory=dict)
    _began: dict[str, asyncio.Event] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.behave, self.description = drawn, small_report()
        self._gates = {task_id: asyncio.Event() for task_id in self.held}
        self._began = {task_id: asyncio.Event() for task_id in self.held}

    async def run(self, order: WorkOrder, on_progress: Any) -> WorkOutcome:
        if order.task_id in self._gates:
            self._began[order.task_id].set()
            await self._gates[order.task_id].wait()
        return await super().run(order, on_progress)

    async def working_on(self, task_id: str) -> None:
        await self._began[task_id].wait()

    def release(self, task_id: str) -> None:
        self._gates[task_id].set()
