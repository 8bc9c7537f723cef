"""A disk that refuses when the runner says so: what the product calls to write fails as the system would fail it."""

import functools
import sqlite3
from pathlib import Path
from typing import Any

from tests.chaos.crash_points import COMMIT, Role, find
from tests.chaos.hooks import Hooks

WRITING = ("fedrt.statefile:_create", "fedrt.statefile:_fill", "fedrt.statefile:_sync", "pathlib:Path.replace")
SILO_WRITING = ("silo.departures:append",)
COORDINATOR_INTAKE = "coordinator.intake:Intake.write"
CONNECT = "sqlite3.dbapi2:connect"  # what the coordinator's database driver calls


def install(role: Role, hooks: Hooks) -> None:
    """Let this process see a refusing disk. Raises `LookupError` if the product has changed."""
    for place in (*WRITING, *(SILO_WRITING if role is Role.SILO else ())):
        _refuse(place, hooks)
    _refuse_removal(hooks)
    if role is Role.COORDINATOR:
        _refuse_intake(hooks)
        _wrap_database(hooks)


def _refuse(place: str, hooks: Hooks) -> None:
    owner, name, function = find(place)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if (refusal := hooks.refusal) is not None:
            raise refusal
        return function(*arguments, **named)

    setattr(owner, name, call)


def _refuse_removal(hooks: Hooks) -> None:
    """A full disk lets files go; one that is read-only does not."""
    unlink = Path.unlink

    @functools.wraps(unlink)
    def call(self: Path, missing_ok: bool = False) -> None:
        refusal = hooks.refusal
        if refusal is not None and "read-only" in str(refusal).lower() and self.is_relative_to(hooks.state):
            raise refusal
        unlink(self, missing_ok)

    Path.unlink = call  # type: ignore[method-assign]


def _refuse_intake(hooks: Hooks) -> None:
    owner, name, function = find(COORDINATOR_INTAKE)
    storage_error = find("fedrt.statefile:storage_error")[2]
    inline = find("coordinator.blobs:INLINE_BYTES")[2]

    @functools.wraps(function)
    def call(self: Any, chunk: bytes | memoryview) -> None:
        refusal = hooks.refusal
        if refusal is not None and self._byte_count > inline:
            raise storage_error("write", self._path, refusal) from refusal
        function(self, chunk)

    setattr(owner, name, call)


def _wrap_database(hooks: Hooks) -> None:
    """Points around the commit of a transaction, and the errors of SQLite on a disk that refuses."""
    owner, name, connect = find(CONNECT)

    class Connection(sqlite3.Connection):
        def commit(self) -> None:
            if not self.in_transaction:
                super().commit()
                return
            hooks.passage(f"{COMMIT} before")
            _refuse_sql(hooks)
            super().commit()
            hooks.passage(f"{COMMIT} after")

        def cursor(self, *arguments: Any, **named: Any) -> sqlite3.Cursor:
            return super().cursor(Cursor)

    class Cursor(sqlite3.Cursor):
        def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            if statement.lstrip()[:6].upper() in ("INSERT", "UPDATE", "DELETE", "CREATE"):
                _refuse_sql(hooks)
            return super().execute(statement, *arguments)

    setattr(owner, name, functools.partial(connect, factory=Connection))


def _refuse_sql(hooks: Hooks) -> None:
    refusal = hooks.refusal
    if refusal is not None:
        full = "No space" in str(refusal)
        text = "database or disk is full" if full else "attempt to write a readonly database"
        raise sqlite3.OperationalError(text)
