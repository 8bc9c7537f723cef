"""Slow, failing and absent silos: nobody's work is thrown away, nobody is waited for in vain, everybody is named."""

import asyncio
import time

import numpy as np
import pytest

from coordinator.clock import SteadyClock
from fedrt.ctl_view import event_line
from fedrt.errors import FailureReason, WorkError
from fedrt.spec import OnTooFew
from fedrt.tensors import initial_tensors
from silo.work import WorkOrder, WorkOutcome
from tests.fakes.federation import Federation, make_spec
from tests.fakes.proxy import Proxy
from tests.fakes.workers import FakeWorker, add_one
from tests.integration.conftest import Logs
from tests.integration.following import TRAIN, State, Watch, absences, closed, connected, contributors, gone


def expected(rounds: int) -> bytes:
    """The shared tensors after so many deltas of ones."""
    spec = make_spec(rounds)
    value = initial_tensors(spec.local.tensors(), spec.seed)["context"]
    for _ in range(rounds):
        value = (value + np.float32(1)).astype(np.float32)
    return value.tobytes()


def failing_first(times: int) -> FakeWorker:
    """A worker that fails so many tasks and then works."""
    left = [times]

    def behave(order: WorkOrder) -> WorkOutcome:
        left[0] -= 1
        if left[0] >= 0:
            raise WorkError(FailureReason.DATA_UNAVAILABLE, "the data are not mounted")
        return add_one(order)

    return FakeWorker(behave)


async def start(federation: Federation, **workers: FakeWorker) -> None:
    federation.start_coordinator()
    for name, worker in workers.items():
        federation.start_silo(name, worker)
        await Watch(federation).until(connected(name))


async def test_01_the_failure_of_one_silo_stops_nobody_else(federation: Federation) -> None:
    busy, broken = FakeWorker(gate=asyncio.Event()), failing_first(1)
    await start(federation, north=busy, south=broken)
    await federation.create("patient", make_spec(1, ("north", "south"), retries=1))
    failed = (await Watch(federation).until(closed(1))).round_closed
    assert not failed.succeeded
    assert "the data are not mounted" in absences(failed)["south"]
    async with asyncio.timeout(40):
        while len(broken.orders) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert busy.gate is not None
    busy.gate.set()
    experiment, rounds = await federation.finish("patient")
    assert experiment.state == State.STATE_SUCCEEDED
    assert contributors(rounds[1]) == ["north", "south"]
    assert (busy.abandoned, len([order for order in busy.orders if order.round_number == 1])) == ([], 2)  # and evaluate
    assert (await federation.export("patient"))["context"].tobytes() == expected(1)


async def test_02_an_outage_beyond_the_time_limit_costs_neither_a_retry_nor_the_work(federation: Federation) -> None:
    slow = FakeWorker(gate=asyncio.Event())
    assert slow.gate is not None
    async with Proxy(federation.port).started() as proxy:
        await start(federation, north=FakeWorker())
        federation.dial_port = proxy.port
        federation.start_silo("south", slow)
        await Watch(federation).until(connected("south"))
        await federation.create("tunnel", make_spec(1, ("north", "south"), time_limit=2.0, retries=1))
        await slow.began.wait()
        watch = Watch(federation)
        proxy.cut()
        slow.gate.set()
        await watch.until(gone("south"))
        for _ in range(2):
            missed = (await watch.until(closed(1))).round_closed
            assert not missed.succeeded
            assert absences(missed) == {"south": "no result within the time limit; not connected"}
        proxy.mend()
        experiment, rounds = await federation.finish("tunnel")
        await federation.running.pop("south").stop()
    assert experiment.state == State.STATE_SUCCEEDED
    assert experiment.status_message == ""
    assert contributors(next(r for r in rounds if r.succeeded)) == ["north", "south"]
    assert (await federation.export("tunnel"))["context"].tobytes() == expected(1)
    assert [order.task_id for order in slow.orders] == ["tunnel/1/train/south", "tunnel/1/evaluate/south"]


async def test_03_a_coordinator_that_was_down_beyond_the_time_limit_calls_nobody_late(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = FakeWorker(gate=asyncio.Event())
    assert slow.gate is not None
    await start(federation, north=FakeWorker(), south=slow)
    await federation.create("asleep", make_spec(1, ("north", "south"), time_limit=60.0, on_too_few=OnTooFew.FAIL))
    await slow.began.wait()
    await federation.running.pop("coordinator").kill()
    slow.gate.set()
    tomorrow = SteadyClock(wall=lambda: time.time() + 86_400.0)
    monkeypatch.setattr("coordinator.orchestrator.SteadyClock", lambda: tomorrow)
    federation.start_coordinator()
    experiment, rounds = await federation.finish("asleep")
    assert experiment.state == State.STATE_SUCCEEDED, experiment.status_message
    assert contributors(rounds[0]) == ["north", "south"]


async def test_04_more_silos_train_than_are_waited_for(federation: Federation, logs: Logs) -> None:
    slow = FakeWorker(gate=asyncio.Event())
    await start(federation, north=FakeWorker(), south=FakeWorker(), west=slow)
    spec = make_spec(1, federation.silos, max_silos=2, over_selection=1)
    await federation.create("brisk", spec)
    first = (await Watch(federation).until(closed(1))).round_closed
    assert contributors(first) == ["north", "south"]
    assert absences(first) == {"west": "the round had enough results without it"}
    async with asyncio.timeout(40):
        while not slow.abandoned:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert slow.gate is not None
    slow.gate.set()
    experiment, _ = await federation.finish("brisk")
    assert experiment.state == State.STATE_SUCCEEDED
    assert experiment.status_message == (
        "missing in training rounds: west in 1 of 1 (last: the round had enough results without it)"
    )


async def test_05_a_silo_that_fails_repeatedly_is_set_aside_and_the_operator_is_told(
    federation: Federation, logs: Logs
) -> None:
    await start(federation, north=FakeWorker(), south=FakeWorker(), west=failing_first(2))
    rules = {"min_results": 2, "set_aside_after": 2, "set_aside_rounds": 2}
    await federation.create("rested", make_spec(5, federation.silos, **rules))
    event = await Watch(federation).until(lambda event: event.HasField("silo_set_aside"))
    failure = "failed (data_unavailable): the data are not mounted"
    assert event_line(event) == f"west is set aside until round 5: it failed 2 times in a row, last: {failure}"
    experiment, rounds = await federation.finish("rested")
    assert experiment.state == State.STATE_SUCCEEDED
    trained = [round_ for round_ in rounds if round_.task_kind == TRAIN]
    assert [contributors(round_) for round_ in trained] == [
        ["north", "south"],
        ["north", "south"],
        ["north", "south"],
        ["north", "south"],
        ["north", "south", "west"],
    ]
    assert absences(trained[2])["west"].startswith("set aside until round 5 after repeated failures, last: failed")
    assert [entry["silo"] for entry in logs if entry["event"] == "silo set aside"] == ["west"]


async def test_06_setting_the_clock_by_a_day_ends_no_round(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = [0.0]
    monkeypatch.setattr(
        "coordinator.orchestrator.SteadyClock", lambda: SteadyClock(wall=lambda: time.time() + ahead[0])
    )
    slow = FakeWorker(gate=asyncio.Event())
    assert slow.gate is not None
    await start(federation, north=FakeWorker(), south=slow)
    await federation.create("jumping", make_spec(2, ("north", "south"), time_limit=60.0, retries=0))
    for ahead[0] in (86_400.0, -86_400.0):
        await slow.began.wait()
        slow.began.clear()
        slow.gate.set()
    experiment, rounds = await federation.finish("jumping")
    assert experiment.state == State.STATE_SUCCEEDED
    assert all(round_.succeeded for round_ in rounds)
    assert (await federation.export("jumping"))["context"].tobytes() == expected(2)
