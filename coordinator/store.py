"""Everything the coordinator must not forget, in one SQLite file (WAL) and a folder of large blobs.

One transaction writes one `Changes`; when `commit` returns, it is on disk. All methods block: the driver calls them on
one thread of their own.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from pydantic import TypeAdapter
from sqlalchemy.dialects.sqlite import insert

from coordinator.blobs import Blobs, metadata
from coordinator.experiments import Experiment, ExperimentState
from coordinator.records import Changes, Checkpoint, Event, NumberedEvent, SiloRecord, TaskRecord, TensorsRef
from fedrt.errors import DamageError, PayloadError, SpecError, StorageError
from fedrt.statefile import ensure_private_directory, storage_error

SCHEMA_VERSION = 2  # 1 kept an experiment's seed elsewhere
_DAMAGED = "a record in the store is damaged; restore the state directory from a backup"

_T = TypeVar("_T")

_experiments = sa.Table(
    "experiments",
    metadata,
    sa.Column("experiment_id", sa.String(63), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("create_time", sa.Float, nullable=False, index=True),
    sa.Column("document", sa.Text, nullable=False),
)
_tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("task_id", sa.String(200), primary_key=True),
    sa.Column("experiment_id", sa.String(63), nullable=False),
    sa.Column("round_number", sa.Integer, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.Index("tasks_by_round", "experiment_id", "round_number"),
)
_checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("experiment_id", sa.String(63), primary_key=True),
    sa.Column("round_number", sa.Integer, primary_key=True),
    sa.Column("document", sa.Text, nullable=False),
)
_silos = sa.Table(
    "silos",
    metadata,
    sa.Column("silo_id", sa.String(63), primary_key=True),
    sa.Column("document", sa.Text, nullable=False),
)
_events = sa.Table(
    "events",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("experiment_id", sa.String(63), nullable=False, index=True),
    sa.Column("document", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)


def _upsert(table: sa.Table) -> sa.Insert:
    statement = insert(table)
    keys = [column.name for column in table.primary_key]
    others = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=others)


# Built once: building a statement costs more than executing it.
_UPSERT: dict[str, sa.Insert] = {
    table.name: _upsert(table) for table in (_experiments, _tasks, _checkpoints, _silos)
} | {_events.name: insert(_events)}

_EXPERIMENT: TypeAdapter[Experiment] = TypeAdapter(Experiment)
_TASK: TypeAdapter[TaskRecord] = TypeAdapter(TaskRecord)
_CHECKPOINT: TypeAdapter[Checkpoint] = TypeAdapter(Checkpoint)
_SILO: TypeAdapter[SiloRecord] = TypeAdapter(SiloRecord)
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def _dump(adapter: TypeAdapter[Any], value: object) -> str:
    return adapter.dump_json(value).decode()


def _dump_event(event: Event) -> str:
    return json.dumps({"kind": type(event).__name__, "event": _EVENT.dump_python(event, mode="json")})


def _load(adapter: TypeAdapter[_T], document: str) -> _T:
    try:
        return adapter.validate_json(document)
    except (ValueError, SpecError, PayloadError) as error:
        raise DamageError(_DAMAGED) from error


def _load_event(document: str) -> Event:
    try:
        parsed = json.loads(document)
        adapter: TypeAdapter[Event] = _EVENT_KINDS[parsed["kind"]]
        return adapter.validate_python(parsed["event"])
    except (ValueError, KeyError, PayloadError) as error:
        raise DamageError(_DAMAGED) from error


_EVENT_KINDS: dict[str, TypeAdapter[Any]] = {kind.__name__: TypeAdapter(kind) for kind in Event.__args__}


class Store:
    """The coordinator's memory. Opening creates what is missing; damage and a newer schema are a `StorageError`."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        ensure_private_directory(directory)
        self._clock = clock
        self._blobs = Blobs(directory / "blobs")
        path = directory / "coordinator.db"
        self._engine = sa.create_engine(
            f"sqlite:///{path}", poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False}
        )
        sa.event.listen(self._engine, "connect", _configure)
        with self._guarded("open", path):
            path.touch(mode=0o600)
            with self._engine.begin() as connection:
                version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
                if version > SCHEMA_VERSION:
                    raise StorageError(
                        f"store '{path}' was written by a newer fedrt (schema {version}, this one knows "
                        f"{SCHEMA_VERSION}); install the newer version"
                    )
                if 0 < version < SCHEMA_VERSION:
                    raise StorageError(
                        f"store '{path}' was written by a development version of fedrt (schema {version}, this one "
                        f"knows {SCHEMA_VERSION}); keep that version for its experiments, or start with an empty "
                        "state directory"
                    )
                metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    def commit(self, changes: Changes) -> None:
        """Write everything or nothing, durably. Raises `StorageError`."""
        now = self._clock()
        with self._guarded("write", "the coordinator's store"):
            self._blobs.put_large(changes.blobs)
            with self._engine.begin() as connection:
                self._blobs.put(connection, changes.blobs)
                for table, rows in _rows(changes, now):
                    if rows:
                        connection.execute(_UPSERT[table.name], rows)

    def active_experiments(self) -> list[Experiment]:
        """Those that have not ended, oldest first."""
        ended = [state.value for state in ExperimentState if state.has_ended]
        query = sa.select(_experiments.c.document).where(_experiments.c.state.not_in(ended))
        rows = self._all(query.order_by(_experiments.c.create_time))
        return [_load(_EXPERIMENT, row.document) for row in rows]

    def experiment(self, experiment_id: str) -> Experiment | None:
        """One experiment, or None."""
        query = sa.select(_experiments.c.document).where(_experiments.c.experiment_id == experiment_id)
        rows = self._all(query)
        return _load(_EXPERIMENT, rows[0].document) if rows else None

    def experiments(self, limit: int, offset: int) -> list[Experiment]:
        """A page of experiments, newest first."""
        order = (_experiments.c.create_time.desc(), _experiments.c.experiment_id)
        query = sa.select(_experiments.c.document).order_by(*order).limit(limit).offset(offset)
        return [_load(_EXPERIMENT, row.document) for row in self._all(query)]

    def task(self, task_id: str) -> TaskRecord | None:
        """One task, or None if it was never offered."""
        rows = self._all(sa.select(_tasks.c.document).where(_tasks.c.task_id == task_id))
        return _load(_TASK, rows[0].document) if rows else None

    def round_tasks(self, experiment_id: str, round_number: int) -> list[TaskRecord]:
        """The tasks of a round, all kinds and attempts."""
        place = (_tasks.c.experiment_id == experiment_id) & (_tasks.c.round_number == round_number)
        return [_load(_TASK, row.document) for row in self._all(sa.select(_tasks.c.document).where(place))]

    def checkpoint(self, experiment_id: str) -> Checkpoint | None:
        """What an experiment has learned so far, or None before its initial tensors exist."""
        query = sa.select(_checkpoints.c.document).where(_checkpoints.c.experiment_id == experiment_id)
        rows = self._all(query.order_by(_checkpoints.c.round_number.desc()).limit(1))
        return _load(_CHECKPOINT, rows[0].document) if rows else None

    def silos(self) -> list[SiloRecord]:
        """Every silo ever met, by name."""
        rows = self._all(sa.select(_silos.c.document).order_by(_silos.c.silo_id))
        return [_load(_SILO, row.document) for row in rows]

    def events(self, after: int, experiment_id: str, limit: int) -> list[NumberedEvent]:
        """Events after a number, oldest first; of one experiment unless the id is empty."""
        query = sa.select(_events).where(_events.c.number > after)
        if experiment_id:
            query = query.where(_events.c.experiment_id == experiment_id)
        rows = self._all(query.order_by(_events.c.number).limit(limit))
        return [NumberedEvent(row.number, row.time, _load_event(row.document)) for row in rows]

    def blob(self, ref: TensorsRef) -> memoryview:
        """The packed bytes of tensors. Raises `StorageError` if they are missing or damaged."""
        with self._guarded("read", "the coordinator's store"), self._engine.connect() as connection:
            return self._blobs.get(connection, ref.sha256)

    def _all(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        with self._guarded("read", "the coordinator's store"), self._engine.connect() as connection:
            return connection.execute(query).all()

    def _guarded(self, action: str, what: Path | str) -> AbstractContextManager[None]:
        return _Guard(action, what)


class _Guard(AbstractContextManager[None]):
    """Turns what the database raises into a `StorageError` that says what to do."""

    def __init__(self, action: str, what: Path | str) -> None:
        self._action, self._what = action, what

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise storage_error(self._action, Path(self._what), error) from error
        if isinstance(error, sa.exc.DBAPIError):
            raise StorageError(
                f"cannot {self._action} {self._what}: {error.orig}; check free space, file modes and the disk"
            ) from error


def _configure(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _rows(changes: Changes, now: float) -> Iterator[tuple[sa.Table, list[dict[str, Any]]]]:
    yield (
        _experiments,
        [
            {
                "experiment_id": experiment.experiment_id,
                "state": experiment.state.value,
                "create_time": experiment.create_time,
                "document": _dump(_EXPERIMENT, experiment),
            }
            for experiment in changes.experiments.values()
        ],
    )
    yield (
        _tasks,
        [
            {
                "task_id": task.task_id,
                "experiment_id": task.experiment_id,
                "round_number": task.round_number,
                "document": _dump(_TASK, task),
            }
            for task in changes.tasks.values()
        ],
    )
    yield (
        _checkpoints,
        [
            {
                "experiment_id": checkpoint.experiment_id,
                "round_number": checkpoint.round_number,
                "document": _dump(_CHECKPOINT, checkpoint),
            }
            for checkpoint in changes.checkpoints
        ],
    )
    yield (
        _silos,
        [{"silo_id": silo.silo_id, "document": _dump(_SILO, silo)} for silo in changes.silos.values()],
    )
    yield (
        _events,
        [
            {"time": now, "experiment_id": getattr(event, "experiment_id", ""), "document": _dump_event(event)}
            for event in changes.events
        ],
    )
