"""What a silo holds, as a pure machine: which tasks it took, which runs, which results await a verdict.

Rules of the file:
* `step` returns the next ledger and the effects; the driver performs them in order. Each is idempotent by task id.
* A result is FINISHED only once it is durable in the spool. It leaves the ledger only with its verdict.
* Private tensors advance with ACCEPTED (or DUPLICATE: accepted earlier), and with nothing else. So work of an
  experiment does not begin while a result of it awaits its verdict: it might begin from outdated ones.

    offered --accepted--> WAITING --tensors here--> QUEUED --turn--> RUNNING --outcome durable--> FINISHED --verdict-->
       |                     |                        |                 |
       +--refused-->         +--session lost-->       +----cancelled----+--> FINISHED, as a failure CANCELLED
"""

import enum
from dataclasses import dataclass, replace

from fedrt.session.frames import HeldState, HeldTask
from fedrt.task import RefusalReason, Verdict

MAX_HELD = 16


class HoldState(enum.Enum):
    """How far a task is at this silo."""

    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class Hold:
    """One task the silo took."""

    task_id: str
    experiment_id: str
    state: HoldState


@dataclass(frozen=True)
class Ledger:
    """Everything held, oldest first."""

    holds: tuple[Hold, ...] = ()
    draining: bool = False

    def state(self, task_id: str) -> HoldState | None:
        """How far a task is; None if it is not held."""
        return next((hold.state for hold in self.holds if hold.task_id == task_id), None)

    @property
    def running(self) -> str | None:
        """The task that runs."""
        return next((hold.task_id for hold in self.holds if hold.state is HoldState.RUNNING), None)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do or to deliver."""
        return not self.holds


@dataclass(frozen=True)
class Offered:
    """A task was offered; `refusal` is what the policy says, None if it allows the task."""

    task_id: str
    experiment_id: str
    has_tensors: bool
    refusal: RefusalReason | None = None
    message: str = ""


@dataclass(frozen=True)
class TensorsArrived:
    """The tensors of an accepted task are complete."""

    task_id: str


@dataclass(frozen=True)
class OutcomeStored:
    """The outcome of a task, good or bad, is durable in the spool."""

    task_id: str


@dataclass(frozen=True)
class CancelArrived:
    """The coordinator no longer wants a task."""

    task_id: str


@dataclass(frozen=True)
class VerdictArrived:
    """The coordinator settled a result."""

    task_id: str
    verdict: Verdict


@dataclass(frozen=True)
class SessionUp:
    """A session is open; the coordinator does not want the obsolete tasks."""

    obsolete: tuple[str, ...] = ()


@dataclass(frozen=True)
class SessionDown:
    """The session was lost; tensors under way will not arrive."""


@dataclass(frozen=True)
class DrainOrdered:
    """The daemon is stopping."""


LedgerEvent = (
    Offered | TensorsArrived | OutcomeStored | CancelArrived | VerdictArrived | SessionUp | SessionDown | DrainOrdered
)


@dataclass(frozen=True)
class Reply:
    """Answer the offer."""

    task_id: str
    refusal: RefusalReason | None = None
    message: str = ""


@dataclass(frozen=True)
class Start:
    """Begin the work."""

    task_id: str


@dataclass(frozen=True)
class StoreCancelled:
    """Stop the work if it runs, and store the outcome: a failure CANCELLED."""

    task_id: str


@dataclass(frozen=True)
class Send:
    """Send the stored result, if there is a session."""

    task_id: str


@dataclass(frozen=True)
class Promote:
    """Make the staged private tensors the current ones, then forget the result."""

    task_id: str


@dataclass(frozen=True)
class Forget:
    """Stop the work if it runs and drop everything about the task."""

    task_id: str


LedgerEffect = Reply | Start | StoreCancelled | Send | Promote | Forget
Effects = tuple[LedgerEffect, ...]


def step(ledger: Ledger, event: LedgerEvent) -> tuple[Ledger, Effects]:
    """The next ledger and what is to be done."""
    match event:
        case Offered():
            return _offered(ledger, event)
        case TensorsArrived(task_id) if ledger.state(task_id) is HoldState.WAITING:
            return _start_next(_with_state(ledger, task_id, HoldState.QUEUED))
        case OutcomeStored(task_id) if ledger.state(task_id) is not None:
            finished, effects = _start_next(_with_state(ledger, task_id, HoldState.FINISHED))
            return finished, (Send(task_id), *effects)
        case CancelArrived(task_id) if ledger.state(task_id) not in (None, HoldState.FINISHED):
            return ledger, (StoreCancelled(task_id),)
        case VerdictArrived(task_id, verdict) if ledger.state(task_id) is HoldState.FINISHED:
            accepted = verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE)
            settled, effects = _start_next(_without(ledger, task_id))
            return settled, (Promote(task_id) if accepted else Forget(task_id), *effects)
        case SessionUp(obsolete):
            return _session_up(ledger, obsolete)
        case SessionDown():
            waiting = [hold.task_id for hold in ledger.holds if hold.state is HoldState.WAITING]
            return _forget(ledger, waiting)
        case DrainOrdered():
            unstarted = [h.task_id for h in ledger.holds if h.state in (HoldState.WAITING, HoldState.QUEUED)]
            return _forget(replace(ledger, draining=True), unstarted)
        case _:
            return ledger, ()  # about a task that is no longer held


def held_tasks(ledger: Ledger) -> tuple[HeldTask, ...]:
    """What Hello tells the coordinator. A task whose tensors were under way is not held: it is offered again."""
    return tuple(
        HeldTask(hold.task_id, HeldState.FINISHED if hold.state is HoldState.FINISHED else HeldState.RUNNING)
        for hold in ledger.holds
        if hold.state is not HoldState.WAITING
    )


def _offered(ledger: Ledger, offer: Offered) -> tuple[Ledger, Effects]:
    task_id, held = offer.task_id, ledger.state(offer.task_id)
    if held is HoldState.FINISHED:
        return ledger, (Reply(task_id), Send(task_id))
    if held is not None:
        return ledger, (Reply(task_id),)
    if ledger.draining:
        return ledger, (Reply(task_id, RefusalReason.DRAINING, "this silo is stopping"),)
    if offer.refusal is not None:
        return ledger, (Reply(task_id, offer.refusal, offer.message),)
    if len(ledger.holds) >= MAX_HELD:
        return ledger, (Reply(task_id, RefusalReason.BUSY, f"this silo already holds {MAX_HELD} tasks"),)
    state = HoldState.WAITING if offer.has_tensors else HoldState.QUEUED
    taken, effects = _start_next(replace(ledger, holds=(*ledger.holds, Hold(task_id, offer.experiment_id, state))))
    return taken, (Reply(task_id), *effects)


def _session_up(ledger: Ledger, obsolete: tuple[str, ...]) -> tuple[Ledger, Effects]:
    kept, effects = _forget(ledger, [task_id for task_id in obsolete if ledger.state(task_id) is not None])
    sends = tuple(Send(hold.task_id) for hold in kept.holds if hold.state is HoldState.FINISHED)
    return kept, (*effects, *sends)


def _start_next(ledger: Ledger) -> tuple[Ledger, Effects]:
    unsettled = {hold.experiment_id for hold in ledger.holds if hold.state is HoldState.FINISHED}
    startable = (h for h in ledger.holds if h.state is HoldState.QUEUED and h.experiment_id not in unsettled)
    queued = next((hold.task_id for hold in startable), None)
    if ledger.running is not None or queued is None:
        return ledger, ()
    return _with_state(ledger, queued, HoldState.RUNNING), (Start(queued),)


def _forget(ledger: Ledger, task_ids: list[str]) -> tuple[Ledger, Effects]:
    for task_id in task_ids:
        ledger = _without(ledger, task_id)
    started, effects = _start_next(ledger)
    return started, (*(Forget(task_id) for task_id in task_ids), *effects)


def _with_state(ledger: Ledger, task_id: str, state: HoldState) -> Ledger:
    holds = tuple(replace(hold, state=state) if hold.task_id == task_id else hold for hold in ledger.holds)
    return replace(ledger, holds=holds)


def _without(ledger: Ledger, task_id: str) -> Ledger:
    return replace(ledger, holds=tuple(hold for hold in ledger.holds if hold.task_id != task_id))
