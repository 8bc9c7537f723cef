"""Which frames are legal on a session: one machine for both ends, fed with what is sent and what arrives.

Rules of the file:
* Everything that decides legality is here; nothing here does I/O or reads a clock.
* A frame is judged by what its speaker had said and could have known, never by what is still under way to it. So
  whatever is legal to send is legal on arrival, however long the network delays it.
* An illegal frame raises and leaves the state as it was.

    silo    START --Hello--> OPEN --Drain--> DRAINED        coordinator    START --Welcome--> OPEN --Drain--> DRAINED

    one task:   (offered) --reply: accepted--> WORKING --result--> RETURNED --ack--> (forgotten)
                    ^ |                           ^
                    | +--reply: refused--> (forgotten)
                    +-- offered again             +-- held, from Hello
"""

import enum
from dataclasses import dataclass, field

from fedrt.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from fedrt.payload import Manifest
from fedrt.session.frames import (
    Drain,
    Frame,
    Heartbeat,
    Hello,
    PayloadChunk,
    ResultAck,
    TaskCancel,
    TaskOffer,
    TaskProgress,
    TaskReply,
    TaskResult,
    UnreadableAck,
    UnreadableOffer,
    UnreadableResult,
    Welcome,
)

MAX_OPEN_PAYLOADS = 64
MAX_OPEN_OFFERS = 100


class Role(enum.Enum):
    """Who speaks."""

    SILO = "silo"
    COORDINATOR = "coordinator"


class Phase(enum.Enum):
    """How far a speaker is."""

    START = "start"
    OPEN = "open"
    DRAINED = "drained"


class TaskPhase(enum.Enum):
    """How far a task is in this session."""

    OFFERED = "offered"
    WORKING = "working"
    RETURNED = "returned"


# Which frames each role may speak in which phase; what is not listed is illegal.
_SPOKEN: dict[tuple[Role, Phase], frozenset[type[Frame]]] = {
    (Role.SILO, Phase.START): frozenset({Hello}),
    (Role.SILO, Phase.OPEN): frozenset({Heartbeat, TaskReply, TaskProgress, TaskResult, PayloadChunk, Drain}),
    (Role.SILO, Phase.DRAINED): frozenset({Heartbeat, TaskReply, TaskProgress, TaskResult, PayloadChunk}),
    (Role.COORDINATOR, Phase.START): frozenset({Welcome}),
    (Role.COORDINATOR, Phase.OPEN): frozenset({Heartbeat, TaskOffer, TaskCancel, PayloadChunk, ResultAck, Drain}),
    (Role.COORDINATOR, Phase.DRAINED): frozenset({Heartbeat, TaskCancel, PayloadChunk, ResultAck}),
}


@dataclass
class _Progress:
    """How much of an announced payload its speaker has sent; `task_id` gates the payload of an offer."""

    manifest: Manifest
    task_id: str
    offset: int = 0


@dataclass
class _Speaker:
    phase: Phase = Phase.START
    payloads: dict[str, _Progress] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)  # payloads of results that we could not read


_ARRIVES_AS: dict[type[Frame], type[Frame]] = {
    UnreadableOffer: TaskOffer,
    UnreadableResult: TaskResult,
    UnreadableAck: ResultAck,
}


class _Illegal(Exception):
    """Becomes a local or a remote protocol error, depending on who spoke."""


class Connection:
    """One end of a session: `send` what we say, `receive` what the peer says; both raise on an illegal frame."""

    def __init__(self, our_role: Role) -> None:
        self.our_role = our_role
        self._peer_role = Role.COORDINATOR if our_role is Role.SILO else Role.SILO
        self._speakers = {Role.SILO: _Speaker(), Role.COORDINATOR: _Speaker()}
        self._tasks: dict[str, TaskPhase] = {}

    def send(self, frame: Frame) -> None:
        """Record a frame of ours. Raises `LocalProtocolError`."""
        if type(frame) in _ARRIVES_AS:
            raise LocalProtocolError(f"{type(frame).__name__} only arrives")
        self._speak(self.our_role, frame, LocalProtocolError)

    def receive(self, frame: Frame) -> None:
        """Record a frame of the peer. Raises `RemoteProtocolError`."""
        self._speak(self._peer_role, frame, RemoteProtocolError)

    @property
    def is_open(self) -> bool:
        """Whether both have introduced themselves."""
        return all(speaker.phase is not Phase.START for speaker in self._speakers.values())

    @property
    def our_phase(self) -> Phase:
        """How far we are."""
        return self._speakers[self.our_role].phase

    def task_phase(self, task_id: str) -> TaskPhase | None:
        """How far a task is in this session; None if it is unknown or settled."""
        return self._tasks.get(task_id)

    def owes(self, payload_id: str) -> bool:
        """Whether a payload of ours is announced, still wanted, and not completely sent."""
        return payload_id in self._speakers[self.our_role].payloads

    def is_owed(self, payload_id: str) -> bool:
        """Whether a payload of the peer is announced, still wanted, and not completely here."""
        return payload_id in self._speakers[self._peer_role].payloads

    def payloads_of(self, task_id: str) -> frozenset[str]:
        """What we announced with a task and have not completely sent."""
        open_payloads = self._speakers[self.our_role].payloads
        return frozenset(key for key, progress in open_payloads.items() if progress.task_id == task_id)

    @property
    def may_offer(self) -> bool:
        """Whether one more offer of ours may await its reply."""
        return sum(phase is TaskPhase.OFFERED for phase in self._tasks.values()) < MAX_OPEN_OFFERS

    @property
    def may_announce(self) -> bool:
        """Whether one more payload of ours may be announced."""
        return len(self._speakers[self.our_role].payloads) < MAX_OPEN_PAYLOADS

    def _speak(self, role: Role, frame: Frame, error: type[ProtocolError]) -> None:
        speaker = self._speakers[role]
        spoken = _ARRIVES_AS.get(type(frame), type(frame))
        kind = spoken.__name__
        if spoken not in _SPOKEN[role, speaker.phase]:
            raise error(f"{role.value} must not send {kind} in phase {speaker.phase.value!r}")
        if role is Role.COORDINATOR and self._speakers[Role.SILO].phase is Phase.START:
            raise error(f"coordinator must not send {kind} before Hello")
        if role is Role.SILO and kind != "Hello" and self._speakers[Role.COORDINATOR].phase is Phase.START:
            raise error(f"silo must not send {kind} before Welcome")
        try:
            self._apply(role, speaker, frame)
        except _Illegal as illegal:
            raise error(f"{kind} from {role.value}: {illegal}") from None

    def _apply(self, role: Role, speaker: _Speaker, frame: Frame) -> None:
        match frame:
            case Hello(held_tasks=held):
                if len({task.task_id for task in held}) != len(held):
                    raise _Illegal("a held task is named twice")
                speaker.phase = Phase.OPEN
                self._tasks = {task.task_id: TaskPhase.WORKING for task in held}
            case Welcome(obsolete_task_ids=obsolete):
                if unknown := set(obsolete) - set(self._tasks):
                    raise _Illegal(f"task {min(unknown)!r} is called obsolete, but is not held")
                speaker.phase = Phase.OPEN
                for task_id in obsolete:
                    del self._tasks[task_id]
            case Drain():
                speaker.phase = Phase.DRAINED
            case TaskOffer(task, manifest):
                self._apply_offer(speaker, task.task_id, manifest)
            case UnreadableOffer(task_id):
                self._apply_offer(speaker, task_id, None)
            case TaskReply(task_id, refusal):
                self._require(task_id, TaskPhase.OFFERED)
                if refusal is None:
                    self._tasks[task_id] = TaskPhase.WORKING
                else:
                    self._forget_offer(task_id)
            case TaskProgress(task_id):
                self._require(task_id, TaskPhase.WORKING)
            case TaskResult(result):
                self._apply_result(speaker, result.task_id, result.manifest)
            case UnreadableResult(task_id, _, payload_id):
                if len(speaker.ignored) >= MAX_OPEN_PAYLOADS:
                    raise _Illegal(f"more than {MAX_OPEN_PAYLOADS} results were unreadable")
                self._apply_result(speaker, task_id, None)
                if payload_id:
                    speaker.ignored.add(payload_id)
            case ResultAck(task_id) | UnreadableAck(task_id):
                self._require(task_id, TaskPhase.RETURNED)
                self._forget_offer(task_id)
            case PayloadChunk():
                self._apply_chunk(role, speaker, frame)
            case Heartbeat() | TaskCancel():
                pass

    def _apply_offer(self, speaker: _Speaker, task_id: str, manifest: Manifest | None) -> None:
        if task_id in self._tasks:
            raise _Illegal(f"task {task_id!r} is already {self._tasks[task_id].value}")
        if not self.may_offer:
            raise _Illegal(f"more than {MAX_OPEN_OFFERS} offers are open")
        self._announce(speaker, task_id, manifest)
        self._tasks[task_id] = TaskPhase.OFFERED

    def _apply_result(self, speaker: _Speaker, task_id: str, manifest: Manifest | None) -> None:
        self._require(task_id, TaskPhase.WORKING)
        self._announce(speaker, task_id, manifest)
        self._tasks[task_id] = TaskPhase.RETURNED

    def _announce(self, speaker: _Speaker, task_id: str, manifest: Manifest | None) -> None:
        if manifest is None:
            return
        if manifest.payload_id in speaker.payloads:
            raise _Illegal(f"payload {manifest.payload_id!r} is announced twice")
        if len(speaker.payloads) >= MAX_OPEN_PAYLOADS:
            raise _Illegal(f"more than {MAX_OPEN_PAYLOADS} payloads are open")
        speaker.payloads[manifest.payload_id] = _Progress(manifest, task_id)
        speaker.ignored.discard(manifest.payload_id)

    def _apply_chunk(self, role: Role, speaker: _Speaker, frame: PayloadChunk) -> None:
        chunk = frame.chunk
        progress = speaker.payloads.get(chunk.payload_id)
        if progress is None and chunk.payload_id in speaker.ignored:
            return
        if progress is None:
            raise _Illegal(f"payload {chunk.payload_id!r} is not announced")
        if role is Role.COORDINATOR and self._tasks.get(progress.task_id) is TaskPhase.OFFERED:
            raise _Illegal(f"task {progress.task_id!r} is not yet accepted")
        end = chunk.offset + len(chunk.data)
        if chunk.offset != progress.offset or end > progress.manifest.byte_count:
            raise _Illegal(
                f"bytes {chunk.offset} to {end} of payload {chunk.payload_id!r}; expected is byte {progress.offset} "
                f"and at most {progress.manifest.byte_count}"
            )
        progress.offset = end
        if end == progress.manifest.byte_count:
            del speaker.payloads[chunk.payload_id]

    def _require(self, task_id: str, phase: TaskPhase) -> None:
        now = self._tasks.get(task_id)
        if now is not phase:
            raise _Illegal(f"task {task_id!r} is {now.value if now else 'unknown'}, not {phase.value}")

    def _forget_offer(self, task_id: str) -> None:
        del self._tasks[task_id]
        offered = self._speakers[Role.COORDINATOR].payloads
        for payload_id in [key for key, progress in offered.items() if progress.task_id == task_id]:
            del offered[payload_id]
