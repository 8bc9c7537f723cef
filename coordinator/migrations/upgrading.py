"""Brings a database to the newest revision, with Alembic: all revisions in one transaction, or none."""

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory

from coordinator.migrations import FIRST, HEAD


def script_directory() -> ScriptDirectory:
    """The revisions in `versions`."""
    return ScriptDirectory(str(Path(__file__).parent))


def upgrade(path: Path, revision: str | None) -> None:
    """Run what lies between `revision`, None for an empty database, and the newest one.

    Raises what the database raises; then, as after a kill at any moment, the database is as it was.
    """
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), poolclass=sa.pool.NullPool)
    sa.event.listen(engine, "connect", _leave_transactions_to_us)
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    script = script_directory()
    with engine.begin() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"fn": lambda heads, _: script._upgrade_revs(HEAD, heads), "transactional_ddl": True},
        )
        if revision == FIRST:
            context.stamp(script, FIRST)  # the first release wrote no revision down
        with Operations.context(context):
            context.run_migrations()


def _leave_transactions_to_us(connection: Any, record: object) -> None:
    connection.isolation_level = None  # Python's driver would not begin one before CREATE or ALTER
    connection.execute("PRAGMA synchronous = FULL")
