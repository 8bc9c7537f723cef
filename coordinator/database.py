"""The connection to the coordinator's SQLite file: how durable it is, and what its errors mean to an operator."""

import sqlite3
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from fedrt.errors import DamageError, StorageError
from fedrt.statefile import storage_error

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_PRIMARY = 0xFF  # SQLite's extended codes have the primary one in the lowest byte


def connect(path: Path, read_only: bool = False) -> sa.Engine:
    """One connection, for one thread at a time. With `read_only` the file has to be there and is not written to."""

    def open_read_only() -> sqlite3.Connection:
        return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, check_same_thread=False)

    if read_only:
        return sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool, creator=open_read_only)
    url = sa.URL.create("sqlite", database=str(path))  # as text, a "?" in a path would begin options
    engine = sa.create_engine(url, poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
    sa.event.listen(engine, "connect", _configure)
    return engine


class Guard(AbstractContextManager[None]):
    """Turns what the database raises into a `StorageError` that says what to do; into a `DamageError` for damage."""

    def __init__(self, action: str, path: Path | None = None) -> None:
        self._action, self._path = action, path

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise storage_error(self._action, self._path or Path("coordinator.db"), error) from error
        if isinstance(error, sa.exc.DBAPIError | sqlite3.Error):
            reason = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            store = f"'{self._path}'" if self._path else "the coordinator's store"
            failed = f"cannot {self._action} {store}: {reason}"
            if getattr(reason, "sqlite_errorcode", 0) & _PRIMARY in _DAMAGED:
                raise DamageError(f"{failed}; it is damaged: restore the state directory from a backup") from error
            raise StorageError(f"{failed}; check free space, file modes and the disk") from error


def _configure(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()
