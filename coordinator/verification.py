"""Looks at everything in the store: each record, each blob to the last bit, what nothing needs; changes nothing.

It may run beside a coordinator. Meanwhile it holds the lock that keeps garbage collection from removing what it is
about to read.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from coordinator import tables
from coordinator.backup_lock import keeping_blobs
from coordinator.blobs import blobs_table, lies_in_file
from coordinator.documents import CHECKPOINT, EXPERIMENT, SILO, TASK, load_event
from coordinator.integrity import Damage, damage_of_active, damage_of_blobs, database_damage, listed, readable
from coordinator.records import TaskRecord
from coordinator.store import Store
from fedrt.errors import DamageError, StorageError

_CHUNK = 1000  # rows that are in memory at the same time


@dataclass
class Report:
    """What was looked at, and what is wrong with it."""

    records: dict[str, int] = field(default_factory=dict)  # by table
    blob_count: int = 0
    blob_bytes: int = 0
    forgotten_update_count: int = 0
    unneeded_blob_count: int = 0  # garbage collection removes them
    unneeded_file_count: int = 0
    damage: list[Damage] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    def as_json(self) -> dict[str, Any]:
        """All of it, every damage included."""
        return {"whole": self.whole, **asdict(self)}

    def as_text(self) -> str:
        """One screen."""
        counted = ", ".join(f"{count} {name}" for name, count in self.records.items())
        lines = [
            f"records: {counted}",
            f"blobs: {self.blob_count} that are needed, with {self.blob_bytes / 2**20:.1f} MiB",
            f"updates that were forgotten: {self.forgotten_update_count}",
            f"not needed: {self.unneeded_blob_count} blobs and {self.unneeded_file_count} files; garbage collection "
            "removes them",
        ]
        if self.whole:
            return "\n".join([*lines, "The store is whole."])
        count = f"{len(self.damage)} problem{'s' if len(self.damage) > 1 else ''}"
        verdict = f"The store is damaged ({count}). Restore the state directory from a backup."
        return "\n".join([*lines, verdict, *(f"  {line}" for line in listed(self.damage))])


def verify(state_directory: Path) -> Report:
    """Look at everything. Raises `StorageError` if there is no store, or one that this fedrt cannot read."""
    store = Store(state_directory, read_only=True)
    try:
        with keeping_blobs(state_directory):
            return _verified(store)
    finally:
        store.close()


def _verified(store: Store) -> Report:
    report = Report(damage=database_damage(store, "integrity_check"))
    for check in (_check_records, _check_blobs, _check_active):
        try:
            check(store, report)
        except StorageError as error:  # SQLite cannot read on
            report.damage.append(Damage(str(error)))
    return report


def _check_records(store: Store, report: Report) -> None:
    for table in (tables.experiments, tables.tasks, tables.checkpoints, tables.silos, tables.events):
        count = 0
        for row in _all_rows(store, table):
            count += 1
            if not _agrees(table, row):
                name = getattr(row, "experiment_id", "")
                where = ", ".join(repr(row._mapping[column.name]) for column in table.primary_key)
                damage = Damage(f"record {where} of the table {table.name} is damaged", (name,) if name else ())
                report.damage.append(damage)
        report.records[table.name] = count
    report.forgotten_update_count = store.rows(sa.select(sa.func.count()).where(tables.forgotten))[0][0]


def _agrees(table: sa.Table, row: sa.Row[Any]) -> bool:
    """Whether the document can be read and the columns beside it say the same."""
    expected: Callable[[Any], dict[str, Any]]
    match table.name:
        case "experiments":
            record, expected = readable(EXPERIMENT, row.document), tables.experiment_row
        case "tasks":
            record, expected = readable(TASK, row.document), tables.task_row
        case "checkpoints":
            record, expected = readable(CHECKPOINT, row.document), tables.checkpoint_row
        case "silos":
            record, expected = readable(SILO, row.document), tables.silo_row
        case _:
            return _is_event(row.document)
    if record is None:
        return False
    columns = {name: value for name, value in expected(record).items() if name != "document"}
    if isinstance(record, TaskRecord) and row.tensors_sha256 is None:
        columns["tensors_sha256"] = None  # they have been forgotten
    return all(row._mapping[name] == value for name, value in columns.items())


def _is_event(document: str) -> bool:
    try:
        load_event(document)
    except DamageError:
        return False
    return True


def _check_blobs(store: Store, report: Report) -> None:
    problems: dict[str, str] = {}
    needed = {row.sha256 for row in store.rows(sa.select(tables.needed_blobs.c.sha256))}
    rows = store.rows(sa.select(blobs_table.c.sha256, blobs_table.c.byte_count))
    sizes = {row.sha256: row.byte_count for row in rows}
    for digest in sorted(needed):
        try:
            problem = store.blob_problem(digest)
        except StorageError as error:
            problem = f"blob {digest}: {error}"
        if problem is not None:
            problems[digest] = problem
    report.damage += damage_of_blobs(store, problems)
    report.blob_count = len(needed)
    report.blob_bytes = sum(sizes.get(digest, 0) for digest in needed)
    report.unneeded_blob_count = len(sizes.keys() - needed)
    report.unneeded_file_count = sum(not lies_in_file(sizes.get(name, 0)) for name in store.blobs.files())


def _check_active(store: Store, report: Report) -> None:
    known = {damage.what for damage in report.damage}
    report.damage += [damage for damage in damage_of_active(store) if damage.what not in known]


def _all_rows(store: Store, table: sa.Table) -> Iterator[sa.Row[Any]]:
    place: sa.Label[int] = sa.literal_column(f"{table.name}.rowid", sa.Integer).label("place")
    after = -1
    while rows := store.rows(sa.select(table, place).where(place > after).order_by(place).limit(_CHUNK)):
        yield from rows
        after = rows[-1].place
