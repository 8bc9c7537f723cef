"""Tensor bytes by digest: small ones live in the database, large ones as files beside it. Nothing is ever rewritten."""

import contextlib
import errno
import hashlib
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from fedrt.errors import DamageError, StorageError
from fedrt.statefile import ensure_private_directory, move_durably, remove_unfinished, storage_error, write_atomic

INLINE_BYTES = 1 << 20  # up to here one commit of the database is cheaper than two synchronised files


@dataclass(frozen=True)
class Landed:
    """A large blob that was written to a file while it arrived; not yet durable, and moved when it becomes so."""

    path: Path
    byte_count: int


Blob = memoryview | Landed


def remove_arrival(path: Path) -> None:
    """Remove a file that nobody takes over; if the disk refuses, the next start clears the directory it lies in."""
    with contextlib.suppress(OSError):
        path.unlink()


def blob_size(blob: Blob) -> int:
    """Bytes of a blob."""
    return blob.byte_count if isinstance(blob, Landed) else len(blob)


def lies_in_file(byte_count: int) -> bool:
    """Whether a blob of this size is a file `blobs/<digest>` and not in the database."""
    return byte_count > INLINE_BYTES


metadata = sa.MetaData()
blobs_table = sa.Table(
    "blobs",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("byte_count", sa.BigInteger, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=True),
)


_LOST = {errno.ENOENT, errno.EIO, errno.EISDIR}  # others pass: file modes, too many open files, no memory
_DIGEST = re.compile(r"[0-9a-f]{64}")
_INSERT = insert(blobs_table).on_conflict_do_nothing()
_SELECT = sa.select(blobs_table).where(blobs_table.c.sha256 == sa.bindparam("digest"))


class Blobs:
    """Content-addressed bytes. Used by the store's thread only."""

    def __init__(self, directory: Path, read_only: bool = False) -> None:
        self._directory = directory
        self._intact: set[str] = set()  # large blobs that this process has written or checked
        self._unsettled: set[str] = set()  # large blobs of a commit that is not through; it may be tried again
        self._taken_in: list[Path] = []  # files of small blobs that this commit puts into the database
        if read_only:
            return
        ensure_private_directory(directory)
        remove_unfinished(directory)

    def put_large(self, blobs: Mapping[str, Blob]) -> None:
        """Make the large blobs durable before the transaction that names them. Raises `StorageError`.

        A file that is there already, and of which this process knows nothing, is replaced: it may be damaged.
        """
        large = {digest: blob for digest, blob in blobs.items() if lies_in_file(blob_size(blob))}
        self._unsettled |= large.keys()
        for digest, blob in large.items():
            path = self.path(digest)
            if digest in self._intact and path.exists():
                if isinstance(blob, Landed):
                    remove_arrival(blob.path)
                continue
            if isinstance(blob, Landed):
                moved = not blob.path.exists()  # by an attempt that failed in the next moment
                move_durably(path if moved else blob.path, path)
            else:
                write_atomic(path, blob)
            self._intact.add(digest)

    def settle(self) -> None:
        """The transaction that names the blobs is through; without it they are what nothing needs."""
        self._unsettled.clear()
        while self._taken_in:
            remove_arrival(self._taken_in.pop())

    def unsettled(self, digest: str) -> bool:
        """Whether a commit that was not through has put this large blob, and may be tried again."""
        return digest in self._unsettled

    def files(self) -> list[str]:
        """The digests of all large blobs that lie there, whether anything needs them or not. Raises `StorageError`."""
        try:
            return sorted(path.name for path in self._directory.iterdir() if _DIGEST.fullmatch(path.name))
        except OSError as error:
            raise storage_error("list", self._directory, error) from error

    def remove_file(self, digest: str) -> int:
        """Remove a large blob that nothing needs; returns its bytes, 0 if it was not there. Raises `StorageError`.

        Whoever has it mapped keeps what they have.
        """
        path = self.path(digest)
        self._intact.discard(digest)
        try:
            byte_count = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise storage_error("remove", path, error) from error
        return byte_count

    def put(self, connection: sa.Connection, blobs: Mapping[str, Blob]) -> None:
        """Record the blobs, with their bytes where they are small, one after the other: there may be many."""
        for digest, blob in blobs.items():
            data = None if lies_in_file(blob_size(blob)) else self._bytes_of(blob)
            connection.execute(_INSERT, {"sha256": digest, "byte_count": blob_size(blob), "data": data})

    def _bytes_of(self, blob: Blob) -> bytes:
        if isinstance(blob, memoryview):
            return bytes(blob)
        self._taken_in.append(blob.path)  # a small one for which there was no memory when it arrived
        try:
            return blob.path.read_bytes()
        except OSError as error:
            raise storage_error("read", blob.path, error) from error

    def get(self, connection: sa.Connection, digest: str) -> memoryview:
        """The bytes; a large blob is mapped, not read.

        Raises `DamageError` if they are missing or damaged, and `StorageError` if they cannot be read now.
        """
        row = connection.execute(_SELECT, {"digest": digest}).first()
        known = row is not None and row.data is None and digest in self._intact
        problem = None if known else self._problem(row, digest)
        if row is not None and problem is None:
            data = memoryview(row.data) if row.data is not None else self._map(digest)
            if len(data) == row.byte_count:
                return data
            problem = f"blob {digest} is damaged"
        raise DamageError(f"{problem}; restore the state directory from a backup")

    def problem(self, connection: sa.Connection, digest: str) -> str | None:
        """What is wrong with a blob, after reading it from the first byte to the last; None if it is whole."""
        try:
            return self._problem(connection.execute(_SELECT, {"digest": digest}).first(), digest)
        except StorageError as error:
            return str(error)

    def _problem(self, row: sa.Row[Any] | None, digest: str) -> str | None:
        if row is None:
            return f"blob {digest} is missing from the store"
        if row.data is not None:
            whole = len(row.data) == row.byte_count and hashlib.sha256(row.data).hexdigest() == digest
            return None if whole else f"blob {digest} is damaged"
        try:
            with self.path(digest).open("rb") as file:  # not mapped: a sector that cannot be read is an error then
                whole = os.fstat(file.fileno()).st_size == row.byte_count
                whole = whole and hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError as error:
            self._check_lost(digest, error)
            return f"blob file '{self.path(digest)}' cannot be read ({error.strerror})"
        if whole:
            self._intact.add(digest)
        return None if whole else f"blob {digest} is damaged"

    def _map(self, digest: str) -> memoryview:
        try:
            with self.path(digest).open("rb") as file:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                self._check_lost(digest, error)
            raise DamageError(
                f"blob file '{self.path(digest)}' cannot be read ({error}); restore the state directory from a backup"
            ) from error

    def _check_lost(self, digest: str, error: OSError) -> None:
        """Raise `StorageError` unless the error says that the bytes are lost: then they may be read later."""
        if error.errno not in _LOST:
            raise storage_error("read", self.path(digest), error) from error

    def path(self, digest: str) -> Path:
        """Where a large blob lies."""
        return self._directory / digest
