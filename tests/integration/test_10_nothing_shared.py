"""A method that shares nothing (local CoOp) in a federation: rounds without tensors, private ones that advance."""

import dataclasses
import sys

import numpy as np

from fedrt.task import TaskKind
from silo.vault import Vault
from silo.work import WorkOrder, WorkOutcome
from tests.fakes.federation import Federation, make_spec
from tests.fakes.workers import FakeWorker, report
from tests.integration.following import EVALUATE, TRAIN, State, Watch, closed, contributors

SILOS = ("north", "south")
ROUNDS = 4


def counting() -> FakeWorker:
    """Adds one to its private context in each round; says in an evaluation how far it is."""

    def behave(order: WorkOrder) -> WorkOutcome:
        held = order.private.get("context", np.zeros((4, 512), np.float32))
        if order.kind is TaskKind.TRAIN:
            return WorkOutcome({}, {"context": held + 1}, 10, {"loss": 1.0}, 0.0)
        return WorkOutcome({}, {}, 10, {"accuracy": float(held.mean()) / ROUNDS}, 0.0)

    return FakeWorker(behave, dataclasses.replace(report(), methods=("coop",)))


async def test_01_private_tensors_advance_once_a_round_although_the_coordinator_dies(federation: Federation) -> None:
    spec = make_spec(ROUNDS, SILOS, method="coop", hyperparameters='{"context_length":4}', every=2)
    workers = {name: counting() for name in SILOS}
    coordinator = federation.start_coordinator()
    for name, worker in workers.items():
        federation.start_silo(name, worker)
    await federation.create("alone", spec)
    await Watch(federation).until(closed(1))
    await coordinator.kill()
    federation.start_coordinator()
    experiment, rounds = await federation.finish("alone")
    assert experiment.state == State.STATE_SUCCEEDED
    assert [(r.round_number, r.task_kind) for r in rounds if r.task_kind == TRAIN] == [(n, TRAIN) for n in (1, 2, 3, 4)]
    assert [contributors(r) for r in rounds] == [list(SILOS)] * len(rounds)
    assert not any(part.payload_byte_count for r in rounds for part in r.contributions)
    measured = [r.metrics["accuracy"] for r in rounds if r.task_kind == EVALUATE]
    assert measured == [0.0, 0.5, 1.0]
    for name in SILOS:
        held = Vault(federation.directory / f"silo-{name}" / "vault").load("alone", sys.maxsize)
        assert held["context"].tobytes() == np.full((4, 512), ROUNDS, np.float32).tobytes()
