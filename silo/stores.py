"""What the agent keeps on disk: results in the spool, private tensors in the vault, checkpoints of tasks under way.

Everything here waits for the disk in a thread. What must be durable is tried again until it is: while the disk refuses,
nothing that depends on it is sent or begun, and the log says so.
"""

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from fedrt.complaint import Complaint
from fedrt.errors import DamageError, FailureReason, StorageError
from fedrt.metrics import SiloMetrics
from fedrt.task import Failure, Task, TaskKind
from fedrt.tensors import Tensors
from silo.checkpoint_directory import CheckpointDirectory
from silo.spool import Spool, Spooled
from silo.vault import Vault

DISK_RETRY_DELAY = 2.0  # seconds between attempts while the disk refuses
# What the next attempt of a round may do better from where this one stopped: so a slow site gets there in the end.
GOES_ON = (FailureReason.TIME_LIMIT, FailureReason.OUT_OF_MEMORY)


class Stores:
    """A silo's spool, vault and checkpoints, for one writer and one reader at a time."""

    def __init__(self, spool: Spool, vault: Vault, checkpoints: CheckpointDirectory, metrics: SiloMetrics) -> None:
        self._spool = spool
        self._vault = vault
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._log = structlog.get_logger("silo")
        self._writing, self._reading = Complaint(), Complaint()

    async def undelivered(self) -> list[Spooled]:
        """The results that an earlier run of the daemon left. Raises `StorageError` if the spool cannot be read."""
        return await asyncio.to_thread(self._look)

    def checkpoint(self, task: Task) -> str:
        """The path of the file that the work of a task goes on from, or empty for work that takes no epochs."""
        return str(self._checkpoints.path(_work_of(task))) if task.kind is TaskKind.TRAIN else ""

    async def private(self, task: Task) -> Tensors:
        """The private tensors that a task begins from, once the disk can be read. Raises `DamageError`."""
        # an evaluation of a round follows its training; training begins from what was accepted before
        before = task.round_number + (task.kind is TaskKind.EVALUATE)
        while True:
            try:
                found = await asyncio.to_thread(self._vault.load, task.experiment_id, before)
            except DamageError:
                raise
            except StorageError as error:
                if self._reading.is_due(str(error)):
                    self._log.error("work does not begin until the disk can be read", reason=str(error))
                await asyncio.sleep(DISK_RETRY_DELAY)
                continue
            if self._reading.end():
                self._log.info("the disk can be read again")
            return found

    async def keep(self, spooled: Spooled) -> None:
        """Return once the result is durable; its checkpoint is then of no more use, unless the next attempt goes on."""

        def put() -> None:
            self._spool.put(spooled)
            self._settle(spooled)

        await self._until_durable(put)

    async def promote(self, spooled: Spooled) -> None:
        """Return once the private tensors that belong to an accepted result are current, and stay so."""
        if spooled.private:
            await self._until_durable(
                lambda: self._vault.promote(spooled.experiment_id, spooled.round_number, spooled.private)
            )

    async def remove(self, task_id: str) -> None:
        """Return once the result of a settled task is gone for good."""

        def remove() -> None:
            self._spool.remove(task_id)
            self._count()

        await self._until_durable(remove)

    async def abandon(self, task: Task) -> None:
        """Remove the checkpoint of a task that has ended without a result."""
        await asyncio.to_thread(self._end, _work_of(task))

    async def _until_durable(self, write: Callable[[], None]) -> None:
        while True:
            try:
                await asyncio.to_thread(write)
            except StorageError as error:
                if self._writing.is_due(str(error)):
                    self._log.error("nothing is sent until the disk accepts writes", reason=str(error))
                await asyncio.sleep(DISK_RETRY_DELAY)
                continue
            if self._writing.end():
                self._log.info("the disk accepts writes again")
            return

    def _look(self) -> list[Spooled]:
        found = self._spool.load()
        for spooled in found:
            self._settle(spooled)  # the daemon may have died in between
        self._count()
        self._sweep()
        return found

    def _settle(self, spooled: Spooled) -> None:
        outcome = spooled.outcome
        if not isinstance(outcome, Failure) or outcome.reason not in GOES_ON:
            self._end(_work_of(spooled))

    def _end(self, work: str) -> None:
        self._count()
        try:
            self._checkpoints.remove(work)
        except StorageError as error:
            self._log.warning("the checkpoint of a task that has ended stays where it is", reason=str(error))
        self._sweep()

    def _sweep(self) -> None:
        try:
            if removed := self._checkpoints.sweep():
                self._log.info("checkpoints that no task went on with for seven days are removed", count=removed)
        except StorageError as error:
            self._log.warning("checkpoints that no task goes on with stay where they are", reason=str(error))

    def _count(self) -> None:
        with contextlib.suppress(StorageError):  # a number for the operator; the results matter
            count, size = self._spool.size()
            self._metrics.spool_results.set(count)
            self._metrics.spool_bytes.set(size)


def _work_of(task: Task | Spooled) -> str:
    """What all attempts of a round have in common: a silo's work in it, which gives the same bits in each."""
    return f"{task.experiment_id}/{task.round_number}/{task.kind.value}"
