"""One virtual silo's share of the worker that all virtual silos of a host have in common. No torch here."""

from dataclasses import replace

import structlog

from silo.work import OnProgress, Worker, WorkerReport, WorkOrder, WorkOutcome


class VirtualWorker:
    """A `silo.work.Worker` for one virtual silo; the host starts and stops the worker behind it.

    Orders of all virtual silos are done one at a time, in the order in which they came. An order's time limit runs
    while it waits. One that is cancelled while it waits leaves the others alone; cancelling the one that is being done
    kills the child process, and so does its crash: then that order alone fails, and the next one gets a fresh child.
    """

    def __init__(self, shared: Worker, silo: str) -> None:
        self._shared = shared
        self._silo = silo

    async def describe(self) -> WorkerReport:
        """What this virtual silo holds. Raises as the shared worker does."""
        return (await self._shared.describe()).of(self._silo)

    @property
    def report(self) -> WorkerReport | None:
        """The same as far as it is known without waiting."""
        report = self._shared.report
        return None if report is None else report.of(self._silo)

    async def run(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        """Do the work with this virtual silo's images. Raises `WorkError`."""
        held = structlog.contextvars.get_contextvars()
        structlog.contextvars.unbind_contextvars(*held)  # a child started now logs for all, not under this silo's name
        try:
            return await self._shared.run(replace(order, silo=self._silo), on_progress)
        finally:
            structlog.contextvars.bind_contextvars(**held)

    async def stop(self) -> None:
        """Nothing: other virtual silos may be at work."""
