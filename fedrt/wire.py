"""Protobuf messages to and from frames: the only module that knows both sides of a session."""

from collections.abc import Callable, Mapping
from typing import Any

from fedrt.errors import FailureReason, PayloadError, SpecError
from fedrt.payload import MAX_NAME_LENGTH, Manifest
from fedrt.session.frames import (
    MAX_LIST_LENGTH,
    MAX_NAMES,
    MAX_TEXT_LENGTH,
    CoordinatorFrame,
    Drain,
    Frame,
    Heartbeat,
    HeldState,
    HeldTask,
    Hello,
    PayloadChunk,
    ResultAck,
    SiloFrame,
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
from fedrt.task import Failure, Outcome, RefusalReason, Result, Success, Task, TaskKind, Verdict
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import task_pb2 as task_pb
from fedrt.wire_values import (
    KIND,
    EnumMap,
    at_most,
    chunk_from_pb,
    chunk_to_pb,
    duration_from_pb,
    duration_to_pb,
    local_spec_from_pb,
    local_spec_to_pb,
    manifest_from_pb,
    manifest_to_pb,
    time_from_pb,
    time_to_pb,
)

MAX_METRICS = 256
_NAMES = "a list of names in Hello"

_REFUSAL = EnumMap(RefusalReason, task_pb.RefusalReason, "REFUSAL_REASON")
_FAILURE = EnumMap(FailureReason, task_pb.FailureReason, "FAILURE_REASON")
_VERDICT = EnumMap(Verdict, task_pb.ResultVerdict, "RESULT_VERDICT")
_HELD = EnumMap(HeldState, session_pb.HeldTask.State, "STATE")


def _offer_to_pb(frame: TaskOffer) -> task_pb.TaskOffer:
    task = frame.task
    return task_pb.TaskOffer(
        task_id=task.task_id,
        experiment_id=task.experiment_id,
        round_number=task.round_number,
        kind=KIND.to(task.kind),
        local=local_spec_to_pb(task.local, task.schema_sha256),
        shared_tensors=manifest_to_pb(frame.manifest) if frame.manifest else None,
        time_limit=duration_to_pb(task.time_limit),
        seed=task.seed,
    )


def _offer_from_pb(message: task_pb.TaskOffer) -> TaskOffer | UnreadableOffer:
    try:
        return _read_offer(message)
    except (PayloadError, SpecError) as error:
        return UnreadableOffer(message.task_id, str(error)[:MAX_TEXT_LENGTH])


def _read_offer(message: task_pb.TaskOffer) -> TaskOffer:
    task = Task(
        task_id=message.task_id,
        experiment_id=message.experiment_id,
        round_number=message.round_number,
        kind=KIND.back(TaskKind, message.kind),
        local=local_spec_from_pb(message.local),
        schema_sha256=message.local.method.schema_sha256,
        time_limit=duration_from_pb(message.time_limit),
        seed=message.seed,
    )
    return TaskOffer(task, manifest_from_pb(message.shared_tensors) if message.HasField("shared_tensors") else None)


def _reply_to_pb(frame: TaskReply) -> task_pb.TaskReply:
    if frame.refusal is None:
        return task_pb.TaskReply(task_id=frame.task_id, acceptance=task_pb.TaskAcceptance())
    refusal = task_pb.TaskRefusal(reason=_REFUSAL.to(frame.refusal), message=frame.message)
    return task_pb.TaskReply(task_id=frame.task_id, refusal=refusal)


def _reply_from_pb(message: task_pb.TaskReply) -> TaskReply:
    match message.WhichOneof("answer"):
        case "acceptance":
            return TaskReply(message.task_id)
        case "refusal":
            reason = _REFUSAL.back(RefusalReason, message.refusal.reason, RefusalReason.POLICY)
            return TaskReply(message.task_id, reason, message.refusal.message)
        case _:
            raise PayloadError("a task reply holds no answer")


def _result_to_pb(result: Result) -> task_pb.TaskResult:
    match result.outcome:
        case Success(example_count, metrics, work_duration, received_sha256):
            success = task_pb.TaskSuccess(
                shared_tensors=manifest_to_pb(result.manifest) if result.manifest else None,
                example_count=example_count,
                metrics=metrics,
                work_duration=duration_to_pb(work_duration),
                received_sha256=bytes.fromhex(received_sha256),
            )
            return task_pb.TaskResult(task_id=result.task_id, success=success)
        case Failure(reason, message):
            failure = task_pb.TaskFailure(reason=_FAILURE.to(reason), message=message)
            return task_pb.TaskResult(task_id=result.task_id, failure=failure)


def _result_from_pb(message: task_pb.TaskResult) -> Result:
    manifest: Manifest | None = None
    outcome: Outcome
    match message.WhichOneof("outcome"):
        case "success":
            success = message.success
            if len(success.metrics) > MAX_METRICS:
                raise PayloadError(f"a result has {len(success.metrics)} metrics; allowed are {MAX_METRICS}")
            if (longest := max(map(len, success.metrics), default=0)) > MAX_NAME_LENGTH:
                raise PayloadError(f"a metric name has {longest} characters; allowed are {MAX_NAME_LENGTH}")
            if success.HasField("shared_tensors"):
                manifest = manifest_from_pb(success.shared_tensors)
            duration = duration_from_pb(success.work_duration)
            received = success.received_sha256.hex()
            if len(received) not in (0, 64):
                raise PayloadError(f"a digest has {len(received) // 2} bytes; a SHA-256 digest has 32")
            outcome = Success(success.example_count, dict(success.metrics), duration, received)
        case "failure":
            outcome = Failure(
                _FAILURE.back(FailureReason, message.failure.reason, FailureReason.INTERNAL),
                message.failure.message[:2000],
            )
        case _:
            raise PayloadError("a task result holds no outcome")
    return Result(message.task_id, outcome, manifest)


def _task_result_from_pb(message: task_pb.TaskResult) -> TaskResult | UnreadableResult:
    try:
        return TaskResult(_result_from_pb(message))
    except PayloadError as error:
        return UnreadableResult(
            message.task_id, str(error)[:MAX_TEXT_LENGTH], message.success.shared_tensors.payload_id
        )


def _ack_from_pb(message: task_pb.ResultAck) -> ResultAck | UnreadableAck:
    try:
        verdict = _VERDICT.back(Verdict, message.verdict)
    except PayloadError as error:
        return UnreadableAck(message.task_id, f"{error}; {message.message}"[:MAX_TEXT_LENGTH])
    return ResultAck(message.task_id, verdict, message.message[:MAX_TEXT_LENGTH])


def _hello_to_pb(frame: Hello) -> session_pb.Hello:
    return session_pb.Hello(
        software_version=frame.software_version,
        capabilities=frame.capabilities,
        methods=frame.methods,
        held_tasks=[session_pb.HeldTask(task_id=h.task_id, state=_HELD.to(h.state)) for h in frame.held_tasks],
        resources=session_pb.Resources(device=frame.device, memory_bytes=frame.memory_bytes),
    )


def _hello_from_pb(message: session_pb.Hello) -> Hello:
    return Hello(
        software_version=message.software_version,
        methods=tuple(at_most(MAX_NAMES, message.methods, _NAMES)),
        held_tasks=tuple(
            HeldTask(h.task_id, _HELD.back(HeldState, h.state, HeldState.RUNNING))
            for h in at_most(MAX_LIST_LENGTH, message.held_tasks)
        ),
        device=message.resources.device,
        memory_bytes=message.resources.memory_bytes,
        capabilities=tuple(at_most(MAX_NAMES, message.capabilities, _NAMES)),
    )


def _welcome_to_pb(frame: Welcome) -> session_pb.Welcome:
    return session_pb.Welcome(
        session_id=frame.session_id,
        capabilities=frame.capabilities,
        heartbeat_interval=duration_to_pb(frame.heartbeat_interval),
        silence_limit=duration_to_pb(frame.silence_limit),
        obsolete_task_ids=frame.obsolete_task_ids,
        software_version=frame.software_version,
    )


def _welcome_from_pb(message: session_pb.Welcome) -> Welcome:
    return Welcome(
        session_id=message.session_id,
        heartbeat_interval=duration_from_pb(message.heartbeat_interval),
        silence_limit=duration_from_pb(message.silence_limit),
        obsolete_task_ids=tuple(at_most(MAX_LIST_LENGTH, message.obsolete_task_ids)),
        software_version=message.software_version,
        capabilities=tuple(at_most(MAX_NAMES, message.capabilities)),
    )


def _drain_to_pb(frame: Drain) -> session_pb.Drain:
    grace = duration_to_pb(frame.grace_period)
    return session_pb.Drain(message=frame.message, grace_period=grace, reconnect=frame.reconnect)


def _drain_from_pb(message: session_pb.Drain) -> Drain:
    return Drain(message.message, duration_from_pb(message.grace_period), message.reconnect)


# oneof field -> (frame class, to message, from message); the two tables below say who may speak it
_Codec = tuple[type[Frame], Callable[[Any], Any], Callable[[Any], Frame]]
_HEARTBEAT: _Codec = (
    Heartbeat,
    lambda f: session_pb.Heartbeat(send_time=time_to_pb(f.send_time)),
    lambda m: Heartbeat(time_from_pb(m.send_time)),
)
_CHUNK: _Codec = (PayloadChunk, lambda f: chunk_to_pb(f.chunk), lambda m: PayloadChunk(chunk_from_pb(m)))
_DRAIN: _Codec = (Drain, _drain_to_pb, _drain_from_pb)
_REQUEST: Mapping[str, _Codec] = {
    "hello": (Hello, _hello_to_pb, _hello_from_pb),
    "heartbeat": _HEARTBEAT,
    "task_reply": (TaskReply, _reply_to_pb, _reply_from_pb),
    "task_progress": (
        TaskProgress,
        lambda f: task_pb.TaskProgress(task_id=f.task_id, step_count=f.step_count, total_step_count=f.total_step_count),
        lambda m: TaskProgress(m.task_id, m.step_count, m.total_step_count),
    ),
    "task_result": (TaskResult, lambda f: _result_to_pb(f.result), _task_result_from_pb),
    "payload_chunk": _CHUNK,
    "drain": _DRAIN,
}
_RESPONSE: Mapping[str, _Codec] = {
    "welcome": (Welcome, _welcome_to_pb, _welcome_from_pb),
    "heartbeat": _HEARTBEAT,
    "task_offer": (TaskOffer, _offer_to_pb, _offer_from_pb),
    "task_cancel": (
        TaskCancel,
        lambda f: task_pb.TaskCancel(task_id=f.task_id, message=f.message),
        lambda m: TaskCancel(m.task_id, m.message[:2000]),
    ),
    "payload_chunk": _CHUNK,
    "result_ack": (
        ResultAck,
        lambda f: task_pb.ResultAck(task_id=f.task_id, verdict=_VERDICT.to(f.verdict), message=f.message),
        _ack_from_pb,
    ),
    "drain": _DRAIN,
}
_REQUEST_FIELD = {codec[0]: (field, codec[1]) for field, codec in _REQUEST.items()}
_RESPONSE_FIELD = {codec[0]: (field, codec[1]) for field, codec in _RESPONSE.items()}


def request_to_pb(frame: SiloFrame) -> session_pb.OpenSessionRequest:
    """The message of a silo's frame."""
    field, encode = _REQUEST_FIELD[type(frame)]
    return session_pb.OpenSessionRequest(**{field: encode(frame)})


def request_from_pb(message: session_pb.OpenSessionRequest) -> Frame | None:
    """The silo's frame of a message; None for a frame of a later version. Raises `PayloadError` or `SpecError`."""
    return _frame_from_pb(_REQUEST, message)


def response_to_pb(frame: CoordinatorFrame) -> session_pb.OpenSessionResponse:
    """The message of a coordinator's frame."""
    field, encode = _RESPONSE_FIELD[type(frame)]
    return session_pb.OpenSessionResponse(**{field: encode(frame)})


def response_from_pb(message: session_pb.OpenSessionResponse) -> Frame | None:
    """The coordinator's frame of a message; None for a frame of a later version. Raises as `request_from_pb`."""
    return _frame_from_pb(_RESPONSE, message)


def _frame_from_pb(codecs: Mapping[str, _Codec], message: Any) -> Frame | None:
    field = message.WhichOneof("frame")
    return codecs[field][2](getattr(message, field)) if field else None
