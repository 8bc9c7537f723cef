"""Tensor bytes by digest: small ones live in the database, large ones as files beside it. Nothing is ever rewritten."""

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from fedrt.errors import DamageError
from fedrt.statefile import ensure_private_directory, move_durably, remove_unfinished, write_atomic

INLINE_BYTES = 1 << 20  # up to here one commit of the database is cheaper than two synchronised files


@dataclass(frozen=True)
class Landed:
    """A large blob that was written to a file while it arrived; not yet durable, and moved when it becomes so."""

    path: Path
    byte_count: int


Blob = memoryview | Landed


def blob_size(blob: Blob) -> int:
    """Bytes of a blob."""
    return blob.byte_count if isinstance(blob, Landed) else len(blob)


metadata = sa.MetaData()
blobs_table = sa.Table(
    "blobs",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("byte_count", sa.BigInteger, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=True),
)


_INSERT = insert(blobs_table).on_conflict_do_nothing()
_SELECT = sa.select(blobs_table).where(blobs_table.c.sha256 == sa.bindparam("digest"))


class Blobs:
    """Content-addressed bytes. Used by the store's thread only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._intact: set[str] = set()  # large blobs that this process has written or checked
        ensure_private_directory(directory)
        remove_unfinished(directory)

    def put_large(self, blobs: Mapping[str, Blob]) -> None:
        """Make the large blobs durable before the transaction that names them. Raises `StorageError`."""
        for digest, blob in blobs.items():
            path = self._path(digest)
            if isinstance(blob, memoryview) and len(blob) <= INLINE_BYTES:
                continue  # a small one may lie in a file, too, if there was no memory for it when it arrived
            if path.exists():
                if isinstance(blob, Landed):
                    blob.path.unlink(missing_ok=True)
                continue
            if isinstance(blob, Landed):
                move_durably(blob.path, path)
            else:
                write_atomic(path, blob)
            self._intact.add(digest)

    def put(self, connection: sa.Connection, blobs: Mapping[str, Blob]) -> None:
        """Record the blobs, with their bytes where they are small."""
        rows = [
            {
                "sha256": digest,
                "byte_count": blob_size(blob),
                "data": bytes(blob) if isinstance(blob, memoryview) and len(blob) <= INLINE_BYTES else None,
            }
            for digest, blob in blobs.items()
        ]
        if rows:
            connection.execute(_INSERT, rows)

    def get(self, connection: sa.Connection, digest: str) -> memoryview:
        """The bytes; a large blob is mapped, not read. Raises `StorageError` if they are missing or damaged."""
        row = connection.execute(_SELECT, {"digest": digest}).first()
        if row is None:
            raise DamageError(f"blob {digest} is missing from the store; restore the state directory from a backup")
        data = memoryview(row.data) if row.data is not None else self._map(digest)
        damaged = digest not in self._intact and hashlib.sha256(data).hexdigest() != digest
        if damaged or len(data) != row.byte_count:
            raise DamageError(f"blob {digest} is damaged; restore the state directory from a backup")
        if row.data is None:
            self._intact.add(digest)
        return data

    def _map(self, digest: str) -> memoryview:
        try:
            with self._path(digest).open("rb") as file:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise DamageError(
                f"blob file '{self._path(digest)}' cannot be read ({error}); restore the state directory from a backup"
            ) from error

    def _path(self, digest: str) -> Path:
        return self._directory / digest
