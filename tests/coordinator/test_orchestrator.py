"""The single writer with a real store and sessions that only note what they are told."""

import asyncio
import contextlib
import sqlite3
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from coordinator.combining import initial_shared
from coordinator.inbox import CancelOrdered, CreateOrdered, SessionOpened
from coordinator.orchestrator import Orchestrator
from coordinator.records import RoundClosed
from coordinator.store import FILE_NAME, Store
from fedrt.errors import DamageError
from fedrt.metrics import CoordinatorMetrics
from fedrt.session.frames import HeldState, HeldTask, Hello
from tests.samples import experiment_spec


@dataclass
class NotingSession:
    """An open session that keeps what it is told to do."""

    silo_id: str
    told: list[tuple[str, ...]] = field(default_factory=list)

    def offer(self, task, manifest, data):
        self.told.append(("offer", task.task_id))

    def settle(self, task_id, verdict, message):
        self.told.append(("settle", task_id, verdict.value))

    def cancel(self, task_id, message):
        self.told.append(("cancel", task_id))

    def replace(self):
        self.told.append(("replace",))


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(Store(tmp_path / "state")) as store:
        yield store


@pytest.fixture
async def orchestrator(store):
    """One that runs. If it ends, what ended it is raised at the end of the test."""
    made = Orchestrator(store, CoordinatorMetrics(CollectorRegistry()))
    await made.recover()
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await made.close()


def opened(session, *running):
    held = tuple(HeldTask(task_id, HeldState.RUNNING) for task_id in running)
    return SessionOpened(session, Hello("1.0", held_tasks=held))


def order(orchestrator, kind, *arguments):
    """Submit an order; returns its future."""
    done = asyncio.get_running_loop().create_future()
    orchestrator.submit(kind(*arguments, done))
    return done


def create(orchestrator, name, spec):
    return order(orchestrator, CreateOrdered, name, spec, initial_shared(spec))


async def test_a_silo_hears_that_its_task_was_cancelled_while_it_was_being_welcomed(orchestrator):
    """Or it would work for hours at what nobody waits for, and keep its next task waiting."""
    before, after = NotingSession("north"), NotingSession("north")
    orchestrator.submit(opened(before))
    await create(orchestrator, "e1", experiment_spec(every=0))
    assert ("offer", "e1/1/train/north") in before.told
    await order(orchestrator, CancelOrdered, "e1")
    orchestrator.submit(opened(after, "e1/1/train/north"))  # it was wanted when the session was welcomed
    await order(orchestrator, CancelOrdered, "e1")  # the messages before have been acted upon by then
    assert after.told == [("cancel", "e1/1/train/north")]


async def test_a_silo_that_holds_what_a_round_waits_for_is_told_nothing(orchestrator):
    orchestrator.submit(opened(NotingSession("north")))
    await create(orchestrator, "e1", experiment_spec(every=0))
    after = NotingSession("north")
    orchestrator.submit(opened(after, "e1/1/train/north"))
    await create(orchestrator, "e1", experiment_spec(every=0))
    assert after.told == []


async def test_a_round_that_closes_after_a_restart_with_an_earlier_clock_took_no_negative_time(store):
    """Counters of metrics only grow, and operators' programs read the event."""
    for now, event in ((86_400.0, None), (0.0, CancelOrdered)):
        orchestrator = Orchestrator(store, CoordinatorMetrics(CollectorRegistry()), lambda now=now: now)
        await orchestrator.recover()
        running = asyncio.create_task(orchestrator.run())
        if event is None:
            orchestrator.submit(opened(NotingSession("north")))
            assert (await create(orchestrator, "e1", experiment_spec(every=0))).round is not None
        else:
            await order(orchestrator, event, "e1")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await orchestrator.close()
    (closed,) = (e.event for e in store.events(0, "e1", 10) if isinstance(e.event, RoundClosed))
    assert closed.duration == 0.0


class FlappingSession(NotingSession):
    """As soon as it is replaced, the next one comes; time passes meanwhile."""

    def __init__(self, silo_id, orchestrator, clock, left):
        super().__init__(silo_id)
        self.orchestrator, self.clock, self.left = orchestrator, clock, left

    def replace(self):
        self.clock[0] += 1.0
        if self.left:
            after = FlappingSession(self.silo_id, self.orchestrator, self.clock, self.left - 1)
            self.orchestrator.submit(opened(after))


async def test_a_deadline_passes_however_many_messages_come(store):
    """Or silos whose line flaps could keep the round of all others open."""
    clock = [0.0]
    orchestrator = Orchestrator(store, CoordinatorMetrics(CollectorRegistry()), lambda: clock[0])
    running = asyncio.create_task(orchestrator.run())
    orchestrator.submit(opened(FlappingSession("north", orchestrator, clock, 200)))
    experiment = await create(orchestrator, "e1", experiment_spec(every=0))
    orchestrator.submit(opened(FlappingSession("north", orchestrator, clock, 200)))
    while (ended := await orchestrator.in_store(store.experiment, "e1")).end_time is None:
        assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await orchestrator.close()
    assert ended.end_time == experiment.round.deadline


async def test_an_order_about_a_damaged_record_of_an_ended_experiment_is_refused_and_ends_nothing(
    orchestrator, store, tmp_path
):
    spec = experiment_spec()
    await create(orchestrator, "old", spec)
    await order(orchestrator, CancelOrdered, "old")
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / FILE_NAME)) as connection, connection:
        connection.execute("UPDATE experiments SET document = '{'")
    for done in (create(orchestrator, "old", spec), order(orchestrator, CancelOrdered, "old")):
        with pytest.raises(DamageError):
            await asyncio.wait_for(done, 60)
    assert (await create(orchestrator, "new", spec)).experiment_id == "new"
