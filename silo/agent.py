"""Drives the ledger: one task reads the inbox, decides, and makes replies, work, results and promotions happen.

A result is durable in the spool before it is sent, and stays there until its verdict; so the daemon may die at any
moment, and whatever was computed is delivered later.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from fedrt.errors import DamageError, FailureReason, FedrtError, PayloadError, TensorError, WorkError
from fedrt.metrics import SiloMetrics
from fedrt.payload import Manifest, unpack
from fedrt.session.frames import HeldTask
from fedrt.task import Failure, Result, Success, Task, TaskKind, Verdict
from fedrt.tensors import Scope, Tensors, TensorSpec, check_tensors, of_scope
from silo import ledger as ledgers
from silo.departures import check_release
from silo.ledger import HoldState, Ledger, LedgerEvent
from silo.policy import Policy, judge, judge_announcement
from silo.spool import Spooled
from silo.stores import Stores
from silo.work import Worker, WorkerReport, WorkOrder, WorkOutcome

PROGRESS_INTERVAL = 1.0  # seconds between progress frames


class Session(Protocol):
    """What the agent may do with the open session; nothing waits, and everything is lost with the session."""

    def reply(self, reply: ledgers.Reply) -> None:
        """Answer an offer."""

    def send(self, result: Result, data: memoryview | None) -> None:
        """Send a result, unless this session has sent it already."""

    def progress(self, task_id: str, done: int, planned: int) -> None:
        """Say how far a task is."""


@dataclass(frozen=True)
class OfferArrived:
    """The coordinator offers a task."""

    task: Task
    manifest: Manifest | None


@dataclass(frozen=True)
class TensorsArrived:
    """The tensors of an offer are here, or are spoilt."""

    task_id: str
    data: memoryview | PayloadError


@dataclass(frozen=True)
class SessionUp:
    """A session is open."""

    session: Session
    obsolete: tuple[str, ...]


@dataclass(frozen=True)
class SessionDown:
    """The session has ended."""

    session: Session


@dataclass(frozen=True)
class WorkEnded:
    """The worker is done with a task."""

    task_id: str
    outcome: WorkOutcome | WorkError


AgentMessage = (
    OfferArrived
    | TensorsArrived
    | SessionUp
    | SessionDown
    | WorkEnded
    | ledgers.CancelArrived
    | ledgers.VerdictArrived
    | ledgers.DrainOrdered
)


@dataclass
class _Accepted:
    task: Task
    manifest: Manifest | None
    specs: tuple[TensorSpec, ...]
    deadline: float  # of the monotonic clock
    shared: Tensors = field(default_factory=dict)


class Agent:
    """Owns everything a silo holds. Everything but `run` and `idle` may be called from the event loop and returns."""

    def __init__(
        self, worker: Worker, report: WorkerReport, policy: Policy, stores: Stores, metrics: SiloMetrics
    ) -> None:
        self._worker = worker
        self._report = report
        self._policy = policy
        self._stores = stores
        self._metrics = metrics
        self._log = structlog.get_logger("silo")
        self._inbox: asyncio.Queue[AgentMessage] = asyncio.Queue()
        self._session: Session | None = None
        self._accepted: dict[str, _Accepted] = {}
        self._spooled: dict[str, Spooled] = {}
        self._work: dict[str, asyncio.Task[None]] = {}
        self._ledger = Ledger()
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, message: AgentMessage) -> None:
        """Queue a message."""
        self._inbox.put_nowait(message)

    @property
    def held(self) -> tuple[HeldTask, ...]:
        """What Hello tells the coordinator."""
        return ledgers.held_tasks(self._ledger)

    async def idle(self) -> None:
        """Wait until nothing is left to do or to deliver."""
        await self._idle.wait()

    @property
    def is_working(self) -> bool:
        """Whether a task runs; otherwise all that is held is durable and may be delivered later."""
        return self._ledger.running is not None

    async def recover(self) -> None:
        """Take up the results that an earlier run of the daemon left in the spool."""
        for spooled in await self._stores.undelivered():
            self._spooled[spooled.task_id] = spooled
            hold = ledgers.Hold(spooled.task_id, spooled.experiment_id, HoldState.FINISHED)
            self._ledger = Ledger((*self._ledger.holds, hold))
            self._log.info("undelivered result found", task=spooled.task_id)

    async def run(self) -> None:
        """Serve the inbox until cancelled."""
        try:
            while True:
                await self._apply(await self._inbox.get())
        finally:
            for work in self._work.values():
                work.cancel()
            await asyncio.gather(*self._work.values(), return_exceptions=True)

    async def _apply(self, message: AgentMessage) -> None:
        match message:
            case OfferArrived():
                await self._offer_arrived(message)
            case TensorsArrived(task_id, data):
                await self._tensors_arrived(task_id, data)
            case SessionUp(session, obsolete):
                self._session = session
                await self._step(ledgers.SessionUp(obsolete))
            case SessionDown(session):
                if self._session is session:
                    self._session = None
                    await self._step(ledgers.SessionDown())
            case WorkEnded(task_id, outcome):
                await self._work_ended(task_id, outcome)
            case ledgers.VerdictArrived(task_id, verdict):
                log = self._log.info if verdict is Verdict.ACCEPTED else self._log.warning
                log("verdict", task=task_id, verdict=verdict.value)
                await self._step(message)
            case _:
                await self._step(message)

    async def _step(self, event: LedgerEvent) -> None:
        self._ledger, effects = ledgers.step(self._ledger, event)
        for effect in effects:
            await self._perform(effect)
        if self._ledger.is_idle:
            self._idle.set()
        else:
            self._idle.clear()

    async def _perform(self, effect: ledgers.LedgerEffect) -> None:
        match effect:
            case ledgers.Reply():
                self._reply(effect)
            case ledgers.Start(task_id):
                self._work[task_id] = asyncio.create_task(self._do(self._accepted[task_id]))
            case ledgers.StoreCancelled(task_id):
                self._metrics.tasks.labels(self._accepted[task_id].task.kind.value, "cancelled").inc()
                await self._stop_work(task_id)
                failure = Failure(FailureReason.CANCELLED, "the coordinator cancelled the task")
                await self._store(self._accepted[task_id].task, failure, {}, {})
            case ledgers.Send(task_id):
                if self._session is not None:
                    self._session.send(*self._spooled[task_id].to_send)
            case ledgers.Promote(task_id):
                await self._promote(task_id)
            case ledgers.Forget(task_id):
                accepted = self._accepted.get(task_id)
                was_running = await self._stop_work(task_id)
                await self._drop(task_id)
                if was_running and accepted:  # otherwise an earlier run's may be of use when the task is offered again
                    await self._stores.abandon(accepted.task)

    # ---- offers

    async def _offer_arrived(self, message: OfferArrived) -> None:
        task = message.task
        refusal = judge(task, self._policy, self._report)
        specs = task.local.tensors() if refusal is None else ()
        if refusal is None and message.manifest is not None:
            refusal = judge_announcement(message.manifest.byte_count, specs)
        if refusal is None and self._ledger.state(task.task_id) is None:
            self._accepted[task.task_id] = _Accepted(task, message.manifest, specs, time.monotonic() + task.time_limit)
        offered = ledgers.Offered(task.task_id, task.experiment_id, message.manifest is not None)
        if refusal is not None:
            offered = replace(offered, refusal=refusal.reason, message=refusal.message)
        await self._step(offered)
        if self._ledger.state(task.task_id) is None:
            self._metrics.tasks.labels(task.kind.value, "refused").inc()

    def _reply(self, reply: ledgers.Reply) -> None:
        if reply.refusal is not None:
            self._accepted.pop(reply.task_id, None)
            self._log.warning("task refused", task=reply.task_id, reason=reply.refusal.value, message=reply.message)
        if self._session is not None:
            self._session.reply(reply)

    async def _tensors_arrived(self, task_id: str, data: memoryview | PayloadError) -> None:
        accepted = self._accepted.get(task_id)
        if accepted is None or accepted.manifest is None or self._ledger.state(task_id) is not HoldState.WAITING:
            return  # settled meanwhile, or offered a second time although the first tensors did arrive
        try:
            if isinstance(data, PayloadError):
                raise data
            accepted.shared = unpack(accepted.manifest.tensors, data)
            check_tensors(of_scope(accepted.specs, Scope.SHARED), accepted.shared)
        except (PayloadError, TensorError) as error:
            await self._store(accepted.task, Failure(FailureReason.PAYLOAD_CORRUPT, str(error)), {}, {})
            return
        await self._step(ledgers.TensorsArrived(task_id))

    # ---- work

    async def _do(self, accepted: _Accepted) -> None:
        task = accepted.task
        self._log.info("work begins", task=task.task_id, experiment=task.experiment_id, round=task.round_number)
        try:
            async with asyncio.timeout(accepted.deadline - time.monotonic()):
                order = WorkOrder(
                    task_id=task.task_id,
                    experiment_id=task.experiment_id,
                    kind=task.kind,
                    local=task.local,
                    round_number=task.round_number,
                    seed=task.seed,
                    shared=accepted.shared,
                    private=await self._stores.private(task),
                    checkpoint=self._stores.checkpoint(task),
                )
                done = await self._worker.run(order, self._progress_of(task.task_id))
            if task.kind is not TaskKind.EVALUATE:
                check_release(accepted.specs, done.shared)
            outcome: WorkOutcome | WorkError = done
        except TimeoutError:
            outcome = WorkError(FailureReason.TIME_LIMIT, f"the work took longer than {task.time_limit:.0f} seconds")
        except WorkError as error:
            outcome = error
        except DamageError as error:
            self._log.error("work failed", task=task.task_id, reason=str(error))
            outcome = WorkError(
                FailureReason.INTERNAL, "private tensors at the silo are damaged or no longer kept; see its log"
            )
        except FedrtError as error:
            self._log.error("work failed", task=task.task_id, reason=str(error))
            outcome = WorkError(FailureReason.INTERNAL, f"{type(error).__name__} at the silo; see its log")
        except Exception as error:  # a worker's bug fails one task, not the silo
            self._log.exception("work failed", task=task.task_id)
            outcome = WorkError(FailureReason.INTERNAL, f"{type(error).__name__} at the silo; see its log")
        self.submit(WorkEnded(task.task_id, outcome))

    def _progress_of(self, task_id: str) -> Callable[[int, int], None]:
        last = time.monotonic()  # short work needs no progress report

        def report(done: int, planned: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= PROGRESS_INTERVAL and self._session is not None:
                last = now
                self._session.progress(task_id, done, planned)

        return report

    async def _work_ended(self, task_id: str, outcome: WorkOutcome | WorkError) -> None:
        self._work.pop(task_id, None)
        self._report = self._worker.report or self._report  # work may have met files that cannot be read
        self._metrics.unreadable_files.set(self._report.unreadable_count)
        if self._ledger.state(task_id) is not HoldState.RUNNING:
            return  # cancelled meanwhile
        task, manifest = self._accepted[task_id].task, self._accepted[task_id].manifest
        if isinstance(outcome, WorkError):
            self._metrics.tasks.labels(task.kind.value, "failed").inc()
            self._log.error("work failed", task=task_id, reason=outcome.reason.value, message=str(outcome))
            await self._store(task, Failure(outcome.reason, str(outcome)), {}, {})
            return
        self._metrics.tasks.labels(task.kind.value, "succeeded").inc()
        self._metrics.work_duration.labels(task.kind.value).observe(outcome.duration)
        received = manifest.sha256.hex() if manifest else ""
        success = Success(outcome.example_count, dict(outcome.metrics), outcome.duration, received)
        shared = {} if task.kind is TaskKind.EVALUATE else outcome.shared
        private = outcome.private if task.kind is TaskKind.TRAIN else {}
        await self._store(task, success, shared, private)

    async def _stop_work(self, task_id: str) -> bool:
        """Return once nothing works at the task; whether anything did."""
        work = self._work.pop(task_id, None)
        if work is None:
            return False
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return True

    # ---- disk

    async def _store(self, task: Task, outcome: Success | Failure, shared: Tensors, private: Tensors) -> None:
        spooled = Spooled(
            task.task_id, task.experiment_id, task.round_number, task.kind, outcome, shared=shared, private=private
        )
        await self._stores.keep(spooled)
        self._spooled[task.task_id] = spooled
        self._accepted.pop(task.task_id, None)
        await self._step(ledgers.OutcomeStored(task.task_id))

    async def _promote(self, task_id: str) -> None:
        await self._stores.promote(self._spooled[task_id])
        await self._drop(task_id)

    async def _drop(self, task_id: str) -> None:
        self._accepted.pop(task_id, None)
        if self._spooled.pop(task_id, None) is not None:
            await self._stores.remove(task_id)
