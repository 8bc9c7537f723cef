"""Garbage collection: what nothing needs any more leaves the store, in slices between which commits get their turn.

* Updates of experiments that ended longer ago than `retention.updates` are forgotten: a task keeps its record with the
  digest, and no longer needs the tensors. Checkpoints stay.
* A blob goes when no task and no checkpoint needs it: first its row, then its file, so that a crash between them
  leaves a file without a row, and never the other way round.
* A file without a row goes too: it is what a crash left between a file and its transaction.

All of it runs on the store's thread, where a slice and a commit cannot overlap. What a commit has put that the disk
then refused stays, for that commit is tried again.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import sqlalchemy as sa
import structlog

from coordinator.backup_lock import removing_blobs
from coordinator.blobs import blobs_table, lies_in_file
from coordinator.integrity import check_at_start
from coordinator.store import FILE_NAME, Store
from coordinator.tables import checkpoints, experiments, tasks
from fedrt.errors import ConfigurationError, StorageError
from fedrt.locking import DirectoryLock

COLLECT_INTERVAL = 86_400.0  # seconds between two collections of a running coordinator
RETRY_INTERVAL = 3600.0  # seconds until the next one if it could not be finished
SLICE_ROWS = 500  # rows that are looked at in one slice
SLICE_BYTES = 4 << 20  # after so much has gone a slice ends, a few milliseconds later where the disk is idle

_NEEDED = (
    sa.exists().where(tasks.c.tensors_sha256 == blobs_table.c.sha256)
    | sa.exists().where(checkpoints.c.shared_sha256 == blobs_table.c.sha256)
    | sa.exists().where(checkpoints.c.memory_sha256 == blobs_table.c.sha256)
)
_PAGE = (
    sa.select(blobs_table.c.sha256, blobs_table.c.byte_count, _NEEDED.label("needed"))
    .where(blobs_table.c.sha256 > sa.bindparam("after"))
    .order_by(blobs_table.c.sha256)
    .limit(SLICE_ROWS)
)


class BlobsKeptError(StorageError):
    """Nothing may be removed now."""


@dataclass(frozen=True)
class Freed:
    """What left the store. `update_count` are results whose tensors were forgotten; their blobs count as blobs."""

    update_count: int = 0
    blob_count: int = 0
    file_count: int = 0  # files that no row named
    byte_count: int = 0

    def __str__(self) -> str:
        return (
            f"freed {self.byte_count / 2**20:.1f} MiB: removed {self.blob_count} blobs and {self.file_count} files "
            f"that no row named; forgot the updates of {self.update_count} tasks"
        )

    def __add__(self, other: "Freed") -> "Freed":
        return Freed(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


def collect(store: Store, state_directory: Path, updates: float, now: float) -> Iterator[Freed]:
    """One slice of work for each item. Raises `BlobsKeptError` while a backup reads them, `StorageError` for the disk.

    Updates are forgotten of experiments that ended more than `updates` seconds before `now`; infinity keeps them all.
    """
    slices = itertools.chain(_forget_updates(store, now - updates), _remove_blobs(store), _remove_files(store))
    while True:
        with removing_blobs(state_directory) as allowed:
            if not allowed:
                raise BlobsKeptError("a backup or a check reads the store; collect when it is through")
            freed = next(slices, None)
        if freed is None:
            return
        yield freed


def collect_by_hand(state_directory: Path, updates: float) -> Freed:
    """All slices, of a coordinator that is stopped; what they freed.

    Raises `ConfigurationError` if the coordinator runs, `StorageError` without a store, while a backup reads it
    or if the disk refuses, and `DamageError` if the store is not fit for a start: then nothing is removed.
    """
    if not (state_directory / FILE_NAME).is_file():
        raise StorageError(f"there is no store in '{state_directory}'; check state_directory")
    try:
        lock = DirectoryLock(state_directory)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}; a coordinator that runs collects by itself once a day") from None
    try:
        with contextlib.closing(Store(state_directory)) as store:
            check_at_start(store)
            return sum(collect(store, state_directory, updates, time.time()), Freed())
    finally:
        lock.release()


async def collect_daily(
    in_store: Callable[..., Awaitable[Freed | None]],
    store: Store,
    state_directory: Path,
    updates: float,
    clock: Callable[[], float] = time.time,
) -> None:
    """Collect now and once a day, until cancelled; `in_store` calls a function on the store's thread.

    What a backup or the disk keeps from going is tried again after an hour: a nightly backup may come at the same time.
    """
    log = structlog.get_logger("coordinator")
    while True:
        total, pause = Freed(), COLLECT_INTERVAL
        slices = collect(store, state_directory, updates, clock())
        try:
            while (freed := await in_store(next, slices, None)) is not None:
                total += freed
        except StorageError as error:
            pause = RETRY_INTERVAL
            tell = log.info if isinstance(error, BlobsKeptError) else log.warning
            tell("garbage collection waits for an hour", reason=str(error))
        if total != Freed():
            log.info(
                "garbage collected",
                updates_forgotten=total.update_count,
                blobs_removed=total.blob_count,
                files_without_a_row_removed=total.file_count,
                freed_bytes=total.byte_count,
            )
        await asyncio.sleep(pause)


def _forget_updates(store: Store, ended_before: float) -> Iterator[Freed]:
    """A slice for each round with updates; those of the tasks of one round are forgotten together."""
    old = sa.select(experiments.c.experiment_id).where(experiments.c.end_time < ended_before)  # none while under way
    for experiment in store.rows(old):
        kept = (tasks.c.experiment_id == experiment.experiment_id) & tasks.c.tensors_sha256.is_not(None)
        for round_ in store.rows(sa.select(tasks.c.round_number).where(kept).distinct()):
            forget = sa.update(tasks).where(kept, tasks.c.round_number == round_.round_number)
            with store.transaction() as connection:
                count = connection.execute(forget.values(tensors_sha256=None)).rowcount
            yield Freed(update_count=count)
        yield Freed()


def _remove_blobs(store: Store) -> Iterator[Freed]:
    after = ""
    while True:
        with store.transaction() as connection:
            page = connection.execute(_PAGE, {"after": after}).all()
            unneeded: list[sa.Row[tuple[str, int, bool]]] = []
            for row in page:
                if sum(gone.byte_count for gone in unneeded) >= SLICE_BYTES:
                    break
                after = row.sha256
                if not row.needed and not store.blobs.unsettled(row.sha256):
                    unneeded.append(row)
            if unneeded:
                digests = [row.sha256 for row in unneeded]
                connection.execute(sa.delete(blobs_table).where(blobs_table.c.sha256.in_(digests)))
        for row in unneeded:
            if lies_in_file(row.byte_count):
                store.blobs.remove_file(row.sha256)
        if not page:
            return
        yield Freed(blob_count=len(unneeded), byte_count=sum(row.byte_count for row in unneeded))


def _remove_files(store: Store) -> Iterator[Freed]:
    waiting = store.blobs.files()
    while waiting:
        page, rest = waiting[:SLICE_ROWS], waiting[SLICE_ROWS:]
        named = {
            row.sha256 for row in store.rows(sa.select(blobs_table.c.sha256).where(blobs_table.c.sha256.in_(page)))
        }
        freed = Freed()
        for position, digest in enumerate(page):
            if freed.byte_count >= SLICE_BYTES:
                rest = page[position:] + rest
                break
            if digest not in named and not store.blobs.unsettled(digest):
                freed += Freed(file_count=1, byte_count=store.blobs.remove_file(digest))
        waiting = rest
        yield freed
