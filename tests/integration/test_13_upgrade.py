"""Versions work together: recorded sessions of older ones, what a newer one may say, and a state directory of old."""

import time
from pathlib import Path

import pytest

from tests.fakes.federation import Federation
from tests.fakes.recorded import RecordedCoordinator, RecordedSilo
from tests.fakes.recording import HeldWorker, digest, read
from tests.fakes.stores import HELD, ROUNDS, SILOS, restore, small_spec
from tests.integration.following import State, contributors

GOLDEN = Path(__file__).parent.parent / "golden"
RECORDINGS = sorted((GOLDEN / "protocol").glob("*.txt"))
STORES = sorted((GOLDEN / "stores").glob("under-way-*.sql"))
PATIENT = "heartbeat_interval: 20s\nsilence_limit: 1h\n"  # a recording says its heartbeats when it comes to them


def test_00_there_are_recordings() -> None:
    assert RECORDINGS
    assert STORES


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
async def test_01_a_recorded_silo_and_this_coordinator_come_to_the_same_end(federation: Federation, path: Path) -> None:
    federation.start_coordinator(PATIENT)
    silo = RecordedSilo(federation)
    await silo.play(read(path))
    assert silo.outcomes == silo.expected
    assert {state for state, _ in silo.outcomes.values()} == {"STATE_SUCCEEDED", "STATE_FAILED", "STATE_CANCELLED"}


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
async def test_02_this_silo_answers_a_recorded_coordinator_as_recorded(federation: Federation, path: Path) -> None:
    steps = read(path)
    held = {step.words[0] for step in steps if step.what == "release"} | {"unwanted/1/train/north"}
    worker = HeldWorker(held=tuple(held))
    silo = federation.start_silo("north", worker)
    async with RecordedCoordinator(federation, worker).started() as coordinator:
        await coordinator.play(steps)
        await silo.task
    assert [len(hello.held_tasks) for hello in coordinator.hellos] == [0, 1, 1]
    assert not list((federation.directory / "silo-north/spool").glob("*.safetensors"))  # every result has its verdict


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.stem)
async def test_03_an_experiment_under_way_goes_on_with_this_coordinator(federation: Federation, path: Path) -> None:
    restore(path, federation.directory / "coordinator", time.time())
    workers = {name: HeldWorker() for name in SILOS}
    async with federation.started(workers):
        experiment, rounds = await federation.finish("upgraded")
        upgraded = digest(await federation.export("upgraded"))
        await federation.create("undisturbed", small_spec(ROUNDS, SILOS, every=2))
        await federation.finish("undisturbed")
        assert upgraded == digest(await federation.export("undisturbed"))
    assert experiment.state == State.STATE_SUCCEEDED
    assert [contributors(closed) for closed in rounds] == [list(SILOS)] * 7  # evaluations: before, after 2 and 4
    done = {name: [order.task_id for order in worker.orders] for name, worker in workers.items()}
    assert HELD in done["south"]
    assert "upgraded/2/train/north" not in done["north"]  # its result was in the store
    assert not [task for tasks in done.values() for task in tasks if task.startswith("upgraded/1/")]
