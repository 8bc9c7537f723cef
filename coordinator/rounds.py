"""One round as a pure machine: who was asked, who answered, and when the answers are enough.

Rules of the file:
* `step` returns the next round and the effects. The driver makes the round durable, then performs the effects, and may
  perform them again after a crash: each is idempotent.
* Time is an argument. A lost connection is not an event; only answers, refusals, the deadline and orders move a round.

                 +-- all settled, or deadline, with enough results --> AGGREGATING --aggregated--> CLOSED (succeeded)
    begin -> COLLECTING
                 +-- too few results possible, or deadline --------------------------------------> CLOSED (failed)

A round whose results carry no tensors skips AGGREGATING: an evaluation, or a method that shares nothing. A round that
can no longer get enough results stays open for a moment, so that the silos that have not answered yet can say why they
refuse too. One that asked more silos than it wants results of goes on as soon as it has those.

An ask: OFFERED --result--> RETURNED;  OFFERED --failure, refusal or deadline--> ABSENT. BUSY and DRAINING are not
refusals for good: the ask stays OFFERED and is offered again later.
"""

import enum
from collections.abc import Set
from dataclasses import dataclass, replace

from fedrt.task import RefusalReason, TaskKind, Verdict

REOFFER_DELAY = 2.0  # seconds until a busy silo is asked again
LATE = "no result within the time limit"
LOST = "the round can no longer get enough results"
ENOUGH = "the round had enough results without it"
LOST_GRACE = 2.0  # seconds that a lost round stays open, so that the other silos can say why they refuse too


class AskState(enum.Enum):
    """How one silo's part in a round stands."""

    OFFERED = "offered"
    RETURNED = "returned"
    ABSENT = "absent"


class RoundPhase(enum.Enum):
    """How a round stands."""

    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    CLOSED = "closed"


class Standing(enum.Enum):
    """Whether a round can still succeed."""

    PENDING = "pending"
    ENOUGH = "enough"
    LOST = "lost"


@dataclass(frozen=True)
class Ask:
    """One silo asked for one task. `message` says why an absentee is absent; `away`, that it was not connected then."""

    silo_id: str
    task_id: str
    state: AskState = AskState.OFFERED
    message: str = ""
    reoffer_time: float | None = None
    away: bool = False


@dataclass(frozen=True)
class Round:
    """One exchange with a set of silos. `absent` were wanted, but not asked: (silo, why).

    It needs `needed` results, and waits for all that can come, or for `enough` of them.
    """

    number: int
    kind: TaskKind
    attempt: int
    asks: tuple[Ask, ...]
    needed: int
    begin_time: float
    deadline: float
    aggregates: bool = True  # whether results carry shared tensors to combine
    absent: tuple[tuple[str, str], ...] = ()
    phase: RoundPhase = RoundPhase.COLLECTING
    succeeded: bool = False
    lost_time: float | None = None  # since when too few results can come
    message: str = ""  # why it was withdrawn
    enough: int | None = None

    def same_as(self, other: "Round") -> bool:
        """Whether both are the same round at different times."""
        return (self.number, self.kind, self.attempt) == (other.number, other.kind, other.attempt)

    def ask(self, task_id: str) -> Ask | None:
        """The ask of a task, if it belongs to this round."""
        return next((ask for ask in self.asks if ask.task_id == task_id), None)


@dataclass(frozen=True)
class ResultStored:
    """A valid result is durable, or becomes so together with this step."""

    task_id: str


@dataclass(frozen=True)
class ResultFailed:
    """The silo reported a failure, or its result was invalid (`verdict` then says so)."""

    task_id: str
    message: str
    verdict: Verdict = Verdict.ACCEPTED


@dataclass(frozen=True)
class Refused:
    """The silo does not take the task."""

    task_id: str
    reason: RefusalReason
    message: str


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Aggregated:
    """The new shared tensors are durable, or become so together with this step."""


@dataclass(frozen=True)
class Withdrawn:
    """The experiment no longer wants this round."""

    message: str


RoundEvent = ResultStored | ResultFailed | Refused | Tick | Aggregated | Withdrawn


@dataclass(frozen=True)
class Offer:
    """Offer this task to its silo, if it is connected; otherwise when it connects."""

    silo_id: str
    task_id: str


@dataclass(frozen=True)
class Settle:
    """Answer a result."""

    silo_id: str
    task_id: str
    verdict: Verdict
    message: str = ""


@dataclass(frozen=True)
class Cancel:
    """Tell the silo to abandon the task."""

    silo_id: str
    task_id: str
    message: str


@dataclass(frozen=True)
class Aggregate:
    """Combine the stored results of these tasks and report `Aggregated`."""

    task_ids: tuple[str, ...]


RoundEffect = Offer | Settle | Cancel | Aggregate
Effects = tuple[RoundEffect, ...]


def standing(asks: tuple[Ask, ...], needed: int, enough: int | None = None) -> Standing:
    """Whether the asks can still give `needed` results, and whether more are worth waiting for."""
    returned = sum(ask.state is AskState.RETURNED for ask in asks)
    offered = sum(ask.state is AskState.OFFERED for ask in asks)
    if returned + offered < needed:
        return Standing.LOST
    is_open = offered and (enough is None or returned < enough)
    return Standing.PENDING if is_open else Standing.ENOUGH


def step(round_: Round, event: RoundEvent, now: float) -> tuple[Round, Effects]:
    """The next round and what is to be done, after it is durable."""
    match event:
        case ResultStored(task_id):
            return _settle(round_, task_id, AskState.RETURNED, now)
        case ResultFailed(task_id, message, verdict):
            return _settle(round_, task_id, AskState.ABSENT, now, verdict, message)
        case Refused(task_id, reason, message):
            return _refuse(round_, task_id, reason, message, now)
        case Tick():
            return _tick(round_, now)
        case Aggregated():
            if round_.phase is not RoundPhase.AGGREGATING:
                return round_, ()
            return replace(round_, phase=RoundPhase.CLOSED, succeeded=True), ()
        case Withdrawn(message) if round_.phase is not RoundPhase.CLOSED:
            return _close_failed(replace(round_, message=message), message)
        case Withdrawn():
            return round_, ()


def renew(round_: Round, now: float, time_limit: float) -> Round:
    """The round as it goes on after a restart: its time begins anew, for nobody could deliver meanwhile.

    The clock may have been set meanwhile, too: no earlier instant is compared with `now`.
    """
    asks = tuple(replace(ask, reoffer_time=None) for ask in round_.asks)  # offered again when their silos connect
    lost_time = None if round_.lost_time is None else now
    return replace(round_, asks=asks, deadline=now + time_limit, lost_time=lost_time)


def resume(round_: Round) -> Effects:
    """The effects to perform again after a restart; offers go out when their silos connect."""
    if round_.phase is RoundPhase.AGGREGATING:
        return (Aggregate(_returned_tasks(round_)),)
    return ()


def next_tick(round_: Round) -> float | None:
    """When `Tick` can next change anything."""
    if round_.phase is not RoundPhase.COLLECTING:
        return None
    times = [ask.reoffer_time for ask in round_.asks if ask.state is AskState.OFFERED and ask.reoffer_time is not None]
    lost = [] if round_.lost_time is None else [round_.lost_time + LOST_GRACE]
    return min([round_.deadline, *times, *lost])


def absentees(round_: Round) -> tuple[tuple[str, str], ...]:
    """(silo, why) of everyone whose result did not count, by name."""
    asked = [(ask.silo_id, _reason(ask)) for ask in round_.asks if ask.state is not AskState.RETURNED]
    return tuple(sorted([*round_.absent, *asked]))


def given_up(ask: Ask) -> bool:
    """Whether the round stopped waiting for the silo, which may still be at work."""
    return ask.state is AskState.ABSENT and ask.message in (LATE, LOST)


def is_late(ask: Ask) -> bool:
    """Whether the silo was connected, and has not answered within the time limit."""
    return ask.state is AskState.ABSENT and ask.message == LATE and not ask.away


def reopened(ask: Ask) -> Ask:
    """The ask as the next attempt takes it over: it waits again for a silo that this one gave up."""
    return replace(ask, state=AskState.OFFERED, message="", away=False) if given_up(ask) else ask


def open_tasks(round_: Round) -> frozenset[str]:
    """The tasks that the round waits for."""
    return frozenset(ask.task_id for ask in round_.asks if ask.state is AskState.OFFERED)


def open_offers(round_: Round) -> Effects:
    """The offers of a round that begins; a silo that holds a task already is not offered it again."""
    asks = (ask for ask in round_.asks if ask.state is AskState.OFFERED and ask.reoffer_time is None)
    return tuple(Offer(ask.silo_id, ask.task_id) for ask in asks)


def to_blame(round_: Round, ask: Ask) -> bool:
    """Whether it was the silo's own doing that it gave no result."""
    excused = ask.away or ask.message in (LOST, ENOUGH) or bool(round_.message)
    return ask.state is AskState.ABSENT and not excused


def note_away(before: Round, after: Round, connected: Set[str]) -> Round:
    """The round with a mark at each ask that the last step gave up while its silo was not connected."""
    waited_for = {ask.task_id for ask in before.asks if ask.state is AskState.OFFERED}
    asks = tuple(
        replace(ask, away=True) if ask.task_id in waited_for and given_up(ask) and ask.silo_id not in connected else ask
        for ask in after.asks
    )
    return after if asks == after.asks else replace(after, asks=asks)


def _reason(ask: Ask) -> str:
    return f"{ask.message or 'no result'}; not connected" if ask.away else ask.message or "no result"


def _settle(
    round_: Round, task_id: str, state: AskState, now: float, verdict: Verdict = Verdict.ACCEPTED, message: str = ""
) -> tuple[Round, Effects]:
    ask = round_.ask(task_id)
    if ask is None:
        raise ValueError(f"task {task_id!r} does not belong to round {round_.number}")
    if ask.state is AskState.RETURNED:
        return round_, (Settle(ask.silo_id, task_id, Verdict.DUPLICATE),)
    if ask.state is AskState.ABSENT or round_.phase is not RoundPhase.COLLECTING:
        return round_, (Settle(ask.silo_id, task_id, Verdict.LATE, ask.message or "the round is closed"),)
    settled = _with_ask(round_, replace(ask, state=state, message=message, reoffer_time=None))
    decided, effects = _decide(settled, now)
    return decided, (Settle(ask.silo_id, task_id, verdict, message), *effects)


def _refuse(round_: Round, task_id: str, reason: RefusalReason, message: str, now: float) -> tuple[Round, Effects]:
    ask = round_.ask(task_id)
    if ask is None or ask.state is not AskState.OFFERED or round_.phase is not RoundPhase.COLLECTING:
        return round_, ()
    if reason is RefusalReason.DRAINING:
        return round_, ()  # the silo comes back in a new session, and is then offered everything again
    if reason is RefusalReason.BUSY:
        return _with_ask(round_, replace(ask, reoffer_time=now + REOFFER_DELAY)), ()
    text = f"refused ({reason.value}): {message}"
    return _decide(_with_ask(round_, replace(ask, state=AskState.ABSENT, message=text, reoffer_time=None)), now)


def _tick(round_: Round, now: float) -> tuple[Round, Effects]:
    if round_.phase is not RoundPhase.COLLECTING:
        return round_, ()
    if now >= round_.deadline:
        cancels = _cancels(round_, LATE)
        decided, effects = _decide(_with_absent(round_, LATE), now)
        return decided, (*cancels, *effects)
    if round_.lost_time is not None and now >= round_.lost_time + LOST_GRACE:
        return _close_failed(round_, LOST)
    due = [ask for ask in round_.asks if ask.reoffer_time is not None and ask.reoffer_time <= now]
    for ask in due:
        round_ = _with_ask(round_, replace(ask, reoffer_time=None))
    return round_, tuple(Offer(ask.silo_id, ask.task_id) for ask in due)


def _decide(round_: Round, now: float) -> tuple[Round, Effects]:
    match standing(round_.asks, round_.needed, round_.enough):
        case Standing.PENDING:
            return round_, ()
        case Standing.LOST if any(ask.state is AskState.OFFERED for ask in round_.asks):
            return replace(round_, lost_time=now if round_.lost_time is None else round_.lost_time), ()
        case Standing.LOST:
            return _close_failed(round_, LOST)
        case Standing.ENOUGH if not round_.aggregates:
            closed = replace(_with_absent(round_, ENOUGH), phase=RoundPhase.CLOSED, succeeded=True)
            return closed, _cancels(round_, ENOUGH)
        case Standing.ENOUGH:
            aggregating = replace(_with_absent(round_, ENOUGH), phase=RoundPhase.AGGREGATING)
            return aggregating, (*_cancels(round_, ENOUGH), Aggregate(_returned_tasks(round_)))


def _close_failed(round_: Round, message: str) -> tuple[Round, Effects]:
    if round_.phase is RoundPhase.CLOSED:
        return round_, ()
    return replace(_with_absent(round_, message), phase=RoundPhase.CLOSED), _cancels(round_, message)


def _returned_tasks(round_: Round) -> tuple[str, ...]:
    return tuple(ask.task_id for ask in round_.asks if ask.state is AskState.RETURNED)


def _cancels(round_: Round, message: str) -> Effects:
    return tuple(Cancel(ask.silo_id, ask.task_id, message) for ask in round_.asks if ask.state is AskState.OFFERED)


def _with_ask(round_: Round, ask: Ask) -> Round:
    return replace(round_, asks=tuple(ask if old.task_id == ask.task_id else old for old in round_.asks))


def _with_absent(round_: Round, message: str) -> Round:
    asks = tuple(
        replace(ask, state=AskState.ABSENT, message=message, reoffer_time=None)
        if ask.state is AskState.OFFERED
        else ask
        for ask in round_.asks
    )
    return replace(round_, asks=asks)
