"""Stores of earlier schemas, from `tests/golden/stores`: what that version wrote, as SQL."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np

from coordinator.blobs import INLINE_BYTES
from fedrt.payload import pack
from tests.samples import sha256_hex

STORES = Path(__file__).parent.parent / "golden" / "stores"


def make_store(directory, revision="0001"):
    """Write the state directory of a coordinator of that schema, stopped."""
    directory.mkdir(mode=0o700)
    with closing(sqlite3.connect(directory / "coordinator.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript((STORES / f"{revision}.sql").read_text("utf-8"))
    (directory / "coordinator.db").chmod(0o600)
    (directory / "blobs").mkdir(mode=0o700)
    large = pack({"context": np.full(INLINE_BYTES // 4 + 1, 30.25, np.float32)})  # the one that lies in a file
    path = directory / "blobs" / sha256_hex(large)
    path.write_bytes(large)
    path.chmod(0o600)
    return path


def query(directory, sql, *parameters):
    """The rows that a statement gives in the database of a state directory."""
    with closing(sqlite3.connect(directory / "coordinator.db")) as connection:
        rows = connection.execute(sql, parameters).fetchall()
        connection.commit()
    return rows


def schema(directory):
    """Everything that the database declares, the text of it included."""
    return sorted(query(directory, "SELECT type, name, tbl_name, sql FROM sqlite_master"), key=str)
