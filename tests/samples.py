"""Small valid values that tests start from and vary."""

import hashlib
from collections.abc import Callable

import numpy as np

from fedrt.payload import Manifest, describe
from fedrt.spec import (
    EvaluationSpec,
    ExperimentSpec,
    LocalEvaluationSpec,
    LocalSpec,
    ModelSpec,
    OnTooFew,
    RoundsSpec,
    TrainingSpec,
)
from fedrt.task import Task, TaskKind

DIGEST = "ab" * 32
MODEL = ModelSpec("fedrt-tiny", DIGEST, context_dim=8, feature_dim=4)
FROM_NOISE = '{"context_init":null,"context_length":2}'
FROM_WORDS = '{"context_init":"a photo","context_length":2}'


def local_spec(
    count: int = 1,
    hyperparameters: str = FROM_NOISE,
    method: str = "promptfl",
    classes: tuple[str, ...] = ("cat",),
    evaluation: LocalEvaluationSpec | None = None,
    seed: int = 1,
) -> LocalSpec:
    splits = evaluation or LocalEvaluationSpec()
    return LocalSpec(method, hyperparameters, MODEL, classes, TrainingSpec(), count, splits, seed)


def experiment_spec(
    count: int = 1, every: int = 1, hyperparameters: str = FROM_NOISE, seed: int = 1, **limits: object
) -> ExperimentSpec:
    defaults: dict[str, object] = {"time_limit": 100.0, "on_too_few": OnTooFew.FAIL}
    make: Callable[..., RoundsSpec] = RoundsSpec
    rounds = make(count, **{**defaults, **limits})
    return ExperimentSpec(local_spec(count, hyperparameters, seed=seed), rounds, EvaluationSpec(every))


def task(task_id: str = "t1", kind: TaskKind = TaskKind.TRAIN) -> Task:
    return Task(task_id, "e1", 1, kind, local_spec(), b"\0" * 32, time_limit=60.0, seed=7)


def payload(payload_id: str = "p1", elements: int = 4) -> tuple[Manifest, memoryview]:
    return describe(payload_id, {"context": np.arange(elements, dtype=np.float32)})


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
