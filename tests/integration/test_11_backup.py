"""A coordinator that lost everything goes on from an old backup, and the experiment ends with the same bits."""

import asyncio
import dataclasses
import functools
import json
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from coordinator.backup import back_up
from coordinator.replay import Finding, ReplayedRound, find_experiment, replay
from coordinator.restore import restore
from coordinator.store import Store
from fedrt.errors import FailureReason, WorkError
from fedrt.spec import ExperimentSpec
from fedrt.task import TaskKind
from fedrt.tensors import Scope, of_scope, seeded_generator
from fedrt.v1 import admin_service_pb2 as pb
from silo.departures import read_lines
from silo.work import OnProgress, WorkOrder, WorkOutcome
from tests.cli.processes import assert_one_message, coordinator, run
from tests.fakes.federation import Federation, make_spec
from tests.fakes.workers import FakeWorker, report
from tests.integration.conftest import Logs
from tests.integration.following import INITIALIZE, TRAIN, State, contributors

ROUNDS = 8
COUNTS = {"north": 7, "south": 311, "west": 23}
METHODS = {
    "promptfl": '{"context_length":2,"server":{"rule":"server_adam"}}',
    "promptfolio": '{"context_length":2,"server":{"rule":"server_momentum"}}',
    "coop": '{"context_length":2}',
}


def learn(name: str, order: WorkOrder) -> WorkOutcome:
    """What it returns depends on every bit of the shared and private tensors, on the seed and on the round."""
    if order.kind is TaskKind.EVALUATE:
        return WorkOutcome({}, {}, 10, {}, 0.0)
    tensors = order.local.tensors()
    specs = {scope: of_scope(tensors, scope) for scope in Scope}
    if order.kind is TaskKind.INITIALIZE:
        return WorkOutcome(
            {spec.name: np.full(spec.shape, 0.5, np.float32) for spec in specs[Scope.SHARED]}, {}, 0, {}, 0.0
        )
    held = order.private or {spec.name: np.zeros(spec.shape, np.float32) for spec in specs[Scope.PRIVATE]}
    seen = np.float32(sum(float(np.tanh(array).sum()) for array in (*order.shared.values(), *held.values())))

    def move(name: str, value: np.ndarray) -> np.ndarray:
        draw = seeded_generator(order.seed, name, order.round_number).standard_normal(value.shape, np.float32)
        return np.float32(0.1) * (draw + np.sin(seen) - value)

    private = {name: value + move(name, value) for name, value in held.items()}
    shared = {spec.name: move(spec.name, order.shared[spec.name]) for spec in specs[Scope.SHARED]}
    return WorkOutcome(shared, private, COUNTS[name], {"loss": float(seen)}, 0.0)


@dataclass
class PausingWorker(FakeWorker):
    """Waits in the training of some rounds until it may go on, and says when it waits and what it has finished."""

    pauses: dict[int, asyncio.Event] = field(default_factory=dict)
    reached: dict[int, asyncio.Event] = field(default_factory=dict)

    async def run(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        if order.kind is TaskKind.TRAIN and order.round_number in self.pauses:
            self.reached[order.round_number].set()
            await self.pauses[order.round_number].wait()
        return await super().run(order, on_progress)


def workers(pauses: tuple[int, ...] = ()) -> dict[str, PausingWorker]:
    """One for each silo; west pauses in these rounds."""
    description = dataclasses.replace(report(context_dim=8), methods=tuple(METHODS))
    made = {name: PausingWorker(functools.partial(learn, name), description) for name in COUNTS}
    made["west"].pauses = {number: asyncio.Event() for number in pauses}
    made["west"].reached = {number: asyncio.Event() for number in pauses}
    return made


def spec_of(method: str) -> ExperimentSpec:
    return make_spec(ROUNDS, tuple(COUNTS), 2, method, METHODS[method], context_dim=8)


def replayed(directory: Path, name: str) -> list[ReplayedRound]:
    store = Store(directory, read_only=True)
    try:
        return list(replay(store, find_experiment(store, name)))
    finally:
        store.close()


def assert_all_agree(rounds: list[ReplayedRound], last: int = ROUNDS) -> None:
    assert [(found.number, found.finding, found.problems) for found in rounds] == [
        (number, Finding.AGREES, ()) for number in range(last + 1)
    ]


def assert_nobody_was_absent(rounds: list[pb.RoundClosed]) -> None:
    assert [r.round_number for r in rounds if r.task_kind == TRAIN] == list(range(1, ROUNDS + 1))
    assert {tuple(contributors(r)) for r in rounds} == {tuple(COUNTS)}


def private_tensors(worker: FakeWorker) -> dict[str, bytes]:
    """With which the last evaluation was made."""
    (last,) = [o for o in worker.orders[-1:] if o.kind is TaskKind.EVALUATE and o.round_number == ROUNDS]
    return {name: array.tobytes() for name, array in last.private.items()}


Ending = tuple[dict[str, bytes], dict[str, dict[str, bytes]]]


async def ending(federation: Federation, silos: dict[str, PausingWorker], name: str = "long") -> Ending:
    """The shared tensors of the last round, and each silo's private ones."""
    experiment, rounds = await federation.finish(name, 60)
    assert experiment.state == State.STATE_SUCCEEDED, experiment.status_message
    assert_nobody_was_absent(rounds)
    shared = {} if experiment.spec.local.method.name == "coop" else await federation.export(name)
    return (
        {key: array.tobytes() for key, array in shared.items()},
        {silo: private_tensors(worker) for silo, worker in silos.items()},
    )


async def spooled(federation: Federation, name: str) -> None:
    """Wait until a silo has an undelivered result; there is nobody who could take it."""
    spool = federation.directory / f"silo-{name}" / "spool"
    async with asyncio.timeout(60):
        while not list(spool.glob("*.safetensors")):  # noqa: ASYNC110  # nobody announces it
            await asyncio.sleep(0.01)


async def undisturbed(directory: Path, method: str) -> Ending:
    calm, silos = Federation(directory), workers()
    async with calm.started(silos):
        await calm.create("long", spec_of(method))
        return await ending(calm, silos)


@pytest.mark.parametrize("west", ["runs on", "has finished"])
@pytest.mark.parametrize("method", METHODS)
async def test_01_silos_that_are_further_than_a_restored_coordinator_end_with_the_same_bits(
    federation: Federation, tmp_path: Path, logs: Logs, method: str, west: str
) -> None:
    state, backup = federation.directory / "coordinator", tmp_path / "backup"
    silos = workers((2, 4))
    pauses, reached = silos["west"].pauses, silos["west"].reached
    daemon = federation.start_coordinator()
    for name, worker in silos.items():
        federation.start_silo(name, worker)
    await federation.create("long", spec_of(method))
    async with asyncio.timeout(60):
        await reached[2].wait()
        await asyncio.to_thread(back_up, state, backup, datetime.now(UTC))
        pauses[2].set()
        await reached[4].wait()
    if method != "coop":
        assert_all_agree(await asyncio.to_thread(replayed, state, "long"), 3)  # beside the running coordinator
    await daemon.kill()
    if west == "has finished":  # a result of a round that the restored coordinator does not know yet
        pauses[4].set()
        await spooled(federation, "west")
    shutil.rmtree(state)
    await asyncio.to_thread(restore, backup, state)
    reached[4].clear()
    federation.start_coordinator()
    await asyncio.wait_for(reached[4].wait(), 60)
    pauses[4].set()
    ended = await ending(federation, silos)
    assert [o.round_number for o in silos["west"].orders if o.kind is TaskKind.TRAIN].count(3) == 2  # it was set back
    dropped = [entry["task"] for entry in logs if entry.get("verdict") == "unknown_task"]
    assert ("long/4/train/west" in dropped) == (west == "has finished")
    assert ended == await undisturbed(tmp_path / "calm", method)
    if method != "coop":
        assert_all_agree(await asyncio.to_thread(replayed, state, "long"))


async def test_02_an_experiment_that_the_backup_does_not_know_can_be_created_again(
    federation: Federation, tmp_path: Path
) -> None:
    state, backup = federation.directory / "coordinator", tmp_path / "backup"
    silos = workers((4,))
    daemon = federation.start_coordinator()
    for name, worker in silos.items():
        federation.start_silo(name, worker)
    async with federation.admin():
        await asyncio.to_thread(back_up, state, backup, datetime.now(UTC))
    later = spec_of("promptfolio")
    other = dataclasses.replace(later, local=dataclasses.replace(later.local, seed=99))
    await federation.create("long", other)  # with private tensors that the silos keep
    await asyncio.wait_for(silos["west"].reached[4].wait(), 60)
    await daemon.kill()
    shutil.rmtree(state)
    await asyncio.to_thread(restore, backup, state)
    federation.start_coordinator()
    silos["west"].pauses[4].set()
    await federation.create("long", later)
    assert await ending(federation, silos) == await undisturbed(tmp_path / "calm", "promptfolio")


async def test_03_what_a_replay_counts_is_what_left_the_silos_retries_and_all(federation: Federation) -> None:
    failed = []

    def fail_once(order: WorkOrder) -> WorkOutcome:
        if order.kind is TaskKind.TRAIN and order.round_number == 2 and not failed:
            failed.append(order.task_id)
            raise WorkError(FailureReason.INTERNAL, "once")
        return learn("west", order)

    silos = workers()
    silos["west"].behave = fail_once
    async with federation.started(silos):
        words = '{"context_init":"a photo of","context_length":3}'  # so a silo computes the initial tensors
        spec = make_spec(3, tuple(COUNTS), 1, hyperparameters=words, context_dim=8)
        await federation.create("retried", spec)
        experiment, rounds = await federation.finish("retried")
    assert experiment.state == State.STATE_SUCCEEDED
    again = await asyncio.to_thread(replayed, federation.directory / "coordinator", "retried")
    assert_all_agree(again, 3)
    closed = {r.round_number: r for r in rounds if r.task_kind in (TRAIN, INITIALIZE) and r.succeeded}
    assert len([r for r in rounds if r.task_kind == TRAIN]) == 4  # one of them failed, and two results were kept
    left = {
        (line["task"].split("/")[1], line["task"].rpartition("/")[2], line["sha256"])
        for name in COUNTS
        for line in read_lines(federation.directory / f"silo-{name}" / "departures.jsonl")
        if line["message"] == "PayloadChunk"
    }
    for found in again:
        assert [part.silo_id for part in found.counted] == contributors(closed[found.number])
        for part in found.counted:
            assert (str(found.number), part.silo_id, part.sha256) in left
    assert len(left) == 3 * 3 + 1


async def test_04_an_operator_loses_the_coordinators_disk(federation: Federation, tmp_path: Path) -> None:
    config, state, backup = federation.coordinator_yaml(), federation.directory / "coordinator", tmp_path / "backup"
    silos = workers((2,))

    async def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(run, "fedrt-coordinator", *arguments, "--config", config)

    for name, worker in silos.items():
        federation.start_silo(name, worker)
    with coordinator(tmp_path, config) as first:
        await asyncio.to_thread(first.hear, "READY=1")
        await federation.create("long", spec_of("promptfolio"))
        await asyncio.wait_for(silos["west"].reached[2].wait(), 60)
        done = await command("backup", backup)
        assert done.returncode == 0, done.stderr
        assert_one_message(await command("backup", backup), 78, f"'{backup}' exists already")
        assert_one_message(await command("restore", backup), 78, "is in use by another running daemon; stop that one")
        running = await command("replay", "long")
        assert "experiment 'long' (running): 2 of 2 agree" in running.stdout
        first.signal(signal.SIGKILL)
        await asyncio.to_thread(first.end)
    assert_one_message(await command("restore", backup), 78, "holds a store ('coordinator.db')", "move it away first")
    state.rename(tmp_path / "lost")
    done = await command("restore", backup)
    assert done.returncode == 0, done.stderr
    silos["west"].pauses[2].set()
    with coordinator(tmp_path, config) as second:
        await asyncio.to_thread(second.hear, "READY=1")
        ended = await ending(federation, silos)
        second.signal(signal.SIGTERM)
        await federation.stop()
        assert await asyncio.to_thread(second.end) == 0
    assert ended == await undisturbed(tmp_path / "calm", "promptfolio")
    done = await command("replay", "long", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["agrees"]
