"""Hypothesis strategies for tensors, payloads, tasks and every frame of a session."""

import json
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedrt.errors import FailureReason
from fedrt.payload import CHUNK_BYTES, Chunk, ElementType, Manifest, TensorHeader
from fedrt.session.frames import (
    Drain,
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
    Welcome,
)
from fedrt.spec import (
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
from fedrt.task import Failure, RefusalReason, Result, Success, Task, TaskKind, Verdict

UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
SEEDS = st.integers(0, 2**63 - 1)
COUNTS = st.integers(1, 1_000_000)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ids = st.text(st.sampled_from("abcé-/0189 "), min_size=1, max_size=12)
tensor_names = st.text(st.sampled_from("abc_0"), min_size=1, max_size=6)
digests = st.binary(min_size=32, max_size=32)
# Multiples of 1/512 s are whole nanoseconds and exact in binary, so that equality can be asked for.
durations = st.integers(0, 2**31).map(lambda ticks: ticks / 512)
times = st.integers(0, 2**42).map(lambda ticks: ticks / 512)

arrays = st.sampled_from([np.float32, np.float16, np.int64, ">f4", ">i8"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=7))
)
tensors = st.dictionaries(tensor_names, arrays, min_size=1, max_size=5)

headers = st.builds(
    TensorHeader,
    tensor_names,
    st.sampled_from(ElementType),
    st.lists(st.integers(1, 200), max_size=8).map(tuple),
).filter(lambda header: header.byte_count < 2**60)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    described = tuple(draw(st.lists(headers, min_size=1, max_size=4, unique_by=lambda header: header.name)))
    return Manifest(draw(ids), described, sum(header.byte_count for header in described), draw(digests))


models = st.builds(ModelSpec, texts, digests.map(bytes.hex), COUNTS, COUNTS)
optimizers = st.builds(
    OptimizerSpec,
    st.sampled_from(OptimizerName),
    st.floats(1e-9, 1e3),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 10),
)
trainings = st.builds(
    TrainingSpec,
    COUNTS,
    COUNTS,
    optimizers,
    st.sampled_from(Schedule),
    st.sampled_from(Precision),
    st.integers(0, 10_000),
)
class_names = st.lists(texts.filter(str.strip), min_size=1, max_size=5, unique=True).map(tuple)
hyperparameters = st.dictionaries(texts, st.none() | st.booleans() | st.integers() | texts, max_size=3).map(json.dumps)
splits = st.lists(st.sampled_from(EvaluationSplit), min_size=1, unique=True).map(tuple)


@st.composite
def classes_and_evaluations(draw: st.DrawFn) -> tuple[tuple[str, ...], LocalEvaluationSpec]:
    """Class names, and what to measure: novel classes are others, and there are some if their split is named."""
    known, named = draw(class_names), draw(splits)
    if EvaluationSplit.NOVEL not in named:
        return known, LocalEvaluationSpec(named)
    novel = st.lists(
        texts.filter(str.strip).filter(lambda name: name not in known), min_size=1, max_size=3, unique=True
    )
    return known, LocalEvaluationSpec(named, tuple(draw(novel)))


local_specs = st.builds(
    lambda method, hyperparameters, model, measured, training, count, seed: LocalSpec(
        method, hyperparameters, model, measured[0], training, count, measured[1], seed
    ),
    texts,
    hyperparameters,
    models,
    classes_and_evaluations(),
    trainings,
    UINT32,
    SEEDS,
)
rounds = st.builds(
    RoundsSpec,
    st.integers(0, 1_000_000),
    durations.filter(lambda seconds: 0 < seconds <= 30 * 86400),
    st.none() | st.just(1),
    st.none() | st.integers(1, 9),
    st.sampled_from([(), ("north",), ("north", "south")]),
    st.sampled_from(OnTooFew),
    st.integers(0, 9),
)
experiment_specs = st.builds(
    lambda local, rounds, every: ExperimentSpec(
        replace(local, round_count=rounds.count), rounds, EvaluationSpec(every)
    ),
    local_specs,
    rounds,
    st.integers(0, 99),
)
tasks = st.builds(
    Task, ids, ids, UINT32, st.sampled_from(TaskKind), local_specs, digests | st.just(b""), durations, UINT64
)
metrics = st.dictionaries(texts, st.floats(allow_nan=False), max_size=4)
successes = st.builds(Success, UINT64, metrics, durations)
failures = st.builds(Failure, st.sampled_from(FailureReason), texts)
results = st.builds(Result, ids, successes, st.none() | manifests()) | st.builds(Result, ids, failures, st.none())
chunks = st.builds(Chunk, ids, UINT64, st.binary(min_size=1, max_size=64) | st.just(b"x" * CHUNK_BYTES))

heartbeats = st.builds(Heartbeat, times)
payload_chunks = st.builds(PayloadChunk, chunks)
drains = st.builds(Drain, texts, durations, st.booleans())
hellos = st.builds(
    Hello,
    texts,
    st.lists(texts, max_size=3).map(tuple),
    st.lists(st.builds(HeldTask, ids, st.sampled_from(HeldState)), max_size=3).map(tuple),
    texts,
    UINT64,
    st.lists(texts, max_size=3).map(tuple),
)
welcomes = st.builds(
    lambda session, heartbeat, more, obsolete, version, capabilities: Welcome(
        session, heartbeat, heartbeat + more, obsolete, version, capabilities
    ),
    ids,
    durations.filter(bool),
    durations.filter(bool),
    st.lists(ids, max_size=3).map(tuple),
    texts,
    st.lists(texts, max_size=3).map(tuple),
)
offers = st.builds(
    lambda task, manifest: TaskOffer(task, None if task.kind is TaskKind.INITIALIZE else manifest),
    tasks,
    st.none() | manifests(),
)
replies = st.builds(TaskReply, ids) | st.builds(TaskReply, ids, st.sampled_from(RefusalReason), texts)
progress = st.builds(TaskProgress, ids, UINT64, UINT64)
task_results = st.builds(TaskResult, results)
cancels = st.builds(TaskCancel, ids, texts)
acks = st.builds(ResultAck, ids, st.sampled_from(Verdict), texts)

silo_frames = st.one_of(hellos, heartbeats, replies, progress, task_results, payload_chunks, drains)
coordinator_frames = st.one_of(welcomes, heartbeats, offers, cancels, payload_chunks, acks, drains)
