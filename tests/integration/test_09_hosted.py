"""Many virtual silos in one host: to the coordinator they are daemons, and what befalls one spares the others."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
import structlog

from certs.throwaway import Plan, prepare
from fedrt.errors import ExitCode, IdentityError
from fedrt.tensors import initial_tensors
from fedrt.v1 import admin_service_pb2 as pb
from silo.host import crew
from tests.cli.processes import managed
from tests.fakes.federation import make_spec
from tests.fakes.proxy import Proxy
from tests.fakes.workers import FakeWorker
from tests.integration.conftest import Logs
from tests.integration.following import State, Watch, absences, connected, contributors
from tests.silo.host.hosted import HostedFederation, Reins, command, names, with_child

ROUNDS = 4
ONE, TWO, THREE = names(3)


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Logs]:
    """Everything that was logged, with the silo that each line is about."""
    monkeypatch.setattr("coordinator.app.configure_logging", lambda *settings: None)
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as entries:
        yield entries


@pytest.fixture
async def federation(tmp_path: Path, logs: Logs) -> AsyncIterator[HostedFederation]:
    built = HostedFederation(tmp_path)
    yield built
    await built.stop()


@pytest.fixture
def reins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reins:
    directory = tmp_path / "child"
    directory.mkdir()
    monkeypatch.setenv("FEDRT_TEST_CHILD", str(directory))
    return Reins(directory)


async def start(federation: HostedFederation) -> None:
    federation.start_coordinator()
    federation.start_host(with_child)
    await federation.ready()


async def cancel(federation: HostedFederation, experiment: str) -> None:
    async with federation.admin() as stub:
        await stub.CancelExperiment(pb.CancelExperimentRequest(experiment_id=experiment))


async def until(condition: Callable[[], bool], limit: float = 20) -> None:
    """For what announces itself nowhere."""
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def until_waiting(federation: HostedFederation, logs: Logs, *tasks: str) -> None:
    """Until these orders have been given to the worker, whoever's turn it is."""
    await until(lambda: set(tasks) <= {entry.get("task") for entry in logs if entry["event"] == "work begins"})
    await asyncio.sleep(0.1)  # from there to the queue it is a file to read


def after(rounds: int) -> bytes:
    spec = make_spec(rounds)
    value = initial_tensors(spec.local.tensors(), spec.seed)["context"]
    for _ in range(rounds):
        value = (value + np.float32(1)).astype(np.float32)
    return value.tobytes()


async def assert_undisturbed(federation: HostedFederation, name: str, rounds: int = ROUNDS) -> list[pb.RoundClosed]:
    """It ends with the bits of an undisturbed one, and every silo's private tensors advanced once per round."""
    experiment, history = await federation.finish(name)
    assert (experiment.state, experiment.status_message) == (State.STATE_SUCCEEDED, "")
    assert (await federation.export(name))["context"].tobytes() == after(rounds)
    return history


async def test_01_twenty_virtual_silos_train_evaluate_and_keep_their_own_records(tmp_path: Path, logs: Logs) -> None:
    silos = names(20)
    federation = HostedFederation(tmp_path, silos)
    try:
        await start(federation)
        assert federation.told is not None
        assert federation.told.statuses[:2] == ["dealing the data out", "loading the model"]
        assert federation.told.statuses[-1] == f"ready: 20 of 20 silos connected to localhost:{federation.port}"
        await federation.create("twenty", make_spec(ROUNDS, every=2))
        history = await assert_undisturbed(federation, "twenty")
    finally:
        await federation.stop()
    assert all(contributors(closed) == list(silos) for closed in history)
    assert len(history) == ROUNDS + 3
    for name in silos:
        assert federation.own(name, "twenty") == ROUNDS
        assert federation.spooled(name) == []
        sent = (federation.silo_directory(name) / "departures.jsonl").read_text()
        left = [json.loads(line) for line in sent.splitlines()]
        assert {entry["task"].rpartition("/")[2] for entry in left if entry["message"] == "TaskResult"} == {name}
        assert '"own"' not in sent
    shown = {entry["silo"]: entry["train_count"] for entry in logs if entry["event"] == "virtual silo"}
    assert shown == dict.fromkeys(silos, 2)
    begun = [entry for entry in logs if entry["event"] == "work begins"]
    assert all(entry["task"].endswith(entry["silo"]) for entry in begun)
    assert len(begun) == 20 * len(history)


async def test_02_cancelling_an_order_that_waits_its_turn_leaves_the_child_at_the_others_order(
    federation: HostedFederation, reins: Reins, logs: Logs
) -> None:
    await start(federation)
    reins.hold(ONE)
    await federation.create("works", make_spec(1, (ONE,)))
    child = await reins.until_begun(f"works/1/train/{ONE}")
    await federation.create("waits", make_spec(1, (TWO,)))
    await until_waiting(federation, logs, f"waits/1/train/{TWO}")
    await cancel(federation, "waits")
    experiment, _ = await federation.finish("waits")
    assert experiment.state == State.STATE_CANCELLED
    await federation.create("queues", make_spec(1, (THREE,)))
    reins.release(ONE)
    await assert_undisturbed(federation, "works", 1)
    await assert_undisturbed(federation, "queues", 1)
    assert {line["pid"] for line in reins.begun()} == {child}
    assert TWO not in {line["silo"] for line in reins.begun()}


async def test_03_cancelling_the_order_under_way_gives_the_next_one_a_fresh_child(
    federation: HostedFederation, reins: Reins, logs: Logs
) -> None:
    await start(federation)
    reins.hold(ONE)
    await federation.create("works", make_spec(1, (ONE,)))
    child = await reins.until_begun(f"works/1/train/{ONE}")
    await federation.create("waits", make_spec(1, (TWO, THREE)))
    await until_waiting(federation, logs, f"waits/1/train/{TWO}", f"waits/1/train/{THREE}")
    await cancel(federation, "works")
    await assert_undisturbed(federation, "waits", 1)
    pids = {line["silo"]: line["pid"] for line in reins.begun()}
    assert pids[ONE] == child
    assert pids[TWO] == pids[THREE] != child
    assert not psutil.pid_exists(child)
    tasks = [line["task"] for line in reins.begun()]
    assert len(tasks) == len(set(tasks))  # those that waited were not begun twice


async def test_04_the_childs_death_fails_the_order_under_way_and_no_other(
    federation: HostedFederation, reins: Reins, logs: Logs
) -> None:
    await start(federation)
    reins.hold(*names(3))
    await federation.create("mourned", make_spec(1, federation.silos, min_results=2))
    await until_waiting(federation, logs, *(f"mourned/1/train/{name}" for name in federation.silos))
    await until(lambda: bool(reins.begun()))
    victim, child = str(reins.begun()[0]["silo"]), int(str(reins.begun()[0]["pid"]))
    reins.release(*(set(federation.silos) - {victim}))
    os.kill(child, signal.SIGKILL)
    reins.release(victim)
    experiment, (trained, evaluated) = await federation.finish("mourned")
    assert experiment.state == State.STATE_SUCCEEDED
    assert set(contributors(trained)) == set(federation.silos) - {victim}
    (reason,) = absences(trained).items()
    assert reason[0] == victim
    assert "killed by signal 9" in reason[1]
    assert contributors(evaluated) == list(federation.silos)
    assert federation.own(victim, "mourned") == 0
    failed = [entry for entry in logs if entry["event"] == "work failed"]
    assert [entry["silo"] for entry in failed] == [victim]
    children = [entry for entry in logs if entry["event"] == "worker"]
    assert all("silo" not in entry for entry in children)  # the fresh child speaks for all


async def test_05_orders_are_done_in_the_order_in_which_they_came(
    federation: HostedFederation, reins: Reins, logs: Logs
) -> None:
    await start(federation)
    reins.hold(THREE)
    await federation.create("first", make_spec(1, (THREE,)))
    await reins.until_begun(f"first/1/train/{THREE}")
    for name in (TWO, ONE):
        await federation.create(f"then-{name}", make_spec(1, (name,)))
        await until_waiting(federation, logs, f"then-{name}/1/train/{name}")
    reins.release(THREE)
    for name in (TWO, ONE):
        await federation.finish(f"then-{name}")
    begun = [line["silo"] for line in reins.begun() if "/train/" in str(line["task"])]
    assert begun == [THREE, TWO, ONE]


async def test_06_the_time_limit_of_an_order_runs_while_it_waits(
    federation: HostedFederation, reins: Reins, logs: Logs
) -> None:
    await start(federation)
    reins.hold(ONE)
    await federation.create("works", make_spec(1, (ONE,)))
    child = await reins.until_begun(f"works/1/train/{ONE}")
    await federation.create("hurries", make_spec(1, (TWO, THREE), min_results=1, time_limit=0.5, retries=0))
    experiment, _ = await federation.finish("hurries")
    assert experiment.state == State.STATE_FAILED
    reins.release(ONE)
    await assert_undisturbed(federation, "works", 1)
    assert {(line["silo"], line["pid"]) for line in reins.begun()} == {(ONE, child)}


async def test_07_a_silo_that_is_refused_ends_alone(federation: HostedFederation, logs: Logs) -> None:
    federation.start_coordinator()
    host = federation.start_host()
    await federation.ready()
    assert federation.told is not None
    federation.start_silo("rival", FakeWorker(), identity=federation.directory / "certs/silos" / TWO)
    await until(lambda: federation.told.statuses[-1].endswith(", 1 refused"))
    assert federation.told.statuses[-1].startswith("2 of 3 silos connected to ")
    await federation.create("disputed", make_spec(2))
    experiment, rounds = await federation.finish("disputed")
    assert experiment.state == State.STATE_SUCCEEDED
    assert all(contributors(closed) == [ONE, TWO, THREE] for closed in rounds)  # TWO being the rival by now
    assert not host.task.done()
    refusals = [entry for entry in logs if entry["event"] == "this silo is refused; the others go on"]
    assert [entry["silo"] for entry in refusals] == [TWO]
    assert "another daemon runs with this silo's identity" in refusals[0]["reason"]


async def test_08_a_host_whose_silos_are_all_refused_ends(federation: HostedFederation, tmp_path: Path) -> None:
    federation.start_coordinator()
    host = federation.start_host()
    await federation.ready()
    for name in federation.silos:
        federation.start_silo(f"rival-{name}", FakeWorker(), identity=tmp_path / "certs/silos" / name)
    federation.running.pop("host")
    with pytest.raises(IdentityError, match=r"all 3 virtual silos were refused, the first one, 'silo-0.*stop one") as e:
        await asyncio.wait_for(host.task, 10)
    assert e.value.exit_code is ExitCode.IDENTITY_REFUSED


async def test_09_silos_of_another_federation_are_refused_by_the_coordinator(
    tmp_path: Path, federation: HostedFederation, logs: Logs
) -> None:
    """Not a handshake that fails: the coordinator trusts both roots, as after a merger, and refuses by name."""
    prepare(tmp_path / "other", Plan("elsewhere", federation.silos), datetime.now(UTC))
    for trusting, trusted in (("certs/coordinator", "other/silos"), ("other/silos", "certs/coordinator")):
        roots = (tmp_path / trusted / (ONE if "silos" in trusted else "") / "trust.pem").read_bytes()
        places = [tmp_path / trusting] if "silos" not in trusting else list((tmp_path / trusting).iterdir())
        for place in places:
            (place / "trust.pem").write_bytes((place / "trust.pem").read_bytes() + roots)
    federation.start_coordinator()
    host = federation.start_host(identities=tmp_path / "other/silos")
    federation.running.pop("host")
    with pytest.raises(IdentityError, match=r"all 3 virtual silos were refused.* of federation 'elsewhere'"):
        await asyncio.wait_for(host.task, 10)


async def test_10_a_host_that_is_stopped_finishes_what_was_begun_and_delivers_it(
    federation: HostedFederation, reins: Reins, logs: Logs
) -> None:
    await start(federation)
    reins.hold(ONE)
    await federation.create("farewell", make_spec(ROUNDS, federation.silos))
    await reins.until_begun(f"farewell/1/train/{ONE}")
    await until_waiting(federation, logs, *(f"farewell/1/train/{name}" for name in federation.silos))
    host = federation.running.pop("host")
    host.lifecycle.stopping.set()
    await asyncio.sleep(0.2)
    assert not host.task.done()
    reins.release(ONE)
    await asyncio.wait_for(host.task, 10)
    settled = {entry["task"]: entry["verdict"] for entry in logs if entry["event"] == "verdict"}
    assert settled == {f"farewell/1/train/{name}": "accepted" for name in federation.silos}
    assert [federation.spooled(name) for name in federation.silos] == [[], [], []]
    federation.start_host(with_child)
    await assert_undisturbed(federation, "farewell")
    assert [federation.own(name, "farewell") for name in federation.silos] == [ROUNDS] * 3


async def test_11_a_host_can_be_stopped_before_it_is_connected(federation: HostedFederation) -> None:
    host = federation.start_host(with_child)
    assert federation.told is not None
    await until(lambda: "connecting 3 virtual silos" in federation.told.statuses)
    await host.stop()
    assert not federation.told.is_ready.is_set()


async def test_12_all_virtual_silos_find_a_coordinator_that_was_away(
    federation: HostedFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "DIALLING", 1)
    monkeypatch.setattr(crew, "DIAL_LIMIT", 0.1)
    federation.start_host()
    await asyncio.sleep(0.5)  # nobody answers: each in turn gives way to the next
    coordinator = federation.start_coordinator()
    await federation.ready()
    await coordinator.kill()
    federation.start_coordinator()
    watch = Watch(federation)
    for name in federation.silos:
        await Watch(federation).until(connected(name))
    assert watch.number == 0
    await federation.create("found", make_spec(2))
    experiment, _ = await federation.finish("found")
    assert experiment.state == State.STATE_SUCCEEDED


async def test_13_what_a_killed_host_had_computed_is_delivered_by_the_next(
    federation: HostedFederation, tmp_path: Path, reins: Reins
) -> None:
    federation.start_coordinator()
    async with Proxy(federation.port).started() as proxy:
        federation.dial_port = proxy.port
        config = federation.host_yaml(log="info")
        reins.hold(*federation.silos)
        with managed(tmp_path, *command(config)) as manager:
            await asyncio.to_thread(manager.hear, "READY=1")
            await federation.create("inherited", make_spec(ROUNDS))
            await until(lambda: manager.stderr.count("work begins") == 3)
            await until(lambda: bool(reins.begun()))
            first, child = str(reins.begun()[0]["silo"]), int(str(reins.begun()[0]["pid"]))
            proxy.cut()
            reins.release(first)
            await until(lambda: len(federation.spooled(first)) == 1 and len(reins.begun()) == 2)
            manager.signal(signal.SIGKILL)  # one result undelivered, one order under way, one that waits
            await asyncio.to_thread(manager.end)
        assert await gone_within(child, 5)
        assert len(federation.spooled(first)) == 1
        reins.release(*federation.silos)
        proxy.mend()
        with managed(tmp_path, *command(config)) as manager:
            history = await assert_undisturbed(federation, "inherited")
            manager.signal(signal.SIGTERM)
            assert await asyncio.to_thread(manager.end) == 0
            assert "Traceback" not in manager.stderr
    assert all(contributors(closed) == list(federation.silos) for closed in history)
    again = {line["silo"] for line in reins.begun() if line["pid"] != child and "/1/train/" in str(line["task"])}
    assert again == set(federation.silos) - {first}  # the other result was delivered, not computed again
    assert [federation.own(name, "inherited") for name in federation.silos] == [ROUNDS] * 3


async def gone_within(process_id: int, limit: float) -> bool:
    """Whether the process ends: the kernel kills the child of a daemon that dies."""
    try:
        await asyncio.to_thread(psutil.Process(process_id).wait, limit)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True
