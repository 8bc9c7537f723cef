"""Performs what the machines decided, once it is durable. Every action may be performed again without harm."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from coordinator import experiments, rounds
from coordinator.active import Active
from coordinator.combining import combine, gather
from coordinator.experiments import Experiment
from coordinator.inbox import AggregationFailed, Message, RoundAggregated
from coordinator.presence import Presence
from coordinator.records import Checkpoint, TaskRecord, TensorsRef
from coordinator.store import Store
from fedrt.complaint import Complaint
from fedrt.errors import DamageError, FedrtError, StorageError
from fedrt.metrics import CoordinatorMetrics
from fedrt.payload import Manifest
from fedrt.task import Task, TaskKind

_T = TypeVar("_T")
Action = Callable[[], None]
RETRY_READ_DELAY = 1.0  # seconds between attempts while the disk refuses


class StoreThread:
    """The one thread that touches the store."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "store")

    async def call(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Call a function of the store there."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def call_from_thread(self, function: Callable[..., _T], *arguments: object) -> _T:
        """The same from any thread but the event loop's, which waits. Raises `RuntimeError` once closed."""
        return self._executor.submit(function, *arguments).result()

    def close(self) -> None:
        """Wait for what runs and end the thread."""
        self._executor.shutdown()


class Actions:
    """Offers, settles, cancels and aggregates. Belongs to the orchestrator."""

    def __init__(
        self,
        store: Store,
        thread: StoreThread,
        metrics: CoordinatorMetrics,
        submit: Callable[[Message], None],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._thread = thread
        self._metrics = metrics
        self._submit = submit
        self._clock = clock
        self._log = structlog.get_logger("coordinator")
        self._aggregations: dict[str, asyncio.Task[None]] = {}

    def action(self, active: Active, effect: rounds.RoundEffect, presence: Presence) -> Action:
        """The action of an effect, to be called once the state that decided it is durable."""
        match effect:
            case rounds.Offer(silo_id, task_id):
                return lambda: self._offer(active, silo_id, task_id, presence)
            case rounds.Settle():
                return lambda: self.settle(effect, presence)
            case rounds.Cancel(silo_id, task_id, message):
                return lambda: _cancel(silo_id, task_id, message, presence)
            case rounds.Aggregate(task_ids):
                round_, tasks = active.experiment.round, [active.tasks[task_id] for task_id in task_ids]
                if round_ is None:
                    raise ValueError("an aggregation without a round")
                return lambda: self._aggregate(active, round_, tasks)

    def settle(self, settle: rounds.Settle, presence: Presence) -> None:
        """Answer a result, if its silo is connected; otherwise it asks again when it comes back."""
        self._metrics.results.labels(settle.verdict.value).inc()
        session = presence.session(settle.silo_id)
        if session is not None:
            session.settle(settle.task_id, settle.verdict, settle.message)

    def abandon(self, experiment_id: str) -> None:
        """Stop the aggregation of an experiment that has ended."""
        task = self._aggregations.pop(experiment_id, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Stop all aggregations; they begin again from the stored state."""
        for task in self._aggregations.values():
            task.cancel()
        await asyncio.gather(*self._aggregations.values(), return_exceptions=True)

    def _offer(self, active: Active, silo_id: str, task_id: str, presence: Presence) -> None:
        session, experiment = presence.session(silo_id), active.experiment
        round_ = experiment.round
        if session is None or presence.is_draining(silo_id) or round_ is None or round_.ask(task_id) is None:
            return
        task = Task(
            task_id=task_id,
            experiment_id=experiment.experiment_id,
            round_number=round_.number,
            kind=round_.kind,
            local=experiment.spec.local,
            schema_sha256=bytes.fromhex(experiment.schema_sha256),
            time_limit=max(1.0, round_.deadline - self._clock()),
            seed=experiments.task_seed(experiment, round_, silo_id),
        )
        manifest = None
        if active.checkpoint is not None and round_.kind is not TaskKind.INITIALIZE:
            shared = active.checkpoint.shared
            manifest = Manifest(task_id, shared.headers, shared.byte_count, bytes.fromhex(shared.sha256))
        self._metrics.tasks_offered.labels(round_.kind.value).inc()
        session.offer(task, manifest, active.tensors if manifest else None)

    def _aggregate(self, active: Active, round_: rounds.Round, tasks: list[TaskRecord]) -> None:
        work = self._combine(active.experiment, round_, tasks, active.checkpoint)
        self._aggregations[active.experiment.experiment_id] = asyncio.create_task(work)

    async def _combine(
        self, experiment: Experiment, round_: rounds.Round, tasks: list[TaskRecord], checkpoint: Checkpoint | None
    ) -> None:
        experiment_id = experiment.experiment_id
        try:
            shared, memory = await self._until_read(
                lambda: combine(experiment.spec, round_.kind, gather(self._read, tasks, checkpoint))
            )
        except FedrtError as error:
            self._submit(AggregationFailed(experiment_id, str(error)))
            return
        except Exception as error:  # a method's server rule is a plugin: its bug fails the experiment, nothing else
            self._log.exception("server rule failed", experiment=experiment_id)
            self._submit(AggregationFailed(experiment_id, f"{type(error).__name__}: {error}"))
            return
        self._submit(RoundAggregated(experiment_id, round_.number, round_.kind, round_.attempt, shared, memory))

    def _read(self, ref: TensorsRef) -> memoryview:
        return self._thread.call_from_thread(self._store.blob, ref)

    async def _until_read(self, work: Callable[[], _T]) -> _T:
        """The outcome of work that reads the store, as soon as the disk allows it. `DamageError` says: never."""
        refused = Complaint()
        while True:
            try:
                return await asyncio.to_thread(work)
            except DamageError:
                raise
            except StorageError as error:
                if refused.is_due(str(error)):
                    self._log.error("a round waits for the disk", reason=str(error))
                await asyncio.sleep(RETRY_READ_DELAY)


def _cancel(silo_id: str, task_id: str, message: str, presence: Presence) -> None:
    session = presence.session(silo_id)
    if session is not None:
        session.cancel(task_id, message)
