"""The frames of a session: frozen values that validate themselves, so that an illegal one cannot exist.

Do not subclass these; `wire` translates each from and to its protobuf message.
"""

import enum
from dataclasses import dataclass

from fedrt.errors import PayloadError
from fedrt.payload import MAX_ID_LENGTH, MAX_NAME_LENGTH, Chunk, Manifest
from fedrt.task import RefusalReason, Result, Task, TaskKind, Verdict

MAX_TEXT_LENGTH = 2000
MAX_LIST_LENGTH = 1000
MAX_NAMES = 100  # in a list that every session stores


def _check_id(value: str) -> None:
    if not 0 < len(value) <= MAX_ID_LENGTH or not value.isprintable():
        raise PayloadError(f"an id has {len(value)} characters; allowed are 1 to {MAX_ID_LENGTH}, all printable")


def _check_text(value: str) -> None:
    if len(value) > MAX_TEXT_LENGTH:
        raise PayloadError(f"a text has {len(value)} characters; allowed are {MAX_TEXT_LENGTH}")


def _check_list(values: tuple[object, ...]) -> None:
    if len(values) > MAX_LIST_LENGTH:
        raise PayloadError(f"a list has {len(values)} items; allowed are {MAX_LIST_LENGTH}")


class HeldState(enum.Enum):
    """What became of a task that survived a reconnect."""

    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class HeldTask:
    """A task the silo brought along from an earlier session."""

    task_id: str
    state: HeldState

    def __post_init__(self) -> None:
        _check_id(self.task_id)


@dataclass(frozen=True)
class Hello:
    """The silo's first frame."""

    software_version: str
    methods: tuple[str, ...] = ()
    held_tasks: tuple[HeldTask, ...] = ()
    device: str = ""
    memory_bytes: int = 0
    capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in (self.software_version, self.device, *self.methods, *self.capabilities):
            if len(text) > MAX_NAME_LENGTH:
                raise PayloadError(f"a name in Hello has {len(text)} characters; allowed are {MAX_NAME_LENGTH}")
        for names in (self.methods, self.capabilities):
            if len(names) > MAX_NAMES:
                raise PayloadError(f"a list of names in Hello has {len(names)} items; allowed are {MAX_NAMES}")
        _check_list(self.held_tasks)


@dataclass(frozen=True)
class Welcome:
    """The coordinator's first frame. Intervals are in seconds."""

    session_id: str
    heartbeat_interval: float
    silence_limit: float
    obsolete_task_ids: tuple[str, ...] = ()
    software_version: str = ""
    capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_id(self.session_id)
        _check_list(self.obsolete_task_ids)
        if not 0 < self.heartbeat_interval < self.silence_limit:
            raise PayloadError("the heartbeat interval must be positive and below the silence limit")


@dataclass(frozen=True)
class Heartbeat:
    """Shows that the sender is alive. `send_time` is its clock (Unix seconds), used to report skew only."""

    send_time: float


@dataclass(frozen=True)
class TaskOffer:
    """Offers a task. The chunks of `manifest` follow once the silo has accepted."""

    task: Task
    manifest: Manifest | None

    def __post_init__(self) -> None:
        _check_id(self.task.task_id)
        _check_id(self.task.experiment_id)
        if self.task.kind is TaskKind.INITIALIZE and self.manifest is not None:
            raise PayloadError("an offer to initialize carries no tensors")


@dataclass(frozen=True)
class UnreadableOffer:
    """An offer that arrived but means nothing to this version: refused, instead of ending the session."""

    task_id: str
    message: str

    def __post_init__(self) -> None:
        _check_id(self.task_id)


@dataclass(frozen=True)
class TaskReply:
    """Answers an offer; `refusal` is None for an acceptance."""

    task_id: str
    refusal: RefusalReason | None = None
    message: str = ""

    def __post_init__(self) -> None:
        _check_id(self.task_id)
        _check_text(self.message)


@dataclass(frozen=True)
class TaskProgress:
    """Says how far a task is; `total_step_count` is 0 where it is not known."""

    task_id: str
    step_count: int
    total_step_count: int

    def __post_init__(self) -> None:
        _check_id(self.task_id)


@dataclass(frozen=True)
class TaskResult:
    """The outcome of a task. The chunks of its manifest follow."""

    result: Result

    def __post_init__(self) -> None:
        _check_id(self.result.task_id)


@dataclass(frozen=True)
class UnreadableResult:
    """A result that arrived but contradicts itself: called invalid, instead of ending the session."""

    task_id: str
    message: str
    payload_id: str = ""  # its chunks may already be under way: they are passed over

    def __post_init__(self) -> None:
        _check_id(self.task_id)
        if len(self.payload_id) > MAX_ID_LENGTH:  # it is kept, and no chunk can name it
            raise PayloadError(f"a payload id has {len(self.payload_id)} characters; allowed are 1 to {MAX_ID_LENGTH}")


@dataclass(frozen=True)
class TaskCancel:
    """Withdraws a task; a silo that does not hold it ignores this."""

    task_id: str
    message: str = ""

    def __post_init__(self) -> None:
        _check_id(self.task_id)
        _check_text(self.message)


@dataclass(frozen=True)
class ResultAck:
    """Settles a result: the silo may forget it."""

    task_id: str
    verdict: Verdict
    message: str = ""

    def __post_init__(self) -> None:
        _check_id(self.task_id)
        _check_text(self.message)


@dataclass(frozen=True)
class UnreadableAck:
    """A verdict of a later version arrived: the result stays where it is, and gets a verdict in the next session."""

    task_id: str
    message: str

    def __post_init__(self) -> None:
        _check_id(self.task_id)


@dataclass(frozen=True)
class Drain:
    """The sender is stopping: nothing new, what runs may finish within `grace_period` seconds."""

    message: str
    grace_period: float
    reconnect: bool

    def __post_init__(self) -> None:
        _check_text(self.message)


@dataclass(frozen=True)
class PayloadChunk:
    """A piece of a payload that an offer or a result announced."""

    chunk: Chunk


SiloFrame = Hello | Heartbeat | TaskReply | TaskProgress | TaskResult | PayloadChunk | Drain
CoordinatorFrame = Welcome | Heartbeat | TaskOffer | TaskCancel | PayloadChunk | ResultAck | Drain
UnreadableFrame = UnreadableOffer | UnreadableResult | UnreadableAck  # they only arrive
Frame = SiloFrame | CoordinatorFrame | UnreadableFrame
