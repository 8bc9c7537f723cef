"""The single writer: one task owns every experiment and does, for each batch of messages, decide -> commit -> act.

* Messages are applied to the pure machines in the order in which they came; what they decide is collected.
* One transaction makes it durable. If the disk refuses, everything is as before the batch, which is tried again.
* Only then are the actions performed. After a crash, `recover` performs those of the stored state again.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import structlog

from coordinator import experiments, rounds
from coordinator.actions import Action, Actions, StoreThread
from coordinator.active import Active, ActiveExperiments, changed, closed
from coordinator.clock import SteadyClock
from coordinator.conduct import SetAside
from coordinator.experiments import CloseRound, Experiment, ExperimentEvent, ExperimentState, SilosChanged
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
    RoundClosed,
    SiloChanged,
    SiloRecord,
    SiloSetAside,
    TaskRecord,
)
from coordinator.results import recorded, settlement
from coordinator.store import Store
from fedrt.complaint import Complaint
from fedrt.errors import ConfigurationError, DamageError, FedrtError, SpecError, StorageError
from fedrt.metrics import CoordinatorMetrics
from fedrt.session.frames import HeldState, Hello
from fedrt.task import Verdict
from fedrt.tensors import schema_sha256

RETRY_COMMIT_DELAY = 1.0  # seconds between attempts while the disk refuses
_T = TypeVar("_T")


class Orchestrator:
    """Owns all experiment state. Everything but `run` may be called from the event loop and returns at once."""

    def __init__(self, store: Store, metrics: CoordinatorMetrics, clock: Callable[[], float] | None = None) -> None:
        clock = clock or SteadyClock()
        self._store = store
        self._thread = StoreThread()
        self._metrics = metrics
        self._clock = clock
        self._log = structlog.get_logger("coordinator")
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._actions = Actions(store, self._thread, metrics, self.submit, clock)
        self._changes = Changes()
        self._due: list[Action] = []
        self._refused = Complaint()
        self._ticked = 0.0  # when time was last told to all experiments
        self.active = ActiveExperiments()
        self.presence = Presence()
        self.bell = asyncio.Event()  # rung, and replaced, when events have been stored

    def submit(self, message: Message) -> None:
        """Queue a message."""
        self._inbox.put_nowait(message)

    @property
    def backlog(self) -> int:
        """Messages that wait; many while the disk refuses."""
        return self._inbox.qsize()

    async def in_store(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Call a function of the store on the store's thread."""
        return await self._thread.call(function, *arguments)

    async def recover(self) -> None:
        """Load what has not ended and perform its actions again."""
        for record in await self.in_store(self._store.silos):
            self.presence.silos[record.silo_id] = replace(record, connected=False, draining=False)
        for stored in await self.in_store(self._store.active_experiments):
            experiment = experiments.resume(stored, self._clock())
            try:
                active = Active(experiment, experiment.spec.local.tensors())
            except SpecError as error:
                raise ConfigurationError(
                    f"experiment {experiment.experiment_id!r} cannot go on: {error}; install its method as before"
                ) from error
            await self._load(active)
            self.active.adopt(active)
            if experiment.round is not None:
                self._collect(active, rounds.resume(experiment.round))
            self._log.info("experiment resumed", experiment=experiment.experiment_id, state=experiment.state.value)
        self._count_experiments()
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
        await self._actions.close()
        self._thread.close()

    async def _load(self, active: Active) -> None:
        experiment = active.experiment
        checkpoint = await self.in_store(self._store.checkpoint, experiment.experiment_id)
        if checkpoint is not None:
            active.checkpoint = checkpoint
            active.tensors = await self.in_store(self._store.blob, checkpoint.shared)
        asks = experiment.stage.kept if experiment.round is None else experiment.round.asks  # a retry may still wait
        if asks:
            held = {ask.task_id for ask in asks}
            known = await self.in_store(self._store.round_tasks, experiment.experiment_id, experiment.stage.number)
            active.tasks = {task.task_id: task for task in known if task.task_id in held}

    async def _next_message(self) -> Message:
        ticks = [experiments.next_tick(active.experiment) for active in self.active.by_name.values()]
        due = min((tick for tick in ticks if tick is not None and tick > self._ticked), default=None)
        timeout = None if due is None else due - self._clock()
        if timeout is not None and timeout <= 0:
            return TimePassed()  # before what waits: messages may come without a pause
        try:
            async with asyncio.timeout(timeout):
                return await self._inbox.get()
        except TimeoutError:
            return TimePassed()

    async def _process(self, batch: list[Message]) -> None:
        while True:
            before = (self.active.copy(), self.presence.copy())
            self._changes, self._due = Changes(), []
            try:
                for message in batch:
                    await self._apply(message)
                if self._changes:
                    with self._metrics.store_commit_duration.time():
                        await self.in_store(self._store.commit, self._changes)
                break
            except DamageError:
                raise
            except StorageError as error:
                if self._refused.is_due(str(error)):
                    self._log.error("nothing is acknowledged until the disk accepts writes", reason=str(error))
                self.active, self.presence = before
                await asyncio.sleep(RETRY_COMMIT_DELAY)
        if self._changes and self._refused.end():
            self._log.info("the disk accepts writes again")
        for experiment_id in self.active.drop_ended():
            self._actions.abandon(experiment_id)
        self._count_experiments()
        self._perform()
        changes, self._changes = self._changes, Changes()  # what is durable need not stay in memory
        if changes.events:
            self.bell.set()
            self.bell = asyncio.Event()

    def _count_experiments(self) -> None:
        states = Counter(active.experiment.state for active in self.active.by_name.values())
        for state in (ExperimentState.PENDING, ExperimentState.RUNNING):
            self._metrics.experiments.labels(state.value).set(states[state])

    def _say(self, log: Callable[..., None], event: str, **fields: object) -> None:
        """Log it once it is durable: the batch may be undone and tried again many times."""
        self._due.append(lambda: log(event, **fields))

    def _perform(self) -> None:
        due, self._due = self._due, []
        for action in due:
            action()

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
                self._due.append(self._metrics.tasks_refused.labels(reason.value).inc)
                active = self.active.waiting_for(silo_id, task_id)
                if active is not None:
                    self._advance(active, rounds.Refused(task_id, reason, text))
            case RoundAggregated():
                self._round_aggregated(message)
            case AggregationFailed(experiment_id, text):
                self._say(self._log.error, "aggregation failed", experiment=experiment_id, reason=text)
                if experiment_id in self.active.by_name:
                    self._advance(self.active.by_name[experiment_id], rounds.Withdrawn(f"aggregation failed: {text}"))
            case CreateOrdered():
                await self._create(message, now)
            case CancelOrdered(experiment_id, done):
                await self._cancel(experiment_id, done)
            case TimePassed():
                self._ticked = now
                self._advance_all(rounds.Tick())

    def _session_opened(self, session: Session, hello: Hello, now: float) -> None:
        record, older = self.presence.connect(session, hello, now)
        if older is not None:
            self._due.append(older.replace)
        held = frozenset(task.task_id for task in hello.held_tasks)
        for task in hello.held_tasks:
            if task.state is HeldState.RUNNING and self.active.waiting_for(session.silo_id, task.task_id) is None:
                # A round waited for it when the silo was welcomed; whoever closed that could not tell this session.
                self._due.append(partial(session.cancel, task.task_id, "the round is closed"))
        for active in self.active.by_name.values():
            self._collect(active, experiments.offers_on_connect(active.experiment, session.silo_id, held))
        self._silo_changed(record)

    def _silo_changed(self, record: SiloRecord | None) -> None:
        if record is None:
            return
        self._changes.silos[record.silo_id] = record
        self._changes.events.append(SiloChanged(replace(record, methods=())))  # these are in the silo's own record
        self._say(self._log.info, "silo", silo=record.silo_id, connected=record.connected, draining=record.draining)
        self._advance_all(SilosChanged())

    async def _result_arrived(self, message: ResultArrived) -> None:
        task_id = message.result.task_id
        active = self.active.waiting_for(message.silo_id, task_id)
        if active is None:
            self._due.append(message.discard)
            await self._settle_other(message.silo_id, task_id)
            return
        tensors = message.tensors
        task, event = recorded(active.tasks[task_id], message.result.outcome, tensors.ref if tensors else None)
        if isinstance(event, rounds.ResultFailed):
            self._say(self._log.warning, "task failed", task=task_id, message=event.message)
        elif tensors and tensors.ref.sha256 in self._changes.blobs:
            self._due.append(message.discard)  # another silo sent the same bytes
        elif tensors:
            self._changes.blobs[tensors.ref.sha256] = tensors.blob
        self._keep(active, task)
        self._advance(active, event)

    async def _result_invalid(self, silo_id: str, task_id: str, text: str) -> None:
        self._say(self._log.warning, "invalid result", silo=silo_id, task=task_id, reason=text)
        active = self.active.waiting_for(silo_id, task_id)
        if active is None:
            await self._settle_other(silo_id, task_id)
            return
        self._keep(active, replace(active.tasks[task_id], verdict=Verdict.INVALID, message=text))
        self._advance(active, rounds.ResultFailed(task_id, text, Verdict.INVALID))

    async def _settle_other(self, silo_id: str, task_id: str) -> None:
        try:
            task = self._changes.tasks.get(task_id) or await self.in_store(self._store.task, task_id)
        except DamageError as error:  # of an experiment that has ended: no reason to end, nor to let the silo forget
            self._say(self._log.error, "a result stays unanswered", silo=silo_id, task=task_id, reason=str(error))
            return
        settle = settlement(task, silo_id, task_id)
        self._due.append(lambda: self._actions.settle(settle, self.presence))

    def _round_aggregated(self, message: RoundAggregated) -> None:
        active = self.active.by_name.get(message.experiment_id)
        round_ = active.experiment.round if active else None
        if active is None or round_ is None:
            return
        if (round_.number, round_.kind, round_.attempt) == (message.round_number, message.kind, message.attempt):
            self._set_checkpoint(active, message.round_number, message.shared, message.memory)
            self._advance(active, rounds.Aggregated())

    async def _create(self, message: CreateOrdered, now: float) -> None:
        name, done = message.experiment_id, message.done
        try:
            existing = await self.find(name)
        except DamageError as error:
            self._due.append(partial(_reject, done, error))
            return
        if existing is not None:
            self._due.append(lambda: _resolve(done, existing, name))
            return
        specs = message.spec.local.tensors()
        active = Active(experiments.create(name, message.spec, schema_sha256(specs).hex(), now), specs)
        self.active.adopt(active)
        if message.initial is not None:
            self._set_checkpoint(active, 0, message.initial, None)
        self._note(active, None)
        self._advance(active, SilosChanged())
        self._due.append(lambda: _resolve(done, active.experiment, name))

    async def _cancel(self, experiment_id: str, done: asyncio.Future[Experiment]) -> None:
        active = self.active.by_name.get(experiment_id)
        if active is not None:
            self._advance(active, experiments.CancelOrdered())
        try:
            found = await self.find(experiment_id)
        except DamageError as error:  # of one that has ended: no reason to end the others
            self._due.append(partial(_reject, done, error))
            return
        self._due.append(lambda: _resolve(done, found, experiment_id))

    async def find(self, experiment_id: str) -> Experiment | None:
        """An experiment, ended or not; None if there is none of that name."""
        active = self.active.by_name.get(experiment_id)
        return active.experiment if active else await self.in_store(self._store.experiment, experiment_id)

    # ---- the machines

    def _advance_all(self, event: ExperimentEvent) -> None:
        for active in list(self.active.by_name.values()):
            self._advance(active, event)

    def _advance(self, active: Active, event: ExperimentEvent) -> None:
        old = active.experiment
        active.experiment, effects = experiments.step(old, event, self.presence.population, self._clock())
        for effect in effects:
            match effect:
                case CloseRound(round_):
                    self._record_round(active, round_)
                case SetAside():
                    self._record_aside(active, effect)
        if active.experiment != old:
            self._note(active, old)
        self._collect(active, tuple(effect for effect in effects if not isinstance(effect, CloseRound | SetAside)))

    def _collect(self, active: Active, effects: rounds.Effects) -> None:
        self._due.extend(self._actions.action(active, effect, self.presence) for effect in effects)

    def _note(self, active: Active, old: Experiment | None) -> None:
        new = active.experiment
        self._changes.experiments[new.experiment_id] = new
        if new.round is not None and (old is None or old.round is None or not new.round.same_as(old.round)):
            self._begin_tasks(active, new.round)
        if old is None or (old.state, old.message, old.stage) != (new.state, new.message, new.stage):
            self._changes.events.append(changed(new))
        if old is None or old.state is not new.state:
            log = self._log.warning if new.state is ExperimentState.FAILED else self._log.info
            self._say(log, "experiment", experiment=new.experiment_id, state=new.state.value, message=new.message)

    def _begin_tasks(self, active: Active, round_: rounds.Round) -> None:
        name = active.experiment.experiment_id
        tasks = []
        for ask in round_.asks:
            task = active.tasks.get(ask.task_id)  # a result kept from the attempt before, or what that gave up
            if task is None or ask.state is rounds.AskState.OFFERED:
                attempt = task.attempt if task else round_.attempt
                task = TaskRecord(ask.task_id, name, ask.silo_id, round_.number, round_.kind, attempt)
            tasks.append(task)
        self.active.begin_tasks(active, tasks)
        for task in tasks:
            self._changes.tasks[task.task_id] = task

    def _record_round(self, active: Active, round_: rounds.Round) -> None:
        for ask in round_.asks:
            task = active.tasks[ask.task_id]
            if task.verdict is None:
                self._keep(active, replace(task, verdict=Verdict.LATE, message=ask.message))
        event = closed(active, round_, self._clock())
        self._changes.events.append(event)
        self._due.append(lambda: self._count_round(event))

    def _record_aside(self, active: Active, aside: SetAside) -> None:
        name = active.experiment.experiment_id
        self._changes.events.append(SiloSetAside(name, aside.silo_id, aside.until_round, aside.message))
        until, reason = aside.until_round, aside.message
        said = {"silo": aside.silo_id, "experiment": name, "until_round": until, "reason": reason}
        self._say(self._log.warning, "silo set aside", **said)
        self._due.append(self._metrics.set_aside.inc)

    def _count_round(self, event: RoundClosed) -> None:
        self._metrics.rounds.labels("completed" if event.succeeded else "failed").inc()
        self._metrics.round_duration.observe(event.duration)

    def _keep(self, active: Active, task: TaskRecord) -> None:
        active.tasks[task.task_id] = task
        self._changes.tasks[task.task_id] = task

    def _set_checkpoint(
        self, active: Active, round_number: int, shared: PackedTensors, memory: PackedTensors | None
    ) -> None:
        reference = memory.ref if memory else None
        active.checkpoint = Checkpoint(active.experiment.experiment_id, round_number, shared.ref, reference)
        active.tensors = shared.data
        self._changes.checkpoints.append(active.checkpoint)
        for part in (shared, memory):
            if part is not None:
                self._changes.blobs[part.ref.sha256] = part.data


def _reject(done: asyncio.Future[Experiment], error: FedrtError) -> None:
    if not done.done():
        done.set_exception(error)


def _resolve(done: asyncio.Future[Experiment], experiment: Experiment | None, experiment_id: str) -> None:
    if done.done():
        return
    if experiment is None:
        message = f"experiment {experiment_id!r} does not exist; `fedrtctl list` shows those that do"
        _reject(done, SpecError(message))
    else:
        done.set_result(experiment)
