"""Golden transcripts of sessions: a script says who speaks; the file shows what crosses and what each end remembers.

A line that starts in the first column is a command; the indented lines below it are the log. Frames cross as the bytes
of their protobuf messages, so every line also shows that nothing else reaches the peer. A frame arrives at once, unless
`delay` holds back what its speaker says until `deliver`.
"""

import copy
import re
import shlex
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedrt.errors import FailureReason, PayloadError, ProtocolError
from fedrt.payload import Chunk, ElementType, Manifest, TensorHeader
from fedrt.session.connection import Connection, Role
from fedrt.session.frames import (
    Drain,
    Frame,
    Heartbeat,
    HeldState,
    HeldTask,
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
from fedrt.session.liveness import Liveness
from fedrt.task import Failure, RefusalReason, Result, Success, Verdict
from fedrt.v1.session_service_pb2 import OpenSessionRequest, OpenSessionResponse
from fedrt.wire import request_from_pb, request_to_pb, response_from_pb, response_to_pb
from tests.samples import task

HEARTBEAT_INTERVAL, SILENCE_LIMIT = 5.0, 15.0
PEER = {Role.SILO: Role.COORDINATOR, Role.COORDINATOR: Role.SILO}


def replay(path: Path) -> str:
    """The file again, with the log as it is now."""
    script = [line for line in path.read_text().splitlines() if line and not line.startswith(" ")]
    transcript = Transcript()
    lines: list[str] = []
    for line in script:
        lines.append(line)
        if not line.startswith("#"):
            lines += [f"  {entry}" for entry in transcript.run(line)]
    return "\n".join(lines) + "\n"


class Transcript:
    """A silo, its coordinator, the network between them, and a clock that only the script moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reconnect()

    def run(self, line: str) -> list[str]:
        """Carry out one command and return its log."""
        command, *words = shlex.split(line)
        if command == "at":
            self.now = float(words[0])
            command, *words = words[1:]
        if command in (role.value for role in Role):
            return [*self.speak(Role(command), words), *self.views()]
        return [*getattr(self, command)(*words), *self.views()]

    # Commands

    def reconnect(self) -> list[str]:
        """A new session begins, with two ends that remember nothing; what is under way is lost."""
        lost = [told(frame) for role in Role for frame in self.arrivals(role)] if hasattr(self, "under_way") else []
        self.ends = {role: Connection(role) for role in Role}
        self.under_way: dict[Role, deque[bytes]] = {role: deque() for role in Role}
        self.delayed: set[Role] = set()
        self.clocks = {role: Liveness(HEARTBEAT_INTERVAL, SILENCE_LIMIT, self.now, self.now) for role in Role}
        return [f"lost: {text}" for text in lost]

    def delay(self, who: str) -> list[str]:
        """Whatever `who` says stays under way until `deliver`."""
        self.delayed.add(Role(who))
        return []

    def deliver(self, who: str) -> list[str]:
        """Everything that `who` said arrives, in order."""
        self.delayed.discard(Role(who))
        return self.arrive(Role(who))

    def tick(self) -> list[str]:
        """Both ends look at the clock: heartbeats are sent, and silence is noticed."""
        lines: list[str] = []
        for role, clock in self.clocks.items():
            if clock.is_silent(self.now):
                lines.append(f"{role.value} has heard nothing for {self.now - clock.last_heard:g} seconds: it gives up")
            elif clock.heartbeat_due(self.now):
                lines += self.say(role, Heartbeat(self.now), {})
        return [*lines, *(f"{role.value} looks again at {clock.next_check():g}" for role, clock in self.clocks.items())]

    # What the commands share

    def speak(self, role: Role, words: list[str]) -> list[str]:
        """`TaskOffer t1 payload=p1:16 pb:task_offer.kind=77`: a frame, and what damages its message."""
        damage = dict(word.removeprefix("pb:").split("=") for word in words if word.startswith("pb:"))
        try:
            frame = frame_of([word for word in words if not word.startswith("pb:")], self.now)
        except PayloadError as error:
            return [f"no such frame: {error}"]
        return self.say(role, frame, damage)

    def say(self, role: Role, frame: Frame, damage: dict[str, str]) -> list[str]:
        end, before = self.ends[role], remembered(self.ends[role])
        try:
            end.send(frame)
        except ProtocolError as error:
            assert remembered(end) == before, "an illegal frame left a trace"
            return [f"{role.value} must not: {type(error).__name__}: {error}", *self.forced(role, frame, damage)]
        self.clocks[role].sent(self.now)
        self.under_way[role].append(encoded(role, frame, damage))
        if role in self.delayed:
            return [f"{role.value} > ...: {told(frame)}"]
        return self.arrive(role)

    def forced(self, role: Role, frame: Frame, damage: dict[str, str]) -> list[str]:
        """What the peer would make of a frame that must not be sent. It may not know better yet."""
        hearer, name = copy.deepcopy(self.ends[PEER[role]]), PEER[role].value
        before = remembered(hearer)
        try:
            hearer.receive(decoded(role, encoded(role, frame, damage)) if damage else frame)
        except ProtocolError as error:
            assert remembered(hearer) == before, "an illegal frame left a trace"
            return [f"{name} would not take it: {type(error).__name__}: {error}"]
        return [f"{name} would take it"]

    def arrivals(self, role: Role) -> Iterable[Frame]:
        while self.under_way[role]:
            yield decoded(role, self.under_way[role].popleft())

    def arrive(self, role: Role) -> list[str]:
        lines = []
        for frame in self.arrivals(role):
            self.ends[PEER[role]].receive(frame)  # legal to send is legal on arrival: this must never raise
            self.clocks[PEER[role]].heard(self.now)
            lines.append(f"{role.value} > {PEER[role].value}: {told(frame)}")
        return lines

    def views(self) -> list[str]:
        """What the two ends remember: one line where they agree."""
        silo, coordinator = (view(self.ends[role]) for role in Role)
        if silo == coordinator:
            return [f"= {silo}"]
        return [f"= for the silo: {silo}", f"= for the coordinator: {coordinator}"]


def encoded(role: Role, frame: Frame, damage: dict[str, str]) -> bytes:
    """A frame as it crosses; `damage` is what a later version would write: numbers by the path of their field."""
    message: Any = (request_to_pb if role is Role.SILO else response_to_pb)(frame)
    for path, value in damage.items():
        *parents, name = path.split(".")
        part = message
        for parent in parents:
            part = part[int(parent)] if parent.isdigit() else getattr(part, parent)
        setattr(part, name, int(value))
    return message.SerializeToString()


def decoded(role: Role, message: bytes) -> Frame:
    """A frame as it arrives."""
    frame = (
        request_from_pb(OpenSessionRequest.FromString(message))
        if role is Role.SILO
        else response_from_pb(OpenSessionResponse.FromString(message))
    )
    assert frame is not None
    return frame


def remembered(connection: Connection) -> str:
    """Everything a connection remembers."""
    return repr(sorted(vars(connection).items()))


def view(connection: Connection) -> str:
    """What a connection remembers, in words."""
    speakers = connection._speakers
    facts = [", ".join(f"{role.value} {speakers[role].phase.value}" for role in Role)]
    facts += [f"{task_id} {phase.value}" for task_id, phase in connection._tasks.items()]
    for role in Role:
        for name, progress in speakers[role].payloads.items():
            facts.append(f"{name} of {role.value} {progress.offset}/{progress.manifest.byte_count}")
        facts += [f"{name} of {role.value} passed over" for name in sorted(speakers[role].ignored)]
    return "; ".join(facts)


# Frames from words, and back


def frame_of(words: list[str], now: float) -> Frame:
    """`TaskReply t1 refusal=busy message="later"`."""
    kind, *rest = words
    plain = [word for word in rest if not re.match(r"[a-z_]+=", word)]
    options = dict(word.split("=", 1) for word in rest if word not in plain)
    message = options.pop("message", "")
    frame = _BUILDERS[kind](plain, options, message, now)
    assert not options, f"unknown options {options}"
    return frame


def _hello(_plain: list[str], options: dict[str, str], _message: str, _now: float) -> Hello:
    held = [item.split(":") for item in options.pop("held", "").split(",") if item]
    return Hello("1.0", held_tasks=tuple(HeldTask(task_id, HeldState(state)) for task_id, state in held))


def _welcome(_plain: list[str], options: dict[str, str], _message: str, _now: float) -> Welcome:
    interval, limit = float(options.pop("heartbeat", HEARTBEAT_INTERVAL)), float(options.pop("silence", SILENCE_LIMIT))
    return Welcome("s1", interval, limit, tuple(item for item in options.pop("obsolete", "").split(",") if item))


def _reply(plain: list[str], options: dict[str, str], message: str, _now: float) -> TaskReply:
    refusal = options.pop("refusal", None)
    return TaskReply(plain[0], RefusalReason(refusal) if refusal else None, message)


def _result(plain: list[str], options: dict[str, str], message: str, _now: float) -> TaskResult:
    reason, manifest = options.pop("failure", None), _manifest(options)
    outcome = Failure(FailureReason(reason), message) if reason else Success(3, {}, 1.0)
    return TaskResult(Result(plain[0], outcome, manifest))


def _chunk(plain: list[str], _options: dict[str, str], _message: str, _now: float) -> PayloadChunk:
    start, stop = map(int, plain[1].split(".."))
    return PayloadChunk(Chunk(plain[0], start, bytes(stop - start)))


def _manifest(options: dict[str, str]) -> Manifest | None:
    if "payload" not in options:
        return None
    name, size = options.pop("payload").split(":")
    header = TensorHeader("context", ElementType.FLOAT32, (int(size) // 4,))
    return Manifest(name, (header,), int(size), bytes(32))


_BUILDERS = {
    "Hello": _hello,
    "Welcome": _welcome,
    "Heartbeat": lambda _plain, _options, _message, now: Heartbeat(now),
    "TaskOffer": lambda plain, options, _message, _now: TaskOffer(task(plain[0]), _manifest(options)),
    "TaskReply": _reply,
    "TaskProgress": lambda plain, _options, _message, _now: TaskProgress(plain[0], int(plain[1]), int(plain[2])),
    "TaskResult": _result,
    "PayloadChunk": _chunk,
    "TaskCancel": lambda plain, _options, message, _now: TaskCancel(plain[0], message),
    "ResultAck": lambda plain, _options, message, _now: ResultAck(plain[0], Verdict(plain[1]), message),
    "Drain": lambda _plain, options, message, _now: Drain(message, 60.0, options.pop("reconnect") == "yes"),
    "UnreadableAck": lambda plain, _options, message, _now: UnreadableAck(plain[0], message),
    "UnreadableOffer": lambda plain, _options, message, _now: UnreadableOffer(plain[0], message),
    "UnreadableResult": lambda plain, _options, message, _now: UnreadableResult(plain[0], message),
}


def told(frame: Frame) -> str:
    """A frame as one line."""
    match frame:
        case Hello(held_tasks=held):
            text = "".join(f" {task.task_id}:{task.state.value}" for task in held)
            return f"Hello{', held are' if held else ''}{text}"
        case Welcome(heartbeat_interval=interval, silence_limit=limit, obsolete_task_ids=obsolete):
            text = f", obsolete are {' '.join(obsolete)}" if obsolete else ""
            return f"Welcome, heartbeats every {interval:g} seconds, silence ends after {limit:g}{text}"
        case Heartbeat(send_time):
            return f"Heartbeat at {send_time:g}"
        case TaskOffer(offered, manifest):
            return f"TaskOffer {offered.task_id}{announced(manifest)}"
        case TaskReply(task_id, refusal, message):
            return f"TaskReply {task_id} {f'refused, {refusal.value}' if refusal else 'accepted'}{quoted(message)}"
        case TaskProgress(task_id, done, planned):
            return f"TaskProgress {task_id} {done} of {planned} steps"
        case TaskResult(result):
            failure = f", {result.outcome.reason.value}" if isinstance(result.outcome, Failure) else ""
            message = result.outcome.message if isinstance(result.outcome, Failure) else ""
            return f"TaskResult {result.task_id}{failure}{announced(result.manifest)}{quoted(message)}"
        case PayloadChunk(chunk):
            return f"PayloadChunk {chunk.payload_id} {chunk.offset}..{chunk.offset + len(chunk.data)}"
        case TaskCancel(task_id, message):
            return f"TaskCancel {task_id}{quoted(message)}"
        case ResultAck(task_id, verdict, message):
            return f"ResultAck {task_id} {verdict.name}{quoted(message)}"
        case Drain(message, _, reconnect):
            return f"Drain, {'reconnect later' if reconnect else 'for good'}{quoted(message)}"
        case UnreadableAck(task_id, message):
            return f"UnreadableAck {task_id}{quoted(message)}"
        case UnreadableOffer(task_id, message):
            return f"UnreadableOffer {task_id}{quoted(message)}"
        case UnreadableResult(task_id, message, payload_id):
            chunks = f", chunks of {payload_id} are passed over" if payload_id else ""
            return f"UnreadableResult {task_id}{chunks}{quoted(message)}"


def announced(manifest: Manifest | None) -> str:
    return f", announces {manifest.payload_id} of {manifest.byte_count} bytes" if manifest else ""


def quoted(message: str) -> str:
    return f': "{message}"' if message else ""
