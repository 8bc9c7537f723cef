"""Checks at every start whether the store holds what experiments need; `verification` looks at everything else.

What an experiment under way needs must be there to the last bit, or the coordinator does not start: better no
federation than a wrong model. Damage of what only a look back needs is told, and nothing waits for it. A file or a row
that nothing needs is no damage: a crash may leave it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog

from coordinator import tables
from coordinator.blobs import blobs_table
from coordinator.documents import CHECKPOINT, EXPERIMENT, TASK, load
from coordinator.experiments import Experiment, ExperimentState
from coordinator.records import Checkpoint, TaskRecord
from coordinator.rounds import AskState
from coordinator.store import Store
from fedrt.errors import DamageError, StorageError
from fedrt.task import TaskKind

MAX_LINES = 20
_MAX_NAMES = 3
_CHUNK = 1000  # digests in one query


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong, and which experiments have to do with it."""

    what: str
    experiment_ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.experiment_ids:
            return self.what
        names = ", ".join(repr(name) for name in self.experiment_ids[:_MAX_NAMES])
        more = len(self.experiment_ids) - _MAX_NAMES
        return f"{self.what} (experiment {names}{f' and {more} more' if more > 0 else ''})"


def listed(damage: Iterable[Damage]) -> list[str]:
    """A line for each, but at most `MAX_LINES`; then a count of the others."""
    lines = sorted(str(one) for one in damage)
    more = len(lines) - MAX_LINES
    return lines[:MAX_LINES] + ([f"... and {more} more"] if more > 0 else [])


def check_at_start(store: Store) -> None:
    """Look at the database file, at all blobs from outside, and to the last bit at those that work under way needs.

    Raises one `DamageError` that lists what an experiment under way needs and the store has not. Other damage is one
    warning in the log.
    """
    needed = [*database_damage(store, "quick_check"), *damage_of_active(store)]
    if needed:
        raise DamageError(
            "the store is damaged, and experiments that have not ended cannot go on; restore the state directory from "
            "a backup (`fedrt-coordinator verify` looks at everything):\n  " + "\n  ".join(listed(needed))
        )
    if others := blob_damage(store):
        structlog.get_logger("coordinator").warning(
            "the store is damaged, but not where an experiment that has not ended needs it; restore the state "
            "directory from a backup if you need what is lost",
            damage=listed(others),
        )


def database_damage(store: Store, check: str) -> list[Damage]:
    """What SQLite itself finds wrong, by `quick_check` or `integrity_check`, which looks at the indexes too."""
    try:
        rows = store.rows(sa.text(f"PRAGMA {check}({MAX_LINES + 1})"))
    except StorageError as error:
        return [Damage(f"the database: {error}")]
    return [Damage(f"the database: {row[0]}") for row in rows if row[0] != "ok"]


def damage_of_active(store: Store) -> list[Damage]:
    """What experiments that have not ended need for their next step, and is not there to the last bit."""
    ended = [state.value for state in ExperimentState if state.has_ended]
    table = tables.experiments
    rows = store.rows(sa.select(table.c.experiment_id, table.c.document).where(table.c.state.not_in(ended)))
    found: list[Damage] = []
    for row in rows:
        whose = (row.experiment_id,)
        experiment = readable(EXPERIMENT, row.document)
        if experiment is None:
            found.append(Damage("a record of an experiment cannot be read", whose))
            continue
        found += [Damage(what, whose) for what in _damage_of(store, experiment)]
    return found


def blob_damage(store: Store) -> list[Damage]:
    """Blobs that a task or a checkpoint needs and that are missing or of another size; their bytes are not read."""
    needed, blobs = tables.needed_blobs, blobs_table
    join = needed.outerjoin(blobs, blobs.c.sha256 == needed.c.sha256)
    length = sa.func.length(blobs.c.data)
    small_and_right = blobs.c.data.is_not(None) & (length == blobs.c.byte_count)
    columns = (needed.c.sha256, blobs.c.byte_count, length.label("length"))
    rows = store.rows(sa.select(*columns).select_from(join).where(sa.not_(sa.func.coalesce(small_and_right, False))))
    problems = {row.sha256: problem for row in rows if (problem := _seen_from_outside(store, row)) is not None}
    return damage_of_blobs(store, problems)


def damage_of_blobs(store: Store, problems: dict[str, str]) -> list[Damage]:
    """The problems of blobs, by digest, with the experiments that need these."""
    whose = _experiments_by_blob(store, sorted(problems))
    return [Damage(problem, whose.get(digest, ())) for digest, problem in problems.items()]


def readable(adapter: Any, document: str) -> Any:
    """The record of a document, or None if it is damaged."""
    try:
        return load(adapter, document)
    except DamageError:
        return None


def _damage_of(store: Store, experiment: Experiment) -> Iterator[str]:
    name, round_, stage = experiment.experiment_id, experiment.round, experiment.stage
    asks = stage.kept if round_ is None else round_.asks  # a retry may still wait
    aggregates = experiment.shares and stage.kind is not TaskKind.EVALUATE
    table = tables.checkpoints
    query = sa.select(table.c.document).where(table.c.experiment_id == name)
    latest = store.rows(query.order_by(table.c.round_number.desc()).limit(1))
    needed: list[str] = []
    if latest:
        checkpoint: Checkpoint | None = readable(CHECKPOINT, latest[0].document)
        if checkpoint is None:
            yield "the record of the latest checkpoint cannot be read"
        else:
            needed += [ref.sha256 for ref in (checkpoint.shared, checkpoint.memory) if ref]
    elif experiment.shares and experiment.stage.kind is not TaskKind.INITIALIZE:
        yield "there is no checkpoint"
    if asks:
        place = (tables.tasks.c.experiment_id == name) & (tables.tasks.c.round_number == stage.number)
        rows = store.rows(sa.select(tables.tasks.c.task_id, tables.tasks.c.document).where(place))
        documents = {row.task_id: row.document for row in rows}
        for ask in asks:
            task: TaskRecord | None = readable(TASK, documents.get(ask.task_id, ""))
            if task is None:
                yield f"the record of task {ask.task_id!r} is missing or cannot be read"
            elif ask.state is AskState.RETURNED and aggregates:
                needed += [task.tensors.sha256] if task.tensors else []
                if task.tensors is None:
                    yield f"task {ask.task_id!r} has no tensors"
    for digest in needed:
        problem = store.blob_problem(digest)
        if problem is not None:
            yield problem


def _seen_from_outside(store: Store, row: sa.Row[Any]) -> str | None:
    if row.byte_count is None:
        return f"blob {row.sha256} is missing from the store"
    if row.length is not None:
        return f"blob {row.sha256} has {row.length} bytes instead of {row.byte_count}"
    path = store.blobs.path(row.sha256)
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"blob file '{path}' cannot be read ({error.strerror})"
    return None if size == row.byte_count else f"blob file '{path}' has {size} bytes instead of {row.byte_count}"


def _experiments_by_blob(store: Store, digests: list[str]) -> dict[str, tuple[str, ...]]:
    """The names of the experiments that need each of the blobs."""
    found: dict[str, set[str]] = {}
    places = (
        (tables.tasks, tables.tasks.c.tensors_sha256),
        (tables.checkpoints, tables.checkpoints.c.shared_sha256),
        (tables.checkpoints, tables.checkpoints.c.memory_sha256),
    )
    for start in range(0, len(digests), _CHUNK):
        for table, column in places:
            wanted = column.in_(digests[start : start + _CHUNK])
            for row in store.rows(sa.select(table.c.experiment_id, column.label("sha256")).where(wanted).distinct()):
                found.setdefault(row.sha256, set()).add(row.experiment_id)
    return {digest: tuple(sorted(names)) for digest, names in found.items()}
