"""Judges which schema a store has, and brings an older one up to date before it is used."""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa
import structlog

from coordinator.database import Guard
from coordinator.migrations import FIRST, HEAD, REVISIONS
from fedrt.errors import DamageError, StorageError
from fedrt.statefile import write_atomic_by

_USER_VERSION_OF_FIRST = 2  # 1 kept an experiment's seed elsewhere


def make_current(engine: sa.Engine, path: Path) -> None:
    """Let the database at `path` have the newest schema; what is migrated is copied beside it before.

    Raises `StorageError` if it was written by another fedrt than this one can follow, or if the disk refuses.
    """
    with engine.connect() as connection:
        revision = revision_of(connection, path)
    if revision == HEAD:
        return
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of each plugin and step, from its import on
    from coordinator.migrations.upgrading import upgrade  # noqa: PLC0415  # a start with a current schema is quicker

    copy = path.with_name(f"{path.name}.before-{HEAD}")
    if revision is not None:
        for unfinished in path.parent.glob(f".{copy.name}.*"):
            unfinished.unlink(missing_ok=True)
        write_atomic_by(copy, lambda target: _copy(path, target))
    with Guard("migrate", path):
        try:
            upgrade(path, revision)
        except sa.exc.OperationalError as error:
            if "malformed JSON" not in str(error.orig):
                raise
            raise DamageError(
                f"store '{path}' has a damaged record and cannot be migrated; it is as it was: restore a backup"
            ) from error
    if revision is not None:
        log = structlog.get_logger("coordinator")
        log.info("store migrated", before=revision, now=HEAD, copy_of_the_database=str(copy))


def check_current(connection: sa.Connection, path: Path) -> None:
    """Raise `StorageError` unless the database has the newest schema."""
    revision = revision_of(connection, path)
    if revision != HEAD:
        raise StorageError(
            f"store '{path}' has schema {revision or 'none'}, and this fedrt reads {HEAD}; start the coordinator once, "
            "it migrates the store"
        )


def revision_of(connection: sa.Connection, path: Path) -> str | None:
    """The revision of a database, or None before its first.

    Raises `StorageError` if it was written by another fedrt than this one can follow.
    """
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    stamped = connection.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").first()
    if not version:
        return None
    if version < _USER_VERSION_OF_FIRST:
        raise StorageError(
            f"store '{path}' was written by a development version of fedrt (schema {version}, this one knows "
            f"{HEAD}); keep that version for its experiments, or start with an empty state directory"
        )
    if stamped:
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()
    else:
        found = FIRST if version == _USER_VERSION_OF_FIRST else str(version)
    if found not in REVISIONS:
        raise StorageError(
            f"store '{path}' was written by a newer fedrt (schema {found}, this one knows {HEAD}); install the newer "
            "version"
        )
    return str(found)


def _copy(source: Path, target: Path) -> None:
    with Guard("copy", source), closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)
