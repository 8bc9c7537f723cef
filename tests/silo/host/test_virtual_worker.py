"""One virtual silo's view of the worker that all share; with a real child in tests/integration/test_09_hosted.py."""

import asyncio
from collections.abc import Mapping

import pytest
import structlog

from fedrt.errors import FailureReason, WorkError
from fedrt.spec import LocalSpec
from fedrt.task import TaskKind
from silo.host.worker import VirtualWorker
from silo.work import WorkerReport, WorkOrder
from tests.fakes.federation import make_spec
from tests.fakes.workers import FakeWorker, failing
from tests.silo.host.hosted import hosting

LOCAL: LocalSpec = make_spec().local


def order(task: str = "t") -> WorkOrder:
    return WorkOrder(task, "e", TaskKind.TRAIN, LOCAL, 1, 7, {}, {})


def quiet(done: int, planned: int) -> None:
    pass


async def test_an_order_says_whose_it_is_and_changes_in_nothing_else() -> None:
    shared = FakeWorker()
    await VirtualWorker(shared, "b").run(order(), quiet)
    (seen,) = shared.orders
    assert seen == WorkOrder(**{**vars(order()), "silo": "b"})


async def test_each_sees_its_own_images() -> None:
    shared = FakeWorker(description=hosting(("a", "b")))
    shared.description.hosted["b"]["train"]["cat"] = 3  # type: ignore[index]
    reports = [await VirtualWorker(shared, name).describe() for name in ("a", "b")]
    assert [report.example_count for report in reports] == [10, 3]
    assert all(not report.hosted for report in reports)
    worker = VirtualWorker(shared, "b")
    assert worker.report == reports[1]
    shared.description.hosted["b"]["train"]["cat"] = 2  # type: ignore[index]  # one turned out to be unreadable
    assert worker.report is not None
    assert worker.report.example_count == 2


async def test_nothing_is_known_while_a_fresh_child_loads() -> None:
    class Loading(FakeWorker):
        report: Mapping[str, WorkerReport] | None = None

    assert VirtualWorker(Loading(), "a").report is None


async def test_to_stop_one_stops_none() -> None:
    class Stoppable(FakeWorker):
        stopped = False

        async def stop(self) -> None:
            self.stopped = True

    shared = Stoppable()
    await VirtualWorker(shared, "a").stop()
    assert not shared.stopped


async def test_failures_and_cancellation_pass_through() -> None:
    shared = FakeWorker(failing(WorkError(FailureReason.NOT_FINITE, "the loss is not finite")))
    with pytest.raises(WorkError, match="the loss is not finite"):
        await VirtualWorker(shared, "a").run(order(), quiet)
    shared.gate = asyncio.Event()
    task = asyncio.create_task(VirtualWorker(shared, "a").run(order("cancelled"), quiet))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert shared.abandoned == ["cancelled"]


async def test_the_shared_worker_does_not_log_under_the_name_of_the_silo_that_needed_it() -> None:
    bound: list[dict[str, object]] = []

    class Logging(FakeWorker):
        async def run(self, *arguments: object) -> object:
            bound.append(structlog.contextvars.get_contextvars())
            raise WorkError(FailureReason.INTERNAL, "no")

    with structlog.contextvars.bound_contextvars(silo="a", other=1):
        with pytest.raises(WorkError):
            await VirtualWorker(Logging(), "a").run(order(), quiet)
        assert structlog.contextvars.get_contextvars() == {"silo": "a", "other": 1}
    assert bound == [{}]
