"""The single writer: one task owns every experiment and does, for each batch of messages, decide -> commit -> act.

* Messages are applied to the pure machines in the order in which they came; what they decide is collected.
* One transaction makes it durable. If the disk refuses, everything is as before the batch, which is tried again.
* Only then are the effects performed. After a crash, `recover` performs those of the stored state again.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from coordinator import experiments, rounds
from coordinator.combining import combine, gather
from coordinator.experiments import CloseRound, Experiment, ExperimentEvent, SilosChanged
from coordinator.inbox import (
    AggregationFailed,
    CancelOrdered,
    CreateOrdered,
    Message,
    OfferRefused,
    PackedTensors,
    ResultArrived,
    ResultInvalid,
    RoundAggregated,
    SessionClosed,
    SessionOpened,
    SiloDrained,
    TimePassed,
)
from coordinator.presence import Presence, Session
from coordinator.records import (
    Changes,
    Checkpoint,
    Contribution,
    ExperimentChanged,
    RoundClosed,
    SiloChanged,
    SiloRecord,
    TaskRecord,
    mean_metrics,
)
from coordinator.store import Store
from fedrt.errors import FedrtError, SpecError, StorageError
from fedrt.metrics import CoordinatorMetrics
from fedrt.payload import Manifest
from fedrt.session.frames import HeldState, HeldTask, Hello
from fedrt.task import Failure, Success, Task, TaskKind, Verdict
from fedrt.tensors import TensorSpec, schema_sha256

RETRY_COMMIT_DELAY = 1.0  # seconds between attempts while the disk refuses
_T = TypeVar("_T")


@dataclass(frozen=True)
class Expectation:
    """What the coordinator asked a silo for: enough to judge an announcement before its bytes arrive."""

    kind: TaskKind
    specs: tuple[TensorSpec, ...]


@dataclass
class _Active:
    """An experiment that has not ended, with what is needed to act on it."""

    experiment: Experiment
    specs: tuple[TensorSpec, ...]
    checkpoint: Checkpoint | None
    tensors: memoryview | None  # the packed shared tensors of the checkpoint
    tasks: dict[str, TaskRecord]  # of the current round


class Orchestrator:
    """Owns all experiment state. Everything but `run` may be called from the event loop and returns at once."""

    def __init__(self, store: Store, metrics: CoordinatorMetrics, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._store_thread = ThreadPoolExecutor(1, "store")
        self._metrics = metrics
        self._clock = clock
        self._log = structlog.get_logger("coordinator")
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._active: dict[str, _Active] = {}
        self._by_task: dict[str, str] = {}
        self._aggregations: dict[str, asyncio.Task[None]] = {}
        self._changes = Changes()
        self._effects: list[Callable[[], None]] = []
        self.presence = Presence()
        self.bell = asyncio.Event()  # rung, and replaced, when events have been stored

    # ---- what services ask and tell

    def submit(self, message: Message) -> None:
        """Queue a message."""
        self._inbox.put_nowait(message)

    def expectation(self, silo_id: str, task_id: str) -> Expectation | None:
        """What is expected of a task of the current round of an active experiment; None for any other."""
        active = self._active.get(self._by_task.get(task_id, ""))
        if active is None or active.tasks[task_id].silo_id != silo_id or active.tasks[task_id].verdict is not None:
            return None
        return Expectation(active.tasks[task_id].kind, active.specs)

    def obsolete(self, silo_id: str, held: tuple[HeldTask, ...]) -> tuple[str, ...]:
        """Running tasks the silo may drop. A finished one is never obsolete: its result gets a verdict."""
        running = [task.task_id for task in held if task.state is HeldState.RUNNING]
        return tuple(task_id for task_id in running if self.expectation(silo_id, task_id) is None)

    def experiment(self, experiment_id: str) -> Experiment | None:
        """An experiment that has not ended."""
        active = self._active.get(experiment_id)
        return active.experiment if active else None

    def open_tasks(self, silo_id: str) -> list[str]:
        """The tasks of a silo that await a result."""
        return sorted(
            task.task_id
            for active in self._active.values()
            for task in active.tasks.values()
            if task.silo_id == silo_id and task.verdict is None
        )

    async def in_store(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Call a function of the store on the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._store_thread, function, *arguments)

    # ---- the loop

    async def recover(self) -> None:
        """Load what has not ended and perform its effects again."""
        for record in await self.in_store(self._store.silos):
            self.presence.silos[record.silo_id] = replace(record, connected=False, draining=False)
        for experiment in await self.in_store(self._store.active_experiments):
            try:
                specs = experiment.spec.local.tensors()
            except SpecError as error:
                self._log.error("experiment cannot be resumed", experiment=experiment.experiment_id, reason=str(error))
                continue
            active = _Active(experiment, specs, None, None, {})
            await self._load_checkpoint(active)
            if experiment.round is not None:
                known = await self.in_store(self._store.round_tasks, experiment.experiment_id, experiment.round.number)
                asked = {ask.task_id for ask in experiment.round.asks}
                active.tasks = {task.task_id: task for task in known if task.task_id in asked}
                for effect in rounds.resume(experiment.round):
                    self._perform_later(active, effect)
            self._adopt(active)
            self._log.info("experiment resumed", experiment=experiment.experiment_id, state=experiment.state.value)
        self._perform()

    async def run(self) -> None:
        """Serve the inbox until cancelled."""
        while True:
            batch = [await self._next_message()]
            while not self._inbox.empty():
                batch.append(self._inbox.get_nowait())
            await self._process(batch)
            del batch  # a batch holds tensors

    async def close(self) -> None:
        """Stop aggregations and release the store's thread."""
        for task in self._aggregations.values():
            task.cancel()
        await asyncio.gather(*self._aggregations.values(), return_exceptions=True)
        self._store_thread.shutdown()

    async def _next_message(self) -> Message:
        ticks = [rounds.next_tick(a.experiment.round) for a in self._active.values() if a.experiment.round is not None]
        due = min((tick for tick in ticks if tick is not None), default=None)
        timeout = None if due is None else max(0.0, due - self._clock())
        try:
            async with asyncio.timeout(timeout):
                return await self._inbox.get()
        except TimeoutError:
            return TimePassed()

    async def _process(self, batch: list[Message]) -> None:
        while True:
            before = {key: replace(active, tasks=dict(active.tasks)) for key, active in self._active.items()}
            presence = self.presence.copy()
            self._changes, self._effects = Changes(), []
            for message in batch:
                await self._apply(message)
            try:
                if self._changes:
                    with self._metrics.store_commit_duration.time():
                        await self.in_store(self._store.commit, self._changes)
                break
            except StorageError as error:
                self._log.error("nothing is acknowledged until the disk accepts writes", reason=str(error))
                self._active, self.presence = before, presence
                self._by_task = {task_id: key for key, active in before.items() for task_id in active.tasks}
                await asyncio.sleep(RETRY_COMMIT_DELAY)
        self._forget_ended()
        self._perform()
        changes, self._changes = self._changes, Changes()  # what is durable need not stay in memory
        if changes.events:
            self.bell.set()
            self.bell = asyncio.Event()

    def _perform(self) -> None:
        effects, self._effects = self._effects, []
        for effect in effects:
            effect()

    # ---- messages

    async def _apply(self, message: Message) -> None:
        now = self._clock()
        match message:
            case SessionOpened(session, hello):
                self._session_opened(session, hello, now)
            case SessionClosed(session):
                self._silo_changed(self.presence.disconnect(session, now))
            case SiloDrained(session):
                self._silo_changed(self.presence.drain(session, now))
            case ResultArrived():
                await self._result_arrived(message)
            case ResultInvalid(silo_id, task_id, text):
                await self._result_invalid(silo_id, task_id, text)
            case OfferRefused(silo_id, task_id, reason, text):
                self._metrics.tasks_refused.labels(reason.value).inc()
                if self.expectation(silo_id, task_id) is not None:
                    self._advance(self._by_task[task_id], rounds.Refused(task_id, reason, text))
            case RoundAggregated():
                self._round_aggregated(message)
            case AggregationFailed(experiment_id, text):
                self._log.error("aggregation failed", experiment=experiment_id, reason=text)
                self._advance(experiment_id, rounds.Withdrawn(f"aggregation failed: {text}"))
            case CreateOrdered():
                await self._create(message, now)
            case CancelOrdered(experiment_id, done):
                await self._cancel(experiment_id, done)
            case TimePassed():
                for experiment_id in list(self._active):
                    self._advance(experiment_id, rounds.Tick())

    def _session_opened(self, session: Session, hello: Hello, now: float) -> None:
        record, older = self.presence.connect(session, hello, now)
        if older is not None:
            self._effects.append(older.replace)
        held = frozenset(task.task_id for task in hello.held_tasks)
        for active in self._active.values():
            for effect in experiments.offers_on_connect(active.experiment, session.silo_id, held):
                self._perform_later(active, effect)
        self._silo_changed(record)

    def _silo_changed(self, record: SiloRecord | None) -> None:
        if record is None:
            return
        self._changes.silos[record.silo_id] = record
        self._changes.events.append(SiloChanged(record))
        self._log.info("silo", silo=record.silo_id, connected=record.connected, draining=record.draining)
        for experiment_id in list(self._active):
            self._advance(experiment_id, SilosChanged())

    async def _result_arrived(self, message: ResultArrived) -> None:
        task_id = message.result.task_id
        if self.expectation(message.silo_id, task_id) is None:
            await self._settle_other(message.silo_id, task_id)
            return
        active = self._active[self._by_task[task_id]]
        task = active.tasks[task_id]
        match message.result.outcome:
            case Success(example_count, metrics, work_duration):
                event: ExperimentEvent = rounds.ResultStored(task_id)
                task = replace(
                    task,
                    verdict=Verdict.ACCEPTED,
                    example_count=example_count,
                    metrics=metrics,
                    work_duration=work_duration,
                    tensors=message.tensors.ref if message.tensors else None,
                )
                if message.tensors:
                    self._changes.blobs[message.tensors.ref.sha256] = message.tensors.data
            case Failure(reason, text):
                failed = f"failed ({reason.value}): {text}"
                event = rounds.ResultFailed(task_id, failed)
                task = replace(task, verdict=Verdict.ACCEPTED, message=failed)
                self._log.warning("task failed", task=task_id, reason=reason.value, message=text)
        self._keep(active, task)
        self._advance(task.experiment_id, event)

    async def _result_invalid(self, silo_id: str, task_id: str, text: str) -> None:
        self._log.warning("invalid result", silo=silo_id, task=task_id, reason=text)
        if self.expectation(silo_id, task_id) is None:
            await self._settle_other(silo_id, task_id)
            return
        active = self._active[self._by_task[task_id]]
        self._keep(active, replace(active.tasks[task_id], verdict=Verdict.INVALID, message=text))
        self._advance(self._by_task[task_id], rounds.ResultFailed(task_id, text, Verdict.INVALID))

    async def _settle_other(self, silo_id: str, task_id: str) -> None:
        """Settle a result that no open ask waits for: from what was decided about its task before."""
        task = self._changes.tasks.get(task_id) or await self.in_store(self._store.task, task_id)
        if task is None or task.silo_id != silo_id:
            settle = rounds.Settle(silo_id, task_id, Verdict.UNKNOWN_TASK, "no such task was offered to this silo")
        elif task.verdict is Verdict.ACCEPTED:
            settle = rounds.Settle(silo_id, task_id, Verdict.DUPLICATE)
        elif task.verdict is Verdict.INVALID:
            settle = rounds.Settle(silo_id, task_id, Verdict.INVALID, task.message)
        else:
            settle = rounds.Settle(silo_id, task_id, Verdict.LATE, task.message or "the round is closed")
        self._effects.append(lambda: self._settle(settle))

    def _round_aggregated(self, message: RoundAggregated) -> None:
        active = self._active.get(message.experiment_id)
        round_ = active.experiment.round if active else None
        if active is None or round_ is None:
            return
        if (round_.number, round_.kind, round_.attempt) != (message.round_number, message.kind, message.attempt):
            return
        self._set_checkpoint(active, message.round_number, message.shared, message.memory)
        self._advance(message.experiment_id, rounds.Aggregated())

    async def _create(self, message: CreateOrdered, now: float) -> None:
        existing = self.experiment(message.experiment_id)
        if existing is None:
            existing = await self.in_store(self._store.experiment, message.experiment_id)
        if existing is not None:
            self._answer(message.done, existing)
            return
        spec = message.spec
        specs = spec.local.tensors()
        experiment = experiments.create(message.experiment_id, spec, schema_sha256(specs).hex(), now)
        active = _Active(experiment, specs, None, None, {})
        self._adopt(active)
        if message.initial is not None:
            self._set_checkpoint(active, 0, message.initial, None)
        self._note(active)
        self._advance(message.experiment_id, SilosChanged())
        self._answer(message.done, active.experiment)
        self._log.info("experiment created", experiment=message.experiment_id, method=spec.local.method_name)

    async def _cancel(self, experiment_id: str, done: asyncio.Future[Experiment]) -> None:
        active = self._active.get(experiment_id)
        if active is not None:
            self._advance(experiment_id, experiments.CancelOrdered())
            self._answer(done, active.experiment)
            return
        ended = await self.in_store(self._store.experiment, experiment_id)
        self._effects.append(lambda: _resolve(done, ended, experiment_id))

    def _answer(self, done: asyncio.Future[Experiment], experiment: Experiment) -> None:
        self._effects.append(lambda: _resolve(done, experiment, experiment.experiment_id))

    # ---- the machines

    def _advance(self, experiment_id: str, event: ExperimentEvent) -> None:
        active = self._active.get(experiment_id)
        if active is None or active.experiment.state.has_ended:
            return
        old = active.experiment
        active.experiment, effects = experiments.step(old, event, self.presence.population, self._clock())
        for effect in effects:
            if isinstance(effect, CloseRound):
                self._record_round(active, effect.round)
        if active.experiment != old:
            self._note(active, old)
        for effect in effects:
            if not isinstance(effect, CloseRound):
                self._perform_later(active, effect)

    def _note(self, active: _Active, old: Experiment | None = None) -> None:
        experiment = active.experiment
        self._changes.experiments[experiment.experiment_id] = experiment
        round_ = experiment.round
        if round_ is not None and (
            old is None or old.round is None or old.round.asks[0].task_id != round_.asks[0].task_id
        ):
            self._begin_tasks(active, round_)
        seen = (old.state, old.message, old.stage) if old else None
        if seen != (experiment.state, experiment.message, experiment.stage):
            stage = experiment.stage
            change = ExperimentChanged(
                experiment.experiment_id,
                experiment.state.value,
                stage.number,
                stage.kind,
                experiment.message,
                experiment.end_time,
            )
            self._changes.events.append(change)
            if old is None or old.state is not experiment.state:
                log = self._log.warning if experiment.state is experiments.ExperimentState.FAILED else self._log.info
                log("experiment", experiment=experiment.experiment_id, state=change.state, message=change.message)

    def _begin_tasks(self, active: _Active, round_: rounds.Round) -> None:
        for task_id in active.tasks:
            self._by_task.pop(task_id, None)
        experiment_id = active.experiment.experiment_id
        active.tasks = {}
        for ask in round_.asks:
            task = TaskRecord(ask.task_id, experiment_id, ask.silo_id, round_.number, round_.kind, round_.attempt)
            self._keep(active, task)
            self._by_task[ask.task_id] = experiment_id

    def _record_round(self, active: _Active, round_: rounds.Round) -> None:
        for ask in round_.asks:
            task = active.tasks[ask.task_id]
            if task.verdict is None:
                self._keep(active, replace(task, verdict=Verdict.LATE, message=ask.message))
        counted = [active.tasks[ask.task_id] for ask in round_.asks if ask.state is rounds.AskState.RETURNED]
        contributions = tuple(
            Contribution(
                task.silo_id,
                task.example_count,
                task.metrics,
                task.work_duration,
                task.tensors.byte_count if task.tensors else 0,
            )
            for task in sorted(counted, key=lambda task: task.silo_id)
        )
        closed = RoundClosed(
            experiment_id=active.experiment.experiment_id,
            round_number=round_.number,
            kind=round_.kind,
            attempt=round_.attempt,
            contributions=contributions,
            absences=rounds.absentees(round_),
            metrics=mean_metrics(contributions),
            succeeded=round_.succeeded,
            duration=self._clock() - round_.begin_time,
        )
        self._changes.events.append(closed)
        self._metrics.rounds.labels("completed" if closed.succeeded else "failed").inc()
        self._metrics.round_duration.observe(closed.duration)

    def _keep(self, active: _Active, task: TaskRecord) -> None:
        active.tasks[task.task_id] = task
        self._changes.tasks[task.task_id] = task

    def _adopt(self, active: _Active) -> None:
        self._active[active.experiment.experiment_id] = active
        for task_id in active.tasks:
            self._by_task[task_id] = active.experiment.experiment_id

    def _forget_ended(self) -> None:
        for experiment_id in [key for key, active in self._active.items() if active.experiment.state.has_ended]:
            for task_id in self._active.pop(experiment_id).tasks:
                self._by_task.pop(task_id, None)
            aggregation = self._aggregations.pop(experiment_id, None)
            if aggregation is not None:
                aggregation.cancel()

    # ---- tensors

    async def _load_checkpoint(self, active: _Active) -> None:
        checkpoint = await self.in_store(self._store.checkpoint, active.experiment.experiment_id)
        if checkpoint is not None:
            active.checkpoint = checkpoint
            active.tensors = await self.in_store(self._store.blob, checkpoint.shared)

    def _set_checkpoint(
        self, active: _Active, round_number: int, shared: PackedTensors, memory: PackedTensors | None
    ) -> None:
        reference = memory.ref if memory else None
        active.checkpoint = Checkpoint(active.experiment.experiment_id, round_number, shared.ref, reference)
        active.tensors = shared.data
        self._changes.checkpoints.append(active.checkpoint)
        for part in (shared, memory):
            if part is not None:
                self._changes.blobs[part.ref.sha256] = part.data

    # ---- effects

    def _perform_later(self, active: _Active, effect: rounds.RoundEffect) -> None:
        match effect:
            case rounds.Offer(silo_id, task_id):
                self._effects.append(lambda: self._offer(active, silo_id, task_id))
            case rounds.Settle():
                self._effects.append(lambda: self._settle(effect))
            case rounds.Cancel(silo_id, task_id, message):
                self._effects.append(lambda: self._withdraw(silo_id, task_id, message))
            case rounds.Aggregate(task_ids):
                round_ = active.experiment.round
                if round_ is not None:
                    self._effects.append(lambda: self._aggregate(active, round_, task_ids))

    def _offer(self, active: _Active, silo_id: str, task_id: str) -> None:
        session, experiment = self.presence.session(silo_id), active.experiment
        round_ = experiment.round
        if session is None or self.presence.is_draining(silo_id) or round_ is None or round_.ask(task_id) is None:
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

    def _settle(self, settle: rounds.Settle) -> None:
        self._metrics.results.labels(settle.verdict.value).inc()
        session = self.presence.session(settle.silo_id)
        if session is not None:
            session.settle(settle.task_id, settle.verdict, settle.message)

    def _withdraw(self, silo_id: str, task_id: str, message: str) -> None:
        session = self.presence.session(silo_id)
        if session is not None:
            session.cancel(task_id, message)

    def _aggregate(self, active: _Active, round_: rounds.Round, task_ids: tuple[str, ...]) -> None:
        experiment_id = active.experiment.experiment_id
        tasks = [active.tasks[task_id] for task_id in task_ids]
        self._aggregations[experiment_id] = asyncio.create_task(
            self._combine(active.experiment, round_, tasks, active.checkpoint)
        )

    async def _combine(
        self, experiment: Experiment, round_: rounds.Round, tasks: list[TaskRecord], checkpoint: Checkpoint | None
    ) -> None:
        experiment_id = experiment.experiment_id
        try:
            inputs = await self.in_store(gather, self._store, tasks, checkpoint)
            shared, memory = await asyncio.to_thread(combine, experiment.spec, round_.kind, inputs)
        except (FedrtError, ValueError, ArithmeticError) as error:
            self.submit(AggregationFailed(experiment_id, str(error)))
            return
        self.submit(RoundAggregated(experiment_id, round_.number, round_.kind, round_.attempt, shared, memory))


def _resolve(done: asyncio.Future[Experiment], experiment: Experiment | None, experiment_id: str) -> None:
    if done.done():
        return
    if experiment is None:
        done.set_exception(
            SpecError(f"experiment {experiment_id!r} does not exist; `fedrtctl list` shows those that do")
        )
    else:
        done.set_result(experiment)
