"""Tensor bytes by digest: small ones live in the database, large ones as files beside it. Nothing is ever rewritten."""

import hashlib
import mmap
from pathlib import Path

import sqlalchemy as sa

from fedrt.errors import StorageError
from fedrt.statefile import ensure_private_directory, write_atomic

INLINE_BYTES = 1 << 20  # up to here one commit of the database is cheaper than two synchronised files

metadata = sa.MetaData()
blobs_table = sa.Table(
    "blobs",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("byte_count", sa.BigInteger, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=True),
)


class Blobs:
    """Content-addressed bytes. Used by the store's thread only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._intact: set[str] = set()  # large blobs that this process has written or checked
        ensure_private_directory(directory)

    def put_large(self, blobs: dict[str, memoryview]) -> None:
        """Make the large blobs durable before the transaction that names them. Raises `StorageError`."""
        for digest, data in blobs.items():
            path = self._path(digest)
            if len(data) > INLINE_BYTES and not path.exists():
                ensure_private_directory(path.parent)
                write_atomic(path, data)
                self._intact.add(digest)

    def put(self, connection: sa.Connection, blobs: dict[str, memoryview]) -> None:
        """Record the blobs, with their bytes where they are small."""
        for digest, data in blobs.items():
            known = connection.execute(sa.select(blobs_table.c.sha256).where(blobs_table.c.sha256 == digest)).first()
            if known is None:
                inline = bytes(data) if len(data) <= INLINE_BYTES else None
                connection.execute(blobs_table.insert().values(sha256=digest, byte_count=len(data), data=inline))

    def get(self, connection: sa.Connection, digest: str) -> memoryview:
        """The bytes; a large blob is mapped, not read. Raises `StorageError` if they are missing or damaged."""
        row = connection.execute(sa.select(blobs_table).where(blobs_table.c.sha256 == digest)).first()
        if row is None:
            raise StorageError(f"blob {digest} is missing from the store; restore the state directory from a backup")
        data = memoryview(row.data) if row.data is not None else self._map(digest)
        damaged = digest not in self._intact and hashlib.sha256(data).hexdigest() != digest
        if damaged or len(data) != row.byte_count:
            raise StorageError(f"blob {digest} is damaged; restore the state directory from a backup")
        if row.data is None:
            self._intact.add(digest)
        return data

    def _map(self, digest: str) -> memoryview:
        try:
            with self._path(digest).open("rb") as file:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise StorageError(
                f"blob file '{self._path(digest)}' cannot be read ({error}); restore the state directory from a backup"
            ) from error

    def _path(self, digest: str) -> Path:
        return self._directory / digest[:2] / digest
