"""The failure matrix of the design, one row after the other: whatever breaks, the round and its bits are unharmed."""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO

import grpc
import numpy as np
import pytest

from coordinator import actions
from coordinator.active import ActiveExperiments
from coordinator.orchestrator import Orchestrator
from coordinator.store import Store
from fedrt.errors import ExitCode, IdentityError, StorageError
from fedrt.session.connection import MAX_OPEN_PAYLOADS
from fedrt.session.frames import HeldState
from fedrt.tensors import initial_tensors
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import experiment_pb2
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import task_pb2 as task_pb
from silo import departures
from silo.dialling import Dialling
from silo.link import Ended, Link
from silo.spool import Spool, Spooled
from silo.tensor_files import read_tensors
from silo.work import WorkOrder, WorkOutcome
from tests.fakes.federation import Federation, make_spec
from tests.fakes.proxy import Proxy
from tests.fakes.raw_silo import FINISHED, RawSilo, manifest, success
from tests.fakes.workers import FakeWorker, add_one
from tests.integration.conftest import Logs
from tests.integration.following import (
    State,
    Watch,
    absences,
    closed,
    connected,
    contributors,
    draining,
    gone,
)

ROUNDS = 4


def growing(order: WorkOrder) -> WorkOutcome:
    """`add_one`, with a private tensor that counts the accepted rounds."""
    done = add_one(order)
    own = order.private.get("own", np.zeros(1, np.float32)) + 1
    return WorkOutcome(done.shared, {"own": own}, done.example_count, {}, 0.0)


def expected(rounds: int = ROUNDS) -> bytes:
    spec = make_spec(rounds)
    value = initial_tensors(spec.local.tensors(), spec.seed)["context"]
    for _ in range(rounds):
        value = (value + np.float32(1)).astype(np.float32)
    return value.tobytes()


async def assert_undisturbed(federation: Federation, name: str, rounds: int = ROUNDS) -> list[pb.RoundClosed]:
    """The experiment ends as if nothing had happened, and every silo's private tensors advanced once per round."""
    experiment, history = await federation.finish(name)
    assert experiment.status_message == ""
    assert experiment.state == State.STATE_SUCCEEDED
    assert (await federation.export(name))["context"].tobytes() == expected(rounds)
    return history


def private_state(federation: Federation, silo: str, experiment: str) -> float:
    """Read beside the running silo: opening its vault would take a file it just writes for a leftover."""
    files = sorted((federation.directory / f"silo-{silo}" / "vault").glob(f"{experiment}-*/round-*.safetensors"))
    return float(read_tensors(files[-1])[0]["own"][0]) if files else 0.0


def spooled(federation: Federation, silo: str) -> list[Path]:
    return list((federation.directory / f"silo-{silo}" / "spool").iterdir())


def verdicts(logs: Logs, task_id: str) -> list[str]:
    return [entry["verdict"] for entry in logs if entry["event"] == "verdict" and entry["task"] == task_id]


async def until(condition: Callable[[], bool], limit: float = 40) -> None:
    """For what announces itself nowhere."""
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def behind_proxy(federation: Federation, name: str, worker: FakeWorker) -> AsyncIterator[Proxy]:
    """A silo whose network a test can cut."""
    async with Proxy(federation.port).started() as proxy:
        federation.dial_port = proxy.port
        federation.start_silo(name, worker)
        federation.dial_port = None
        await Watch(federation).until(connected(name))
        yield proxy
        await federation.running.pop(name).stop()


async def test_01_a_stream_that_drops_while_training_is_no_event_of_the_round(
    federation: Federation, logs: Logs
) -> None:
    trainee = FakeWorker(growing, gate=asyncio.Event())
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    async with behind_proxy(federation, "south", trainee) as proxy:
        await federation.create("dropped", make_spec(ROUNDS, ("north", "south")))
        await trainee.began.wait()
        watch = Watch(federation)
        proxy.cut()
        await watch.until(gone("south"))
        held = federation.running["south"].task
        proxy.mend()
        await watch.until(connected("south"))
        assert not held.done()
        trainee.gate.set()
        history = await assert_undisturbed(federation, "dropped")
    assert contributors(history[0]) == ["north", "south"]
    first = [order.task_id for order in trainee.orders].count("dropped/1/train/south")
    assert first == 1  # it trained on: the task was neither begun again nor offered again
    assert trainee.abandoned == []
    assert verdicts(logs, "dropped/1/train/south") == ["accepted"]
    assert private_state(federation, "south", "dropped") == ROUNDS


async def test_02_a_result_computed_while_offline_is_delivered_after_the_reconnect(federation: Federation) -> None:
    trainee = FakeWorker(growing, gate=asyncio.Event())
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    async with behind_proxy(federation, "south", trainee) as proxy:
        await federation.create("offline", make_spec(ROUNDS, ("north", "south")))
        await trainee.began.wait()
        proxy.cut()
        await Watch(federation).until(gone("south"))
        trainee.gate.set()
        await until(lambda: len(spooled(federation, "south")) == 1)
        proxy.mend()
        await assert_undisturbed(federation, "offline")
        await until(lambda: not spooled(federation, "south"))
    assert private_state(federation, "south", "offline") == ROUNDS


async def test_03_a_stream_that_drops_between_the_result_and_its_ack_makes_a_duplicate(
    federation: Federation, logs: Logs
) -> None:
    trainee = FakeWorker(growing, gate=asyncio.Event())
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    async with behind_proxy(federation, "south", trainee) as proxy:
        await federation.create("unheard", make_spec(ROUNDS, ("north", "south")))
        await trainee.began.wait()
        watch = Watch(federation)
        proxy.downstream.clear()  # south can still be heard, but hears nothing
        trainee.gate.set()
        await watch.until(closed(1))
        assert private_state(federation, "south", "unheard") == 0  # no verdict, no progress
        proxy.cut()
        await watch.until(gone("south"))
        proxy.mend()
        await assert_undisturbed(federation, "unheard")
    assert verdicts(logs, "unheard/1/train/south") == ["duplicate"]
    assert private_state(federation, "south", "unheard") == ROUNDS


async def test_04_a_coordinator_that_dies_between_storing_and_acking_settles_after_its_restart(
    federation: Federation, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, dropped, all_dropped = asyncio.Event(), [], asyncio.Event()
    workers = {name: FakeWorker(growing, gate=gate) for name in ("north", "south")}

    def die_before_acting(orchestrator: Orchestrator) -> None:
        dropped.extend(orchestrator._due)
        if len(dropped) >= 3:  # two verdicts and the aggregation
            all_dropped.set()

    coordinator = federation.start_coordinator()
    for name, worker in workers.items():
        federation.start_silo(name, worker)
        await Watch(federation).until(connected(name))
    await federation.create("unsettled", make_spec(ROUNDS, ("north", "south")))
    for worker in workers.values():
        await worker.began.wait()
    with monkeypatch.context() as dying:
        dying.setattr(Orchestrator, "_perform", die_before_acting)
        gate.set()
        await asyncio.wait_for(all_dropped.wait(), 10)
        await coordinator.kill()
    assert [private_state(federation, name, "unsettled") for name in workers] == [0, 0]
    federation.start_coordinator()
    await assert_undisturbed(federation, "unsettled")
    assert verdicts(logs, "unsettled/1/train/north") == ["duplicate"]
    await until(lambda: not spooled(federation, "north") and not spooled(federation, "south"))
    assert [private_state(federation, name, "unsettled") for name in workers] == [ROUNDS, ROUNDS]


async def test_05_a_coordinator_that_dies_in_the_middle_of_a_round_resumes_it(federation: Federation) -> None:
    gate = asyncio.Event()
    slow = FakeWorker(growing, gate=gate)
    coordinator = federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    federation.start_silo("south", slow)
    for name in ("north", "south"):
        await Watch(federation).until(connected(name))
    await federation.create("resumed", make_spec(ROUNDS, ("north", "south")))
    await slow.began.wait()
    await until(lambda: private_state(federation, "north", "resumed") == 1)  # north's result is in
    await coordinator.kill()
    federation.start_coordinator()
    await Watch(federation, 0).until(connected("south"))
    gate.set()
    history = await assert_undisturbed(federation, "resumed")
    assert [contributors(r) for r in history[:ROUNDS]] == [["north", "south"]] * ROUNDS
    assert [order.task_id for order in slow.orders].count("resumed/1/train/south") == 1
    assert [private_state(federation, name, "resumed") for name in ("north", "south")] == [ROUNDS, ROUNDS]


async def test_06_a_coordinator_that_dies_again_and_again_ends_with_the_same_bits(federation: Federation) -> None:
    coordinator = federation.start_coordinator()
    for name in federation.silos:
        federation.start_silo(name, FakeWorker(growing))
    for name in federation.silos:
        await Watch(federation).until(connected(name))
    await federation.create("battered", make_spec(12, federation.silos, every=4))
    for number in (1, 3, 4, 8, 11):
        await Watch(federation).until(closed(number))
        await coordinator.kill()
        coordinator = federation.start_coordinator()
    await assert_undisturbed(federation, "battered", 12)
    assert [private_state(federation, name, "battered") for name in federation.silos] == [12, 12, 12]


async def test_07_a_coordinator_that_dies_while_aggregating_aggregates_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def stuck(*arguments: Any) -> Any:
        entered.set()
        leave.wait(10)
        raise ArithmeticError("the process this belongs to is dead")

    coordinator = federation.start_coordinator()
    workers = {name: FakeWorker(growing) for name in federation.silos}
    for name, worker in workers.items():
        federation.start_silo(name, worker)
        await Watch(federation).until(connected(name))
    with monkeypatch.context() as patch:
        patch.setattr(actions, "combine", stuck)
        await federation.create("aggregated", make_spec(ROUNDS, federation.silos))
        await asyncio.to_thread(entered.wait, 10)
        await coordinator.kill()
        leave.set()
    federation.start_coordinator()
    await assert_undisturbed(federation, "aggregated")
    for worker in workers.values():
        assert [order.task_id for order in worker.orders].count(worker.orders[0].task_id) == 1  # nobody trains again


async def test_08_a_silo_that_dies_while_training_is_offered_the_same_task_again(federation: Federation) -> None:
    victim = FakeWorker(growing)
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    daemon = federation.start_silo("south", victim)
    gate = asyncio.Event()
    gate.set()
    victim.gate = gate
    honest = victim.behave

    def stop_after_the_first(order: WorkOrder) -> WorkOutcome:
        gate.clear()
        return honest(order)

    victim.behave = stop_after_the_first
    await federation.create("reborn", make_spec(ROUNDS, ("north", "south")))
    await Watch(federation).until(closed(1))
    await until(lambda: len(victim.orders) == 2)
    await daemon.kill()
    assert victim.abandoned == ["reborn/2/train/south"]
    heir = FakeWorker(growing)
    federation.start_silo("south", heir)
    await assert_undisturbed(federation, "reborn")
    assert heir.orders[0].task_id == "reborn/2/train/south"
    assert heir.orders[0].seed == victim.orders[1].seed
    assert float(heir.orders[0].private["own"][0]) == 1  # that of the last accepted round
    assert private_state(federation, "south", "reborn") == ROUNDS


async def test_09_a_silo_that_dies_with_an_undelivered_result_delivers_it_after_its_restart(
    federation: Federation,
) -> None:
    trainee = FakeWorker(growing, gate=asyncio.Event())
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    async with Proxy(federation.port).started() as proxy:
        federation.dial_port = proxy.port
        daemon = federation.start_silo("south", trainee)
        await federation.create("inherited", make_spec(ROUNDS, ("north", "south")))
        await trainee.began.wait()
        proxy.cut()
        trainee.gate.set()
        await until(lambda: len(spooled(federation, "south")) == 1)
        await daemon.kill()
        proxy.mend()
        heir = FakeWorker(growing)
        federation.start_silo("south", heir)
        await assert_undisturbed(federation, "inherited")
        await federation.running.pop("south").stop()
    assert heir.orders[0].task_id == "inherited/2/train/south"
    assert private_state(federation, "south", "inherited") == ROUNDS


async def test_10_a_result_after_the_deadline_is_late_and_the_silo_drops_it(federation: Federation, logs: Logs) -> None:
    late = FakeWorker(growing, gate=asyncio.Event())
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    async with behind_proxy(federation, "south", late) as proxy:
        await federation.create("punctual", make_spec(1, ("north", "south"), min_results=1, time_limit=0.4))
        await late.began.wait()
        proxy.cut()
        late.gate.set()
        first = (await Watch(federation).until(closed(1))).round_closed
        await until(lambda: len(spooled(federation, "south")) == 1)
        proxy.mend()
        await until(lambda: bool(verdicts(logs, "punctual/1/train/south")))
        await until(lambda: not spooled(federation, "south"))
        experiment, _ = await federation.finish("punctual")
    assert contributors(first) == ["north"]
    assert absences(first) == {"south": "no result within the time limit; not connected"}
    assert experiment.state == State.STATE_SUCCEEDED
    assert verdicts(logs, "punctual/1/train/south") == ["late"]
    assert private_state(federation, "south", "punctual") == 0
    assert private_state(federation, "north", "punctual") == 1


async def test_11_a_silo_at_work_when_the_deadline_passes_is_stopped(federation: Federation) -> None:
    slow = FakeWorker(growing, gate=asyncio.Event())
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    federation.start_silo("south", slow)
    await federation.create("stopped", make_spec(1, ("north", "south"), min_results=1, time_limit=0.4))
    first = (await Watch(federation).until(closed(1))).round_closed
    assert absences(first) == {"south": "no result within the time limit"}
    await until(lambda: slow.abandoned == ["stopped/1/train/south"])
    slow.gate.set()
    await federation.finish("stopped")
    await until(lambda: not spooled(federation, "south"))
    assert private_state(federation, "south", "stopped") == 0


async def test_12_of_two_daemons_with_one_identity_the_newer_stays(federation: Federation) -> None:
    federation.start_coordinator()
    older = federation.start_silo("north", FakeWorker())
    watch = Watch(federation)
    await watch.until(connected("north"))
    federation.running.pop("north")
    worker = FakeWorker()
    newer = federation.start_silo("double", worker, identity=federation.directory / "certs/silos/north")
    await watch.until(connected("north"))
    with pytest.raises(IdentityError, match="another daemon runs with this silo's identity; stop one of the two") as e:
        await asyncio.wait_for(older.task, 10)
    assert e.value.exit_code is ExitCode.IDENTITY_REFUSED
    await federation.create("newer", make_spec(1, ("north",)))
    experiment, _ = await federation.finish("newer")
    assert experiment.state == State.STATE_SUCCEEDED
    assert not newer.task.done()
    assert len(worker.orders) == 2


async def test_13_nothing_is_acknowledged_while_the_coordinators_disk_is_full(
    federation: Federation, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, refused = threading.Event(), threading.Event()
    commit = Store.commit

    def fragile(store: Store, changes: Any) -> None:
        if full.is_set():
            refused.set()
            raise StorageError("cannot write the coordinator's store: database or disk is full; check free space")
        commit(store, changes)

    monkeypatch.setattr(Store, "commit", fragile)
    monkeypatch.setattr("coordinator.orchestrator.RETRY_COMMIT_DELAY", 0.02)
    coordinator = federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        await Watch(federation).until(connected("north"))
        await federation.create("crowded", make_spec(ROUNDS, ("north", "south")))
        offer = await raw.next("task_offer")
        await raw.accept(offer)
        await until(lambda: private_state(federation, "north", "crowded") == 1)
        full.set()
        described, data = manifest(offer.task_id, {"context": np.ones((16, 512), np.float32)})
        await raw.result(success(offer.task_id, described), data)
        assert await asyncio.to_thread(refused.wait, 10)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await raw.frames.get()  # no verdict, no next offer
        assert not coordinator.task.done()
        full.clear()
        assert (await raw.next("result_ack")).verdict == task_pb.RESULT_VERDICT_ACCEPTED
        for _ in range(ROUNDS):  # three more rounds and the evaluation
            await raw.work_honestly()
        await assert_undisturbed(federation, "crowded")
    complaints = [entry for entry in logs if entry["event"] == "nothing is acknowledged until the disk accepts writes"]
    assert len(complaints) == 1  # as long as the reason is the same
    assert "disk is full" in complaints[0]["reason"]
    assert "the disk accepts writes again" in [entry["event"] for entry in logs]


async def test_14_nothing_is_sent_while_a_silos_disk_is_full(
    federation: Federation, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = 3
    put = Spool.put

    def fragile(self: Spool, result: Spooled) -> Any:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise StorageError("cannot write: the disk is full; free space and try again")
        return put(self, result)

    monkeypatch.setattr(Spool, "put", fragile)
    monkeypatch.setattr("silo.stores.DISK_RETRY_DELAY", 0.02)
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    await federation.create("cramped", make_spec(ROUNDS, ("north",)))
    await assert_undisturbed(federation, "cramped")
    complaints = [entry for entry in logs if entry["event"] == "nothing is sent until the disk accepts writes"]
    assert len(complaints) == 1  # as long as the reason is the same
    await until(lambda: private_state(federation, "north", "cramped") == ROUNDS)


async def test_15_a_full_disk_under_the_record_of_departures_does_not_end_the_silo(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, refusals = departures.append, 3

    def fragile(file: BinaryIO, line: bytes) -> None:
        nonlocal refusals
        if b"TaskResult" in line and refusals:
            refusals -= 1
            raise OSError(28, "No space left on device")
        append(file, line)

    monkeypatch.setattr(departures, "append", fragile)
    federation.start_coordinator()
    silo = federation.start_silo("north", FakeWorker(growing))
    await federation.create("unrecorded", make_spec(ROUNDS, ("north",)))
    finished = asyncio.create_task(assert_undisturbed(federation, "unrecorded"))
    await asyncio.wait({finished, silo.task}, return_when=asyncio.FIRST_COMPLETED)
    if silo.task.done():
        finished.cancel()
        federation.running.pop("north")
        silo.task.result()
    await finished
    assert refusals == 0
    written = (federation.directory / "silo-north" / "departures.jsonl").read_text()
    assert written.count('"TaskResult"') == ROUNDS + 1  # all, also those that the disk refused first


async def test_16_a_silo_that_is_stopped_finishes_delivers_and_leaves(federation: Federation, logs: Logs) -> None:
    last = FakeWorker(growing, gate=asyncio.Event())
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(growing))
    leaving = federation.start_silo("south", last)
    await federation.create("farewell", make_spec(2, ("north", "south"), min_results=1))
    await last.began.wait()
    watch = Watch(federation)
    federation.running.pop("south")
    leaving.lifecycle.stopping.set()
    await watch.until(draining("south"))
    assert not leaving.task.done()
    last.gate.set()
    await asyncio.wait_for(leaving.task, 10)
    await watch.until(gone("south"))
    experiment, rounds = await federation.finish("farewell")
    assert experiment.state == State.STATE_SUCCEEDED
    if contributors(rounds[0]) == ["north", "south"]:  # both were there when the round began
        assert verdicts(logs, "farewell/1/train/south") == ["accepted"]
        assert absences(rounds[1]) == {"south": "not connected"}
        assert private_state(federation, "south", "farewell") == 1
    assert spooled(federation, "south") == []
    assert len(last.orders) == 1


async def test_17_silos_outlive_a_coordinator_that_is_stopped_and_find_the_next_one(federation: Federation) -> None:
    gate = asyncio.Event()
    workers = {name: FakeWorker(growing, gate=gate) for name in federation.silos}
    coordinator = federation.start_coordinator()
    for name, worker in workers.items():
        federation.start_silo(name, worker)
    await federation.create("handed-over", make_spec(ROUNDS, federation.silos))
    for worker in workers.values():
        await worker.began.wait()
    started = asyncio.get_running_loop().time()
    await coordinator.stop()
    assert asyncio.get_running_loop().time() - started < 3  # it does not wait out its grace of 5 s
    federation.start_coordinator()
    for name in federation.silos:
        await Watch(federation).until(connected(name))
    gate.set()
    await assert_undisturbed(federation, "handed-over")
    assert all(not worker.abandoned for worker in workers.values())
    assert all(len(worker.orders) == ROUNDS + 1 for worker in workers.values())


async def test_18_a_silo_that_comes_back_during_the_drain_does_not_hold_up_the_coordinators_end(
    federation: Federation,
) -> None:
    coordinator = federation.start_coordinator("silence_limit: 1h\n")
    federation.start_silo("north", FakeWorker())
    await Watch(federation).until(connected("north"))
    large = make_spec(1, ("south",), hyperparameters='{"context_length": 16384}')  # 32 MiB: more than the pipe holds
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        await federation.create("large", large)
        offer = await raw.next("task_offer")
        await raw.send(task_reply=task_pb.TaskReply(task_id=offer.task_id, acceptance=task_pb.TaskAcceptance()))
        await raw.next("payload_chunk")  # the coordinator has begun to send: it cannot end before this silo reads on
        raw.listens.clear()
        watch = Watch(federation)
        coordinator.lifecycle.stopping.set()
        await watch.until(gone("north"))
        with contextlib.suppress(TimeoutError):
            await watch.until(connected("north"), limit=1)  # it may be let in again, or not
    federation.running.pop("coordinator")
    await asyncio.wait_for(coordinator.task, 2)  # the grace is 5 s, but nothing is left to wait for


async def test_19_a_reconnecting_silo_says_what_it_holds(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[tuple[str, HeldState]]] = []
    obsolete = ActiveExperiments.obsolete

    def listening(self: ActiveExperiments, silo_id: str, held: Any) -> Any:
        said.append([(task.task_id, task.state) for task in held])
        return obsolete(self, silo_id, held)

    monkeypatch.setattr(ActiveExperiments, "obsolete", listening)
    trainee = FakeWorker(growing, gate=asyncio.Event())
    federation.start_coordinator()
    async with behind_proxy(federation, "south", trainee) as proxy:
        await federation.create("held", make_spec(1, ("south",)))
        await trainee.began.wait()
        for state in (HeldState.RUNNING, HeldState.FINISHED):
            watch = Watch(federation)
            proxy.cut()
            await watch.until(gone("south"))
            if state is HeldState.FINISHED:
                trainee.gate.set()
                await until(lambda: len(spooled(federation, "south")) == 1)
            proxy.mend()
            await until(lambda: ("held/1/train/south", state) in said[-1])  # noqa: B023
        await assert_undisturbed(federation, "held", 1)
    assert said[0] == []


async def test_20_a_running_task_of_a_cancelled_experiment_is_dropped_at_the_reconnect(federation: Federation) -> None:
    trainee = FakeWorker(growing, gate=asyncio.Event())
    federation.start_coordinator()
    async with behind_proxy(federation, "south", trainee) as proxy:
        await federation.create("moot", make_spec(1, ("south",)))
        await trainee.began.wait()
        proxy.cut()
        await Watch(federation).until(gone("south"))
        async with federation.admin() as stub:
            await stub.CancelExperiment(pb.CancelExperimentRequest(experiment_id="moot"))
        proxy.mend()
        await until(lambda: trainee.abandoned == ["moot/1/train/south"])
    assert spooled(federation, "south") == []


async def test_21_a_duplicate_of_a_finished_result_is_told_apart_from_an_unknown_one(federation: Federation) -> None:
    federation.start_coordinator()
    identity = federation.directory / "certs/silos/south"
    async with RawSilo(federation.port, identity) as raw:
        await raw.hello()
        await federation.create("twice", make_spec(1, ("south",)))
        task_id = await raw.work_honestly()
    async with RawSilo(federation.port, identity) as raw:
        await raw.hello({task_id: FINISHED, "twice/9/train/south": FINISHED})
        described, data = manifest(task_id, {"context": np.ones((16, 512), np.float32)})
        await raw.result(success(task_id, described), data)
        assert (await raw.next("result_ack")).verdict == task_pb.RESULT_VERDICT_DUPLICATE
        described, data = manifest("twice/9/train/south", {"context": np.ones((16, 512), np.float32)})
        await raw.result(success("twice/9/train/south", described), data)
        ack = await raw.next("result_ack")
        assert (ack.verdict, ack.message) == (
            task_pb.RESULT_VERDICT_UNKNOWN_TASK,
            "no such task was offered to this silo",
        )
        await raw.work_honestly()  # the evaluation
    assert (await federation.finish("twice"))[0].state == State.STATE_SUCCEEDED


async def test_25_a_damaged_record_of_an_ended_experiment_ends_neither_the_coordinator_nor_the_result(
    federation: Federation, logs: Logs
) -> None:
    federation.start_coordinator()
    identity = federation.directory / "certs/silos/south"
    async with RawSilo(federation.port, identity) as raw:
        await raw.hello()
        await federation.create("old", make_spec(1, ("south",)))
        task_id = await raw.work_honestly()
        await raw.work_honestly()
        await federation.finish("old")
    with contextlib.closing(sqlite3.connect(federation.directory / "coordinator/coordinator.db")) as database:
        database.execute("UPDATE tasks SET document = 'damaged' WHERE task_id = ?", (task_id,))
        database.commit()
    async with RawSilo(federation.port, identity) as raw:
        await raw.hello({task_id: FINISHED})
        described, data = manifest(task_id, {"context": np.ones((16, 512), np.float32)})
        await raw.result(success(task_id, described), data)
        await until(lambda: any(entry["event"] == "a result stays unanswered" for entry in logs))
        await federation.create("new", make_spec(1, ("south",)))
        assert await raw.work_honestly() == "new/1/train/south"
        await raw.work_honestly()
        assert not [message for message in raw.kept if message.WhichOneof("frame") == "result_ack"]
    assert (await federation.finish("new"))[0].state == State.STATE_SUCCEEDED


async def test_22_a_stream_that_ends_while_the_silo_is_about_to_write_is_a_lost_session(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = grpc.aio._call.StreamStreamCall
    write, dead = calls.write, ["once"]

    async def write_late(call: Any, message: Any) -> None:
        if dead and isinstance(message, session_pb.OpenSessionRequest) and message.HasField("task_result"):
            dead.clear()
            raise asyncio.InvalidStateError("RPC already finished.")  # as grpc.aio says it
        await write(call, message)

    monkeypatch.setattr(calls, "write", write_late)
    federation.start_coordinator()
    silo = federation.start_silo("north", FakeWorker(growing))
    await federation.create("late", make_spec(ROUNDS, ("north",)))
    finished = asyncio.create_task(assert_undisturbed(federation, "late"))
    await asyncio.wait({finished, silo.task}, return_when=asyncio.FIRST_COMPLETED)
    if silo.task.done():
        finished.cancel()
        federation.running.pop("north")
        silo.task.result()
    await finished
    assert not dead


async def test_23_an_outage_of_any_length_does_not_end_a_silo(monkeypatch: pytest.MonkeyPatch) -> None:
    link, dials = object.__new__(Link), 0
    dialling = Dialling("localhost:1", None, None, None, initial_delay=1e-9, max_delay=2e-9)  # type: ignore[arg-type]
    link.__init__(dialling, None, None, None, None)  # type: ignore[misc]

    async def unanswered(first: bool) -> Ended:
        nonlocal dials
        dials += 1
        if dials == 3000:
            link.finish()
        return Ended.UNANSWERED

    monkeypatch.setattr(link, "_one_session", unanswered)
    await asyncio.wait_for(link.run(), 20)
    assert dials == 3000


async def test_24_more_experiments_than_a_session_has_payloads_are_served_one_after_the_other(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.rounds.REOFFER_DELAY", 0.1)  # a silo holds 16 tasks and is busy beyond
    names = [f"e{number}" for number in range(MAX_OPEN_PAYLOADS + 2)]
    federation.start_coordinator()
    for name in names:
        await federation.create(name, make_spec(1, ("north",)))
    federation.start_silo("north", FakeWorker(growing))
    for name in names:
        experiment, _ = await federation.finish(name)
        assert experiment.state == experiment_pb2.Experiment.STATE_SUCCEEDED
