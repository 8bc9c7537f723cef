"""Protobuf messages to and from values: enums, times, manifests, chunks and specifications. See `wire` for frames."""

import enum
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from fedrt.errors import PayloadError
from fedrt.payload import MAX_DIMENSIONS, MAX_TENSORS, Chunk, ElementType, Manifest, TensorHeader
from fedrt.spec import (
    MAX_CLASSES,
    EvaluationSpec,
    EvaluationSplit,
    ExperimentSpec,
    LocalEvaluationSpec,
    LocalSpec,
    ModelSpec,
    OnTooFew,
    OptimizerName,
    OptimizerSpec,
    Precision,
    RoundsSpec,
    Schedule,
    TrainingSpec,
)
from fedrt.task import TaskKind
from fedrt.v1 import experiment_pb2 as experiment_pb
from fedrt.v1 import task_pb2 as task_pb
from fedrt.v1 import tensor_pb2 as tensor_pb

_E = TypeVar("_E", bound=enum.Enum)
_T = TypeVar("_T")


class EnumMap:
    """Pairs our enum with the protobuf one by name: FLOAT32 <-> ELEMENT_TYPE_FLOAT32."""

    def __init__(self, ours: type[enum.Enum], wrapper: Any, prefix: str) -> None:
        self._to: dict[enum.Enum, int] = {member: wrapper.Value(f"{prefix}_{member.name}") for member in ours}
        self._from = {number: member for member, number in self._to.items()}

    def to(self, member: enum.Enum) -> Any:
        """The protobuf number of a member."""
        return self._to[member]

    def back(self, ours: type[_E], number: int, unknown: _E | None = None) -> _E:
        """The member of a number, or `unknown` for one that this version does not know; None raises `PayloadError`."""
        member = self._from.get(number, unknown)
        if not isinstance(member, ours):
            raise PayloadError(f"{ours.__name__} number {number} is not known to this version")
        return member


_ELEMENT = EnumMap(ElementType, tensor_pb.ElementType, "ELEMENT_TYPE")
KIND = EnumMap(TaskKind, task_pb.TaskKind, "TASK_KIND")
_SPLIT = EnumMap(EvaluationSplit, task_pb.EvaluationSplit, "EVALUATION_SPLIT")
_SCHEDULE = EnumMap(Schedule, task_pb.Schedule, "SCHEDULE")
_PRECISION = EnumMap(Precision, task_pb.Precision, "PRECISION")
_OPTIMIZER = EnumMap(OptimizerName, task_pb.OptimizerSpec.Algorithm, "ALGORITHM")
_ON_TOO_FEW = EnumMap(OnTooFew, experiment_pb.RoundsSpec.OnTooFew, "ON_TOO_FEW")


def at_most(limit: int, values: Sequence[_T], what: str = "a list") -> Sequence[_T]:
    """The list as it arrived, before anything is made of its items. Raises `PayloadError` for one that is too long."""
    if len(values) > limit:
        raise PayloadError(f"{what} has {len(values)} items; allowed are {limit}")
    return values


def duration_to_pb(seconds: float) -> Duration:
    """Seconds as a protobuf duration, to the nanosecond."""
    return Duration(**_split(seconds))


def _split(seconds: float) -> dict[str, int]:
    whole = int(seconds // 1)
    nanos = round((seconds - whole) * 1e9)
    return {"seconds": whole + nanos // 10**9, "nanos": nanos % 10**9}


def duration_from_pb(message: Duration) -> float:
    """A protobuf duration in seconds."""
    return message.seconds + message.nanos / 1e9


def time_to_pb(unix_seconds: float) -> Timestamp:
    """Unix seconds as a protobuf timestamp."""
    return Timestamp(**_split(unix_seconds))


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
    if len(message.tensors) > MAX_TENSORS:
        raise PayloadError(f"a manifest has {len(message.tensors)} tensors; allowed are 1 to {MAX_TENSORS}")
    headers = tuple(
        TensorHeader(
            h.name, _ELEMENT.back(ElementType, h.element_type), tuple(at_most(MAX_DIMENSIONS, h.shape, "a shape"))
        )
        for h in message.tensors
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
            view_count=training.views,
        ),
        round_count=spec.round_count,
        evaluation=task_pb.LocalEvaluationSpec(
            splits=[_SPLIT.to(split) for split in spec.evaluation.splits],
            novel_class_names=spec.evaluation.novel_classes,
        ),
        seed=spec.seed,
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
        classes=tuple(at_most(MAX_CLASSES, message.class_names)),
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
            views=training.view_count,
        ),
        round_count=message.round_count,
        evaluation=LocalEvaluationSpec(
            tuple(_SPLIT.back(EvaluationSplit, split) for split in message.evaluation.splits)
            or LocalEvaluationSpec.splits,
            tuple(at_most(MAX_CLASSES, message.evaluation.novel_class_names)),
        ),
        seed=message.seed,
    )


def experiment_spec_to_pb(spec: ExperimentSpec, schema_sha256: bytes = b"") -> experiment_pb.ExperimentSpec:
    """The message of an experiment's specification."""
    rounds = spec.rounds
    return experiment_pb.ExperimentSpec(
        local=local_spec_to_pb(spec.local, schema_sha256),
        rounds=experiment_pb.RoundsSpec(
            count=rounds.count,
            time_limit=duration_to_pb(rounds.time_limit),
            min_result_count=rounds.min_results or 0,
            max_silo_count=rounds.max_silos or 0,
            silo_ids=rounds.silos,
            on_too_few=_ON_TOO_FEW.to(rounds.on_too_few),
            retry_count=rounds.retries,
            over_selection_count=rounds.over_selection,
            set_aside_after_count=rounds.set_aside_after,
            set_aside_round_count=rounds.set_aside_rounds,
        ),
        evaluation=experiment_pb.EvaluationSpec(interval=spec.evaluation.every),
        seed=spec.seed,
    )


def experiment_spec_from_pb(message: experiment_pb.ExperimentSpec) -> ExperimentSpec:
    """The value of a message. Raises `SpecError` or `PayloadError`."""
    rounds = message.rounds
    return ExperimentSpec(
        local=replace(local_spec_from_pb(message.local), round_count=rounds.count, seed=message.seed),
        rounds=RoundsSpec(
            count=rounds.count,
            time_limit=duration_from_pb(rounds.time_limit),
            min_results=rounds.min_result_count or None,
            max_silos=rounds.max_silo_count or None,
            silos=tuple(rounds.silo_ids),
            on_too_few=_ON_TOO_FEW.back(OnTooFew, rounds.on_too_few),
            retries=rounds.retry_count,
            over_selection=rounds.over_selection_count,
            set_aside_after=rounds.set_aside_after_count,
            set_aside_rounds=rounds.set_aside_round_count,
        ),
        evaluation=EvaluationSpec(message.evaluation.interval),
    )
