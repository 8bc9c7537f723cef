"""Computes every aggregate of an experiment again from what the store holds, and compares digests.

Which results counted in a round is read from the records of the tasks: the accepted ones of its number, those kept from
earlier attempts included. The record of the round's end has to say the same. Each round begins from the stored tensors
of the round before, so a finding is about that round alone; only where those are damaged, from the computed ones.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from coordinator.combining import Inputs, combine, gather, initial_shared
from coordinator.experiments import Experiment, ExperimentState
from coordinator.inbox import PackedTensors
from coordinator.records import Checkpoint, RoundClosed, TaskRecord, TensorsRef
from coordinator.store import Store
from fedrt.aggregation import ServerState
from fedrt.errors import ConfigurationError, DamageError, SpecError, TensorError
from fedrt.payload import unpack
from fedrt.task import TaskKind, Verdict
from fedrt.tensors import Scope, Tensors, check_tensors, needs_clip, of_scope, schema_sha256

_PAGE = 1000


class Finding(enum.Enum):
    """What came of computing a round again."""

    AGREES = "agrees"
    DIFFERS = "DIFFERS"
    NOT_KEPT = "updates no longer kept"


@dataclass(frozen=True)
class Counted:
    """A result that counted; `sha256` (hex) is that of its update, which may no longer be kept."""

    silo_id: str
    example_count: int
    sha256: str | None


@dataclass(frozen=True)
class ReplayedRound:
    """One round, or as number 0 the initial tensors. `sha256` is the stored digest, `computed_sha256` the new one."""

    number: int
    counted: tuple[Counted, ...]
    sha256: str | None
    computed_sha256: str | None
    finding: Finding
    problems: tuple[str, ...] = ()


def find_experiment(store: Store, experiment_id: str) -> Experiment:
    """The experiment. Raises `ConfigurationError` if the store has none of that name, or its method is not here."""
    experiment = store.experiment(experiment_id)
    if experiment is None:
        names = sorted(known.experiment_id for known in store.experiments(10, 0))
        raise ConfigurationError(f"there is no experiment {experiment_id!r} in this store; the newest are {names}")
    try:
        specs = experiment.spec.local.tensors()
    except SpecError as error:
        raise ConfigurationError(
            f"experiment {experiment_id!r} cannot be computed again here: {error}; install its method as the "
            "coordinator has it"
        ) from error
    if schema_sha256(specs).hex() != experiment.schema_sha256:
        raise ConfigurationError(
            f"experiment {experiment_id!r} cannot be computed again here: the installed method "
            f"{experiment.spec.local.method_name!r} declares other tensors; install the version the coordinator has"
        )
    return experiment


def rounds_done(experiment: Experiment) -> int:
    """The last round that was aggregated; 0 if only the initial tensors are there, -1 if not even these."""
    stage = experiment.stage
    if stage.kind is TaskKind.INITIALIZE:
        return -1
    done = stage.kind is TaskKind.EVALUATE or experiment.state is ExperimentState.SUCCEEDED
    return stage.number if done else stage.number - 1


def replay(store: Store, experiment: Experiment) -> Iterator[ReplayedRound]:
    """Every round so far, one after the other; none for a method that shares nothing. Reads only.

    In memory are the tensors of one round, as in its aggregation. Raises `StorageError` if the disk refuses.
    """
    if not experiment.shares:
        return
    checkpoints = {point.round_number: point for point in store.checkpoints(experiment.experiment_id)}
    records = _round_records(store, experiment.experiment_id)
    state: ServerState | None = None
    for number in range(rounds_done(experiment) + 1):
        work = _Round(store, experiment, number, checkpoints.get(number))
        if number == 0 and not _silo_initializes(experiment):
            work.compare(initial_shared(experiment.spec), None)
        else:
            work.take(records.get(number))
            work.combine(state)
        state = work.state_after()
        yield work.outcome()


@dataclass(frozen=True)
class _Recorded:
    """What the record of a round's end says of a silo."""

    example_count: int
    byte_count: int


class _Round:
    """One round on its way to a finding."""

    def __init__(self, store: Store, experiment: Experiment, number: int, checkpoint: Checkpoint | None) -> None:
        self._store, self._experiment, self._number, self._checkpoint = store, experiment, number, checkpoint
        self._kind = TaskKind.TRAIN if number else TaskKind.INITIALIZE
        self._tasks: list[TaskRecord] = []
        self._problems: list[str] = []
        self._not_kept = False
        self._computed: tuple[PackedTensors, PackedTensors | None] | None = None

    def take(self, record: dict[str, _Recorded] | None) -> None:
        """Find the results that counted, and compare them with the record of the round's end."""
        place = (self._experiment.experiment_id, self._number)
        try:
            tasks = self._store.round_tasks(*place)
        except DamageError:
            self._problems.append("the record of a task is damaged")
            return
        counted = [task for task in tasks if task.kind is self._kind and task.verdict is Verdict.ACCEPTED]
        # An accepted failure says why.
        self._tasks = sorted((task for task in counted if not task.message), key=lambda task: task.silo_id)
        kept = self._store.kept_updates(*place)
        self._not_kept = any(task.task_id not in kept for task in self._tasks)
        if record is None:
            self._problems.append("there is no record of the round's end")
        else:
            self._problems += _differences(self._tasks, record)
        for task in self._tasks:
            if task.task_id in kept and not self._is_intact(task.tensors):
                self._problems.append(f"the update of silo {task.silo_id!r} is damaged or missing")
                self._not_kept = True

    def combine(self, before: ServerState | None) -> None:
        """Aggregate again from the state before, and compare."""
        if self._not_kept or not self._tasks:
            if not self._tasks and not self._problems:
                self._problems.append("no result is recorded")
            return
        if before is None and self._kind is TaskKind.TRAIN:
            self._problems.append("the tensors that the round began with are damaged or missing")
            return
        updates = gather(self._store.blob, self._tasks, None).updates
        specs = of_scope(self._experiment.spec.local.tensors(), Scope.SHARED)
        try:
            for update in updates:
                check_tensors(specs, update.delta)
            self.compare(*combine(self._experiment.spec, self._kind, Inputs(before or ServerState({}), updates)))
        except Exception as error:  # a method's server rule is a plugin, and this is its boundary here
            said = str(error) if isinstance(error, TensorError) else f"{type(error).__name__}: {error}"
            self._problems.append(f"aggregation fails: {said}")

    def compare(self, shared: PackedTensors | None, memory: PackedTensors | None) -> None:
        """Compare what was computed with what is stored."""
        if shared is None:
            return
        self._computed = (shared, memory)
        if self._checkpoint is None:
            return
        if shared.ref != self._checkpoint.shared:
            self._problems.append("the shared tensors are not those of the updates")
        if (memory and memory.ref) != self._checkpoint.memory:
            self._problems.append("the server rule's memory is not that of the updates")

    def state_after(self) -> ServerState | None:
        """What the next round begins from: what is stored if it is intact, else what was computed."""
        stored = self._checkpoint and self._stored(self._checkpoint)
        if stored:
            return stored
        self._problems.append("the stored tensors are damaged" if self._checkpoint else "no tensors are stored")
        if self._computed is None:
            return None
        shared, memory = self._computed
        return ServerState(_unpacked(shared), _unpacked(memory) if memory else {})

    def outcome(self) -> ReplayedRound:
        """The finding."""
        finding = Finding.NOT_KEPT if self._not_kept else Finding.AGREES
        return ReplayedRound(
            self._number,
            tuple(_counted(task) for task in self._tasks),
            self._checkpoint.shared.sha256 if self._checkpoint else None,
            self._computed[0].ref.sha256 if self._computed else None,
            Finding.DIFFERS if self._problems else finding,
            tuple(self._problems),
        )

    def _stored(self, checkpoint: Checkpoint) -> ServerState | None:
        parts: list[Tensors] = []
        for ref in (checkpoint.shared, checkpoint.memory):
            try:
                parts.append(unpack(ref.headers, self._store.blob(ref)) if ref else {})
            except DamageError:
                return None
        return ServerState(*parts)

    def _is_intact(self, ref: TensorsRef | None) -> bool:
        try:
            return ref is not None and self._store.blob(ref) is not None
        except DamageError:
            return False


def _round_records(store: Store, experiment_id: str) -> dict[int, dict[str, _Recorded]]:
    """By round, who contributed to it as the record of its end says."""
    found: dict[int, dict[str, _Recorded]] = {}
    after = 0
    while page := store.events(after, experiment_id, _PAGE):
        after = page[-1].number
        for event in (numbered.event for numbered in page):
            if isinstance(event, RoundClosed) and event.succeeded and event.kind is not TaskKind.EVALUATE:
                found[event.round_number] = {
                    part.silo_id: _Recorded(part.example_count, part.byte_count) for part in event.contributions
                }
    return found


def _differences(tasks: list[TaskRecord], record: dict[str, _Recorded]) -> Iterator[str]:
    results = {task.silo_id: task for task in tasks}
    if len(results) < len(tasks):
        yield "a silo has two accepted results"
    for silo_id in sorted(record.keys() - results.keys()):
        yield f"the round's record counts silo {silo_id!r}, of which no accepted result is stored"
    for silo_id in sorted(results.keys() - record.keys()):
        yield f"silo {silo_id!r} has an accepted result, which the round's record does not count"
    for silo_id in sorted(results.keys() & record.keys()):
        task, recorded = results[silo_id], record[silo_id]
        if task.example_count != recorded.example_count:
            yield (
                f"silo {silo_id!r} has {task.example_count} examples in its result and {recorded.example_count} in the "
                "round's record"
            )
        if task.tensors is not None and task.tensors.byte_count != recorded.byte_count:
            yield f"the update of silo {silo_id!r} has another size than in the round's record"


def _silo_initializes(experiment: Experiment) -> bool:
    return needs_clip(of_scope(experiment.spec.local.tensors(), Scope.SHARED))


def _counted(task: TaskRecord) -> Counted:
    return Counted(task.silo_id, task.example_count, task.tensors.sha256 if task.tensors else None)


def _unpacked(part: PackedTensors) -> Tensors:
    return unpack(part.ref.headers, part.data)
