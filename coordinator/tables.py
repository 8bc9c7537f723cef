"""The tables of the coordinator's database, and the rows that `Changes` become in them.

`coordinator.migrations` makes the tables; a test compares. A change of a table is a new revision there.
"""

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from coordinator.blobs import metadata
from coordinator.documents import CHECKPOINT, EXPERIMENT, SILO, TASK, dump, dump_event
from coordinator.experiments import Experiment
from coordinator.records import Changes, Checkpoint, SiloRecord, TaskRecord

experiments = sa.Table(
    "experiments",
    metadata,
    sa.Column("experiment_id", sa.String(63), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("create_time", sa.Float, nullable=False, index=True),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("end_time", sa.Float),
)
tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("task_id", sa.String(200), primary_key=True),
    sa.Column("experiment_id", sa.String(63), nullable=False),
    sa.Column("round_number", sa.Integer, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("tensors_sha256", sa.String(64), index=True),  # none also once they have been forgotten
    sa.Index("tasks_by_round", "experiment_id", "round_number"),
)
checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("experiment_id", sa.String(63), primary_key=True),
    sa.Column("round_number", sa.Integer, primary_key=True),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("shared_sha256", sa.String(64), index=True),
    sa.Column("memory_sha256", sa.String(64), index=True),
)
silos = sa.Table(
    "silos",
    metadata,
    sa.Column("silo_id", sa.String(63), primary_key=True),
    sa.Column("document", sa.Text, nullable=False),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("experiment_id", sa.String(63), nullable=False, index=True),
    sa.Column("document", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)

needed_blobs = sa.union(
    sa.select(tasks.c.tensors_sha256.label("sha256")).where(tasks.c.tensors_sha256.is_not(None)),
    sa.select(checkpoints.c.shared_sha256),
    sa.select(checkpoints.c.memory_sha256).where(checkpoints.c.memory_sha256.is_not(None)),
).subquery("needed_blobs")
"""The digests of all blobs that a task or a checkpoint needs, each once."""

_digest_in_document = sa.case(
    (sa.func.json_valid(tasks.c.document), sa.func.json_extract(tasks.c.document, "$.tensors.sha256")), else_=None
)
forgotten = tasks.c.tensors_sha256.is_(None) & _digest_in_document.is_not(None)
"""Whether the store no longer keeps the tensors of a task that had some."""


def _upsert(table: sa.Table) -> sa.Insert:
    statement = insert(table)
    keys = [column.name for column in table.primary_key]
    others = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=others)


# Built once: building a statement costs more than executing it.
UPSERT: dict[str, sa.Insert] = {table.name: _upsert(table) for table in (experiments, tasks, checkpoints, silos)} | {
    events.name: insert(events)
}


def experiment_row(experiment: Experiment) -> dict[str, Any]:
    """What the table of experiments holds of one."""
    return {
        "experiment_id": experiment.experiment_id,
        "state": experiment.state.value,
        "create_time": experiment.create_time,
        "document": dump(EXPERIMENT, experiment),
        "end_time": experiment.end_time,
    }


def task_row(task: TaskRecord) -> dict[str, Any]:
    """What the table of tasks holds of one, until its tensors are forgotten."""
    return {
        "task_id": task.task_id,
        "experiment_id": task.experiment_id,
        "round_number": task.round_number,
        "document": dump(TASK, task),
        "tensors_sha256": task.tensors.sha256 if task.tensors else None,
    }


def checkpoint_row(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the table of checkpoints holds of one."""
    return {
        "experiment_id": checkpoint.experiment_id,
        "round_number": checkpoint.round_number,
        "document": dump(CHECKPOINT, checkpoint),
        "shared_sha256": checkpoint.shared.sha256,
        "memory_sha256": checkpoint.memory.sha256 if checkpoint.memory else None,
    }


def silo_row(silo: SiloRecord) -> dict[str, Any]:
    """What the table of silos holds of one."""
    return {"silo_id": silo.silo_id, "document": dump(SILO, silo)}


def rows_of(changes: Changes, now: float) -> Iterator[tuple[sa.Table, list[dict[str, Any]]]]:
    """The rows of each table; events happen `now`, in Unix seconds."""
    yield experiments, [experiment_row(experiment) for experiment in changes.experiments.values()]
    yield tasks, [task_row(task) for task in changes.tasks.values()]
    yield checkpoints, [checkpoint_row(checkpoint) for checkpoint in changes.checkpoints]
    yield silos, [silo_row(silo) for silo in changes.silos.values()]
    yield (
        events,
        [
            {"time": now, "experiment_id": getattr(event, "experiment_id", ""), "document": dump_event(event)}
            for event in changes.events
        ],
    )
