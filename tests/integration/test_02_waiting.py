"""Who takes part: rounds wait for the silos they need, say whom, and begin the moment they are there."""

import asyncio

from coordinator.selection import Occasion, Population, Selection, select
from fedrt.task import TaskKind
from fedrt.v1 import admin_service_pb2 as pb
from tests.fakes.federation import Federation, make_spec
from tests.fakes.workers import FakeWorker
from tests.integration.following import EVALUATE, State, Watch, absences, closed, connected, contributors, gone, waiting


async def test_01_an_experiment_created_before_any_silo_says_so_and_starts_when_they_connect(
    federation: Federation,
) -> None:
    federation.start_coordinator()
    await federation.create("early", make_spec(1))
    pending = await federation.experiment("early")
    assert pending.state == State.STATE_PENDING
    assert pending.status_message == "waiting for silos: none has ever connected"
    federation.start_silo("north", FakeWorker())
    experiment, rounds = await federation.finish("early")
    assert experiment.state == State.STATE_SUCCEEDED
    assert experiment.status_message == ""
    assert contributors(rounds[0]) == ["north"]


async def test_02_a_pending_experiment_names_the_silos_that_are_missing(federation: Federation) -> None:
    federation.start_coordinator()
    await federation.create("named", make_spec(1, federation.silos))
    watch = Watch(federation)
    await watch.until(waiting("0 of 3 needed are connected; not connected: north, south, west"))
    federation.start_silo("west", FakeWorker())
    await watch.until(waiting("1 of 3 needed are connected; not connected: north, south"))
    federation.start_silo("north", FakeWorker())
    await watch.until(waiting("2 of 3 needed are connected; not connected: south"))
    assert (await federation.experiment("named")).state == State.STATE_PENDING
    federation.start_silo("south", FakeWorker())
    experiment, rounds = await federation.finish("named")
    assert experiment.state == State.STATE_SUCCEEDED
    assert contributors(rounds[0]) == ["north", "south", "west"]


async def test_03_a_round_begins_with_min_results_and_records_who_was_not_there(federation: Federation) -> None:
    federation.start_coordinator()
    await federation.create("two-suffice", make_spec(1, federation.silos, min_results=2))
    for name in ("north", "west"):
        federation.start_silo(name, FakeWorker())
    experiment, rounds = await federation.finish("two-suffice")
    assert experiment.state == State.STATE_SUCCEEDED
    assert [contributors(r) for r in rounds] == [["north", "west"]] * 2
    assert [absences(r) for r in rounds] == [{"south": "not connected"}] * 2


async def test_04_max_silos_draws_as_many_from_the_seed(federation: Federation) -> None:
    spec = make_spec(8, federation.silos, max_silos=2)
    federation.start_coordinator()
    for name in federation.silos:
        federation.start_silo(name, FakeWorker())
    watch = Watch(federation)
    for name in federation.silos:
        await Watch(federation).until(connected(name))
    await federation.create("drawn", spec)
    _, rounds = await federation.finish("drawn")
    await federation.create("drawn-again", spec)
    _, again = await federation.finish("drawn-again")
    everyone = Population(frozenset(federation.silos), frozenset(federation.silos))
    for closed_round in rounds:
        kind = TaskKind.EVALUATE if closed_round.task_kind == EVALUATE else TaskKind.TRAIN
        drawn = select(spec.rounds, everyone, Occasion(kind, (spec.seed, closed_round.round_number, 0)))
        assert isinstance(drawn, Selection)
        assert contributors(closed_round) == list(drawn.asked)
        assert len(drawn.asked) == (2 if kind is TaskKind.TRAIN else len(federation.silos))  # all evaluate
    trained = [contributors(r) for r in rounds if r.task_kind != EVALUATE]
    assert {name for names in trained for name in names} == set(federation.silos)
    assert [contributors(r) for r in rounds] == [contributors(r) for r in again]
    assert watch.number == 0


async def test_05_a_silo_that_comes_back_is_asked_in_the_next_round(federation: Federation) -> None:
    gate = asyncio.Event()
    gate.set()
    slow = FakeWorker(gate=gate)
    federation.start_coordinator()
    federation.start_silo("north", slow)
    for name in ("south", "west"):
        federation.start_silo(name, FakeWorker())
    watch = Watch(federation)
    for name in federation.silos:
        await Watch(federation).until(connected(name))
    await watch.until(connected("west"))
    await federation.running.pop("west").stop()
    await watch.until(gone("west"))
    gate.clear()
    slow.began.clear()
    await federation.create("returning", make_spec(2, federation.silos, min_results=2))
    await slow.began.wait()  # round 1 is under way without west
    back = FakeWorker()
    federation.start_silo("west", back)
    await watch.until(connected("west"))
    assert back.orders == []
    gate.set()
    first = (await watch.until(closed(1))).round_closed
    second = (await watch.until(closed(2))).round_closed
    assert contributors(first) == ["north", "south"]
    assert absences(first) == {"west": "not connected"}
    assert contributors(second) == ["north", "south", "west"]
    await federation.finish("returning")


async def test_06_silos_are_listed_with_what_they_said_and_whether_they_are_here(federation: Federation) -> None:
    gate = asyncio.Event()
    working = FakeWorker(gate=gate)
    federation.start_coordinator()
    federation.start_silo("north", working)
    south = federation.start_silo("south", FakeWorker())
    watch = Watch(federation)
    for name in ("north", "south"):
        await Watch(federation).until(connected(name))
    await south.stop()
    await watch.until(gone("south"))
    await federation.create("listed", make_spec(1, ("north",)))
    await working.began.wait()
    async with federation.admin() as stub:
        silos = (await stub.ListSilos(pb.ListSilosRequest())).silos
        page = await stub.ListSilos(pb.ListSilosRequest(page_size=1))
        rest = await stub.ListSilos(pb.ListSilosRequest(page_size=1, page_token=page.next_page_token))
    gate.set()
    await federation.finish("listed")
    assert [(s.silo_id, s.connected, list(s.open_task_ids)) for s in silos] == [
        ("north", True, ["listed/1/train/north"]),
        ("south", False, []),
    ]
    assert silos[0].device == "cpu"
    assert list(silos[0].methods) == ["promptfl", "zeroshot"]
    assert [s.silo_id for s in (*page.silos, *rest.silos)] == ["north", "south"]
    assert rest.next_page_token == ""
