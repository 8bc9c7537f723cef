"""Everything the coordinator must not forget, in one SQLite file (WAL) and a folder of large blobs.

One transaction writes one `Changes`; when `commit` returns, it is on disk. All methods block: the driver calls them on
one thread of their own.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from coordinator import tables
from coordinator.blobs import Blobs, blobs_table
from coordinator.database import Guard, connect
from coordinator.documents import CHECKPOINT, EXPERIMENT, SILO, TASK, load, load_event
from coordinator.experiments import Experiment, ExperimentState
from coordinator.records import Changes, Checkpoint, NumberedEvent, SiloRecord, TaskRecord, TensorsRef
from coordinator.schema import check_current, make_current
from fedrt.errors import DamageError, StorageError
from fedrt.statefile import ensure_private_directory

FILE_NAME = "coordinator.db"


class Store:
    """The coordinator's memory. Opening creates what is missing; damage and a newer schema are a `StorageError`.

    With `read_only` it may be opened beside a running coordinator: it creates, migrates and removes nothing (SQLite may
    leave its own `-wal` and `-shm`), and it is a `StorageError` if there is no store or one of another schema.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time, read_only: bool = False) -> None:
        self._clock = clock
        self._read_only = read_only
        path = directory / FILE_NAME
        if read_only:
            if not path.is_file():
                raise StorageError(f"there is no store at '{path}'; check state_directory")
        else:
            ensure_private_directory(directory)
        self.blobs = Blobs(directory / "blobs", read_only)
        self._engine = connect(path, read_only)
        with Guard("open", path):
            if not read_only:
                path.touch(mode=0o600)
                make_current(self._engine, path)
                return
            with self._engine.connect() as connection:
                check_current(connection, path)

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    def commit(self, changes: Changes) -> None:
        """Write everything or nothing, durably. Raises `StorageError`."""
        if self._read_only:
            raise ValueError("a store that was opened to be read cannot be written")
        now = self._clock()
        with Guard("write"):
            self.blobs.put_large(changes.blobs)
            with self._engine.begin() as connection:
                self.blobs.put(connection, changes.blobs)
                for table, rows in tables.rows_of(changes, now):
                    if rows:
                        connection.execute(tables.UPSERT[table.name], rows)
            self.blobs.settle()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """A connection whose changes are all durable after the block, or none. Raises `StorageError`."""
        with Guard("write"), self._engine.begin() as connection:
            yield connection

    def active_experiments(self) -> list[Experiment]:
        """Those that have not ended, oldest first."""
        ended = [state.value for state in ExperimentState if state.has_ended]
        query = sa.select(tables.experiments.c.document).where(tables.experiments.c.state.not_in(ended))
        rows = self.rows(query.order_by(tables.experiments.c.create_time))
        return [load(EXPERIMENT, row.document) for row in rows]

    def experiment(self, experiment_id: str) -> Experiment | None:
        """One experiment, or None."""
        query = sa.select(tables.experiments.c.document).where(tables.experiments.c.experiment_id == experiment_id)
        rows = self.rows(query)
        return load(EXPERIMENT, rows[0].document) if rows else None

    def experiments(self, limit: int, offset: int) -> list[Experiment]:
        """A page of experiments, newest first."""
        order = (tables.experiments.c.create_time.desc(), tables.experiments.c.experiment_id)
        query = sa.select(tables.experiments.c.document).order_by(*order).limit(limit).offset(offset)
        return [load(EXPERIMENT, row.document) for row in self.rows(query)]

    def task(self, task_id: str) -> TaskRecord | None:
        """One task, or None if it was never offered."""
        rows = self.rows(sa.select(tables.tasks.c.document).where(tables.tasks.c.task_id == task_id))
        return load(TASK, rows[0].document) if rows else None

    def round_tasks(self, experiment_id: str, round_number: int) -> list[TaskRecord]:
        """The tasks of a round, all kinds and attempts."""
        place = (tables.tasks.c.experiment_id == experiment_id) & (tables.tasks.c.round_number == round_number)
        return [load(TASK, row.document) for row in self.rows(sa.select(tables.tasks.c.document).where(place))]

    def checkpoint(self, experiment_id: str) -> Checkpoint | None:
        """What an experiment has learned so far, or None before its initial tensors exist."""
        query = sa.select(tables.checkpoints.c.document).where(tables.checkpoints.c.experiment_id == experiment_id)
        rows = self.rows(query.order_by(tables.checkpoints.c.round_number.desc()).limit(1))
        return load(CHECKPOINT, rows[0].document) if rows else None

    def tasks(self, experiment_id: str) -> list[TaskRecord]:
        """All tasks of an experiment, by round and name; the tensors of one may have been forgotten since."""
        query = sa.select(tables.tasks.c.document).where(tables.tasks.c.experiment_id == experiment_id)
        rows = self.rows(query.order_by(tables.tasks.c.round_number, tables.tasks.c.task_id))
        return [load(TASK, row.document) for row in rows]

    def checkpoints(self, experiment_id: str) -> list[Checkpoint]:
        """All checkpoints of an experiment, by round."""
        query = sa.select(tables.checkpoints.c.document).where(tables.checkpoints.c.experiment_id == experiment_id)
        rows = self.rows(query.order_by(tables.checkpoints.c.round_number))
        return [load(CHECKPOINT, row.document) for row in rows]

    def referenced_blobs(self) -> dict[str, int]:
        """The bytes of each blob that a task or a checkpoint needs, by digest.

        `coordinator.blobs.lies_in_file` says which are files. Raises `DamageError` if the store lacks one.
        """
        join = tables.needed_blobs.outerjoin(blobs_table, blobs_table.c.sha256 == tables.needed_blobs.c.sha256)
        columns = (tables.needed_blobs.c.sha256, blobs_table.c.byte_count)
        rows = self.rows(sa.select(*columns).select_from(join).order_by(tables.needed_blobs.c.sha256))
        if missing := [row.sha256 for row in rows if row.byte_count is None]:
            raise DamageError(f"blob {missing[0]} is missing from the store; restore the state directory from a backup")
        return {row.sha256: row.byte_count for row in rows}

    def forgotten_tasks(self, experiment_id: str) -> frozenset[str]:
        """The tasks of an experiment whose tensors `retention.updates` let go; their records still name the digests."""
        query = sa.select(tables.tasks.c.task_id).where(tables.tasks.c.experiment_id == experiment_id, tables.forgotten)
        return frozenset(row.task_id for row in self.rows(query))

    def silos(self) -> list[SiloRecord]:
        """Every silo ever met, by name."""
        rows = self.rows(sa.select(tables.silos.c.document).order_by(tables.silos.c.silo_id))
        return [load(SILO, row.document) for row in rows]

    def events(self, after: int, experiment_id: str, limit: int) -> list[NumberedEvent]:
        """Events after a number, oldest first; of one experiment unless the id is empty."""
        query = sa.select(tables.events).where(tables.events.c.number > after)
        if experiment_id:
            query = query.where(tables.events.c.experiment_id == experiment_id)
        rows = self.rows(query.order_by(tables.events.c.number).limit(limit))
        return [NumberedEvent(row.number, row.time, load_event(row.document)) for row in rows]

    def blob_problem(self, digest: str) -> str | None:
        """What is wrong with a blob, after reading all of it; None if it is whole. Raises `StorageError`."""
        with Guard("read"), self._engine.connect() as connection:
            return self.blobs.problem(connection, digest)

    def blob(self, ref: TensorsRef) -> memoryview:
        """The packed bytes of tensors. Raises `StorageError` if they are missing or damaged."""
        with Guard("read"), self._engine.connect() as connection:
            return self.blobs.get(connection, ref.sha256)

    def rows(self, query: sa.Executable) -> Sequence[sa.Row[Any]]:
        """What a query of `coordinator.tables` finds. Raises `StorageError`."""
        with Guard("read"), self._engine.connect() as connection:
            return connection.execute(query).all()
