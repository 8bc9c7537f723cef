"""What an earlier attempt of a round got survives the death of the coordinator, also while no attempt is under way."""

import asyncio

from fedrt.errors import FailureReason, WorkError
from fedrt.v1 import experiment_pb2
from tests.fakes.federation import Federation, make_spec
from tests.fakes.workers import FakeWorker, failing
from tests.integration.following import Watch, closed, connected, contributors, draining, gone


async def test_a_coordinator_that_dies_while_a_retry_waits_for_its_silos_keeps_what_others_returned(
    federation: Federation,
) -> None:
    broken = FakeWorker(failing(WorkError(FailureReason.OUT_OF_MEMORY, "too large")), gate=asyncio.Event())
    coordinator = federation.start_coordinator()
    north = FakeWorker()
    federation.start_silo("north", north)
    leaving = federation.start_silo("south", broken)
    for name in ("north", "south"):
        await Watch(federation).until(connected(name))
    await federation.create("kept", make_spec(2, ("north", "south"), retries=3))
    await broken.began.wait()
    leaving.lifecycle.stopping.set()  # so that the next attempt has to wait for it
    await Watch(federation).until(draining("south"))
    assert broken.gate is not None
    broken.gate.set()
    await Watch(federation).until(closed(1))
    await Watch(federation).until(gone("south"))
    await coordinator.kill()
    federation.start_coordinator()
    federation.start_silo("south", FakeWorker())
    experiment, history = await federation.finish("kept")
    assert experiment.status_message == ""
    assert experiment.state == experiment_pb2.Experiment.STATE_SUCCEEDED
    assert [order.task_id for order in north.orders].count("kept/1/train/north") == 1
    assert contributors(next(one for one in history if one.succeeded)) == ["north", "south"]
