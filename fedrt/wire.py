"""Protobuf messages to and from frames and domain values: the only module that knows both sides of a session."""

import enum
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from fedrt.errors import FailureReason, PayloadError, SpecError
from fedrt.payload import Chunk, ElementType, Manifest, TensorHeader
from fedrt.session.frames import (
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
    UnreadableOffer,
    UnreadableResult,
    Welcome,
)
from fedrt.spec import LocalSpec, ModelSpec, OptimizerName, OptimizerSpec, Precision, Schedule, TrainingSpec
from fedrt.task import Failure, Outcome, RefusalReason, Result, Success, Task, TaskKind, Verdict
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import task_pb2 as task_pb
from fedrt.v1 import tensor_pb2 as tensor_pb

MAX_METRICS = 256
_E = TypeVar("_E", bound=enum.Enum)


class _EnumMap:
    """Pairs our enum with the protobuf one by name: FLOAT32 <-> ELEMENT_TYPE_FLOAT32."""

    def __init__(self, ours: type[enum.Enum], wrapper: Any, prefix: str) -> None:
        self._ours = ours
        self._to: dict[enum.Enum, int] = {member: wrapper.Value(f"{prefix}_{member.name}") for member in ours}
        self._from = {number: member for member, number in self._to.items()}

    def to(self, member: enum.Enum) -> Any:
        return self._to[member]

    def back(self, ours: type[_E], number: int) -> _E:
        member = self._from.get(number)
        if not isinstance(member, ours):
            raise PayloadError(f"{ours.__name__} number {number} is not known to this version")
        return member


_ELEMENT = _EnumMap(ElementType, tensor_pb.ElementType, "ELEMENT_TYPE")
KIND = _EnumMap(TaskKind, task_pb.TaskKind, "TASK_KIND")
_REFUSAL = _EnumMap(RefusalReason, task_pb.RefusalReason, "REFUSAL_REASON")
_FAILURE = _EnumMap(FailureReason, task_pb.FailureReason, "FAILURE_REASON")
_VERDICT = _EnumMap(Verdict, task_pb.ResultVerdict, "RESULT_VERDICT")
_SCHEDULE = _EnumMap(Schedule, task_pb.Schedule, "SCHEDULE")
_PRECISION = _EnumMap(Precision, task_pb.Precision, "PRECISION")
_OPTIMIZER = _EnumMap(OptimizerName, task_pb.OptimizerSpec.Algorithm, "ALGORITHM")
_HELD = _EnumMap(HeldState, session_pb.HeldTask.State, "STATE")


def duration_to_pb(seconds: float) -> Duration:
    """Seconds as a protobuf duration, to the nanosecond."""
    whole = int(seconds // 1)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def duration_from_pb(message: Duration) -> float:
    """A protobuf duration in seconds."""
    return message.seconds + message.nanos / 1e9


def time_to_pb(unix_seconds: float) -> Timestamp:
    """Unix seconds as a protobuf timestamp."""
    whole = int(unix_seconds // 1)
    return Timestamp(seconds=whole, nanos=int((unix_seconds - whole) * 1e9))


def time_from_pb(message: Timestamp) -> float:
    """A protobuf timestamp in Unix seconds."""
    return message.seconds + message.nanos / 1e9


def manifest_to_pb(manifest: Manifest) -> tensor_pb.PayloadManifest:
    """The message of a manifest."""
    return tensor_pb.PayloadManifest(
        payload_id=manifest.payload_id,
        tensors=[
            tensor_pb.TensorHeader(name=h.name, element_type=_ELEMENT.to(h.element_type), shape=h.shape)
            for h in manifest.tensors
        ],
        byte_count=manifest.byte_count,
        sha256=manifest.sha256,
    )


def manifest_from_pb(message: tensor_pb.PayloadManifest) -> Manifest:
    """The manifest of a message. Raises `PayloadError` if it contradicts itself."""
    headers = tuple(
        TensorHeader(h.name, _ELEMENT.back(ElementType, h.element_type), tuple(h.shape)) for h in message.tensors
    )
    return Manifest(message.payload_id, headers, message.byte_count, message.sha256)


def chunk_to_pb(chunk: Chunk) -> tensor_pb.PayloadChunk:
    """The message of a chunk; copies its bytes."""
    return tensor_pb.PayloadChunk(payload_id=chunk.payload_id, offset=chunk.offset, data=bytes(chunk.data))


def chunk_from_pb(message: tensor_pb.PayloadChunk) -> Chunk:
    """The chunk of a message. Raises `PayloadError`."""
    return Chunk(message.payload_id, message.offset, message.data)


def local_spec_to_pb(spec: LocalSpec, schema_sha256: bytes = b"") -> task_pb.LocalSpec:
    """The message of the part of an experiment that a silo needs."""
    training, optimizer = spec.training, spec.training.optimizer
    return task_pb.LocalSpec(
        method=task_pb.MethodConfig(
            name=spec.method_name, hyperparameters_json=spec.hyperparameters_json, schema_sha256=schema_sha256
        ),
        model=task_pb.ModelSpec(
            architecture=spec.model.architecture,
            weights_sha256=bytes.fromhex(spec.model.weights_sha256),
            context_dim=spec.model.context_dim,
            feature_dim=spec.model.feature_dim,
        ),
        class_names=spec.classes,
        training=task_pb.TrainingSpec(
            local_epochs=training.local_epochs,
            batch_size=training.batch_size,
            optimizer=task_pb.OptimizerSpec(
                algorithm=_OPTIMIZER.to(optimizer.name),
                learning_rate=optimizer.learning_rate,
                momentum=optimizer.momentum,
                weight_decay=optimizer.weight_decay,
            ),
            schedule=_SCHEDULE.to(training.schedule),
            precision=_PRECISION.to(training.precision),
        ),
        round_count=spec.round_count,
    )


def local_spec_from_pb(message: task_pb.LocalSpec) -> LocalSpec:
    """The value of a message. Raises `SpecError` or `PayloadError`."""
    training, optimizer = message.training, message.training.optimizer
    return LocalSpec(
        method_name=message.method.name,
        hyperparameters_json=message.method.hyperparameters_json,
        model=ModelSpec(
            architecture=message.model.architecture,
            weights_sha256=message.model.weights_sha256.hex(),
            context_dim=message.model.context_dim,
            feature_dim=message.model.feature_dim,
        ),
        classes=tuple(message.class_names),
        training=TrainingSpec(
            local_epochs=training.local_epochs,
            batch_size=training.batch_size,
            optimizer=OptimizerSpec(
                name=_OPTIMIZER.back(OptimizerName, optimizer.algorithm),
                learning_rate=optimizer.learning_rate,
                momentum=optimizer.momentum,
                weight_decay=optimizer.weight_decay,
            ),
            schedule=_SCHEDULE.back(Schedule, training.schedule),
            precision=_PRECISION.back(Precision, training.precision),
        ),
        round_count=message.round_count,
    )


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
        return UnreadableOffer(message.task_id, str(error))


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
            reason = _REFUSAL.back(RefusalReason, message.refusal.reason)
            return TaskReply(message.task_id, reason, message.refusal.message)
        case _:
            raise PayloadError("a task reply holds no answer")


def _result_to_pb(result: Result) -> task_pb.TaskResult:
    match result.outcome:
        case Success(example_count, metrics, work_duration):
            success = task_pb.TaskSuccess(
                shared_tensors=manifest_to_pb(result.manifest) if result.manifest else None,
                example_count=example_count,
                metrics=metrics,
                work_duration=duration_to_pb(work_duration),
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
            if success.HasField("shared_tensors"):
                manifest = manifest_from_pb(success.shared_tensors)
            outcome = Success(success.example_count, dict(success.metrics), duration_from_pb(success.work_duration))
        case "failure":
            outcome = Failure(_FAILURE.back(FailureReason, message.failure.reason), message.failure.message[:2000])
        case _:
            raise PayloadError("a task result holds no outcome")
    return Result(message.task_id, outcome, manifest)


def _task_result_from_pb(message: task_pb.TaskResult) -> TaskResult | UnreadableResult:
    try:
        return TaskResult(_result_from_pb(message))
    except PayloadError as error:
        return UnreadableResult(message.task_id, str(error))


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
        methods=tuple(message.methods),
        held_tasks=tuple(HeldTask(h.task_id, _HELD.back(HeldState, h.state)) for h in message.held_tasks),
        device=message.resources.device,
        memory_bytes=message.resources.memory_bytes,
        capabilities=tuple(message.capabilities),
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
        obsolete_task_ids=tuple(message.obsolete_task_ids),
        software_version=message.software_version,
        capabilities=tuple(message.capabilities),
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
        lambda m: ResultAck(m.task_id, _VERDICT.back(Verdict, m.verdict), m.message[:2000]),
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
