"""Copies of a coordinator's store that another coordinator can begin from, made beside a running one.

A backup is a directory that is laid out as a state directory is:

    manifest.json    versions, time, and the digests of all the rest
    coordinator.db   the database, by SQLite's online backup: as it was at one moment
    blobs/<sha256>   the large tensors it names: hard links where the file system allows, for a blob is never rewritten

The database is copied first. The files it names were durable before it named them, and none is collected while
`backup.lock` is held, so they are there.
"""

import contextlib
import errno
import hashlib
import os
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from pydantic import TypeAdapter, ValidationError

import fedrt
from coordinator.backup_lock import keeping_blobs
from coordinator.blobs import blobs_table
from coordinator.database import Guard, connect
from coordinator.schema import revision_of
from coordinator.store import FILE_NAME
from coordinator.unfinished import remove_leftovers, unfinished_directory
from fedrt.errors import ConfigurationError, DamageError
from fedrt.statefile import storage_error, sync_directory, write_atomic, write_atomic_by

MANIFEST, DATABASE, BLOBS = "manifest.json", FILE_NAME, "blobs"
FORMAT = 1
_CHUNK_BYTES = 1 << 20
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Piece:
    """A file of a backup: the SHA-256 (hex) of its bytes, and how many they are."""

    sha256: str
    byte_count: int

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.sha256) or self.byte_count < 0:
            raise ValueError("no digest and size")


@dataclass(frozen=True)
class BackupManifest:
    """What a backup holds and what wrote it. `create_time` is when the database was as it is in the backup."""

    format: int
    fedrt_version: str
    schema_revision: str
    create_time: datetime
    database: Piece
    blobs: tuple[Piece, ...]

    @property
    def byte_count(self) -> int:
        """The bytes of all files."""
        return self.database.byte_count + sum(blob.byte_count for blob in self.blobs)


@dataclass(frozen=True)
class Backup:
    """A backup that was made. What was linked takes no space of its own."""

    directory: Path
    manifest: BackupManifest
    linked_bytes: int


_MANIFEST: TypeAdapter[BackupManifest] = TypeAdapter(BackupManifest)


def back_up(state_directory: Path, destination: Path, now: datetime) -> Backup:
    """Copy the store of a coordinator, which may be running, to a directory that does not exist yet.

    Raises `ConfigurationError` if there is nothing to copy or the destination cannot be one, `DamageError` if a blob is
    damaged and `StorageError` if the disk refuses; then nothing is left.
    """
    _check_destination(state_directory, destination)
    remove_leftovers(destination.parent)
    earlier = _newest_backup(destination.parent)
    with keeping_blobs(state_directory), unfinished_directory(destination) as unfinished:
        write_atomic_by(unfinished / DATABASE, lambda path: _copy_database(state_directory / DATABASE, path))
        schema_revision, blobs = _contents(unfinished / DATABASE, state_directory / DATABASE)
        _check_copy(unfinished / DATABASE, state_directory / DATABASE)
        copied = _Blobs(state_directory / BLOBS, earlier and earlier / BLOBS, unfinished / BLOBS)
        linked_bytes = sum(blob.byte_count for blob in blobs if copied.place(blob))
        sync_directory(unfinished / BLOBS)
        database = _piece_of(unfinished / DATABASE)
        manifest = BackupManifest(FORMAT, fedrt.__version__, schema_revision, now, database, blobs)
        write_atomic(unfinished / MANIFEST, _MANIFEST.dump_json(manifest, indent=1))
    return Backup(destination, manifest, linked_bytes)


def load_manifest(source: Path) -> BackupManifest:
    """What a backup says it holds. Raises `ConfigurationError` if it is none and `DamageError` if it is unreadable."""
    path = source / MANIFEST
    try:
        return _MANIFEST.validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigurationError(
            f"'{source}' is no backup: it has no {MANIFEST}; name a directory that `fedrt-coordinator backup` wrote"
        ) from None
    except OSError as error:
        raise storage_error("read", path, error) from error
    except ValidationError as error:
        raise DamageError(f"'{path}' is damaged; use another backup") from error


def verify(source: Path, manifest: BackupManifest) -> None:
    """Raise `DamageError` unless every file is there with the digest that the manifest names."""
    pieces = [(source / DATABASE, manifest.database)]
    pieces += [(source / BLOBS / blob.sha256, blob) for blob in manifest.blobs]
    for path, piece in pieces:
        if _piece_of(path) != piece:
            raise DamageError(f"'{path}' is damaged: its digest is not that of the manifest; use another backup")
    if _contents(source / DATABASE, source / DATABASE) != (manifest.schema_revision, manifest.blobs):
        raise DamageError(f"'{source / MANIFEST}' is damaged: it does not fit the database; use another backup")


def copy_piece(source: Path, target: Path, piece: Piece) -> None:
    """Copy a file durably. Raises `DamageError` if it is missing or not that piece; then there is no target."""
    write_atomic_by(target, lambda path: _fill(path, source, piece))


class _Blobs:
    """Puts blob files into a backup: as links if possible, else as copies; each was read and fits its digest."""

    def __init__(self, store: Path, earlier: Path | None, target: Path) -> None:
        self._store, self._earlier, self._target = store, earlier, target
        target.mkdir(mode=0o700)

    def place(self, blob: Piece) -> bool:
        """Returns whether it is a link. Raises `DamageError` if the blob is missing or damaged."""
        source, target = self._store / blob.sha256, self._target / blob.sha256
        known = self._known(blob)
        try:
            linked = _link(source, target)
        except FileNotFoundError:
            raise DamageError(f"blob file '{source}' is missing; restore the state directory from a backup") from None
        if linked:
            if (known is None or not known.samefile(target)) and _piece_of(target) != blob:
                raise DamageError(_damaged(source))
            return True
        with contextlib.suppress(FileNotFoundError):  # somebody removes that backup
            if known is not None and _link(known, target):
                return True
        copy_piece(source, target, blob)
        return False

    def _known(self, blob: Piece) -> Path | None:
        """The file in the backup before, which was read when it was put there."""
        path = self._earlier / blob.sha256 if self._earlier else None
        with contextlib.suppress(FileNotFoundError):
            if path is not None and path.stat().st_size == blob.byte_count:
                return path
        return None


def _check_destination(state_directory: Path, destination: Path) -> None:
    if not (state_directory / DATABASE).is_file():
        raise ConfigurationError(
            f"state_directory '{state_directory}' holds no store; is it the one of the coordinator to back up?"
        )
    if destination.exists() or destination.is_symlink():
        raise ConfigurationError(f"'{destination}' exists already; name a directory that does not, such as one by date")
    if not destination.parent.is_dir():
        raise ConfigurationError(f"'{destination.parent}' is no directory; create it first")
    if destination.parent.resolve().is_relative_to(state_directory.resolve()):
        raise ConfigurationError(
            f"'{destination}' is inside state_directory '{state_directory}' and would be lost with it; name another"
        )


def _newest_backup(parent: Path) -> Path | None:
    """The backup beside the destination that was finished last."""
    times = [(path.stat().st_mtime, path.parent) for path in parent.glob(f"[!.]*/{MANIFEST}")]
    return max(times)[1] if times else None


def _copy_database(source: Path, target: Path) -> None:
    """One snapshot, in one step: whoever writes meanwhile neither waits nor makes it begin again."""
    with (
        Guard("copy", source),
        contextlib.closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True)) as reading,
        contextlib.closing(sqlite3.connect(target)) as writing,
    ):
        reading.backup(writing)
        writing.execute("PRAGMA journal_mode = DELETE")  # so that the one file is all, also when it is read


def _check_copy(copy: Path, named: Path) -> None:
    """Raise `DamageError` if the database or a small blob in it is damaged: a backup of damage is none."""
    with Guard("read", named), contextlib.closing(sqlite3.connect(copy)) as database:
        found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise DamageError(f"'{named}' is damaged ({found}); restore the state directory from an earlier backup")
        _check_small_blobs(database, named)


def _check_small_blobs(database: sqlite3.Connection, named: Path) -> None:
    for digest, data in database.execute("SELECT sha256, data FROM blobs WHERE data IS NOT NULL"):
        if hashlib.sha256(data).hexdigest() != digest:
            raise DamageError(
                f"blob {digest} in '{named}' is damaged; `fedrt-coordinator verify` says whose it is; restore "
                "the state directory from an earlier backup if you need it"
            )


def _contents(database: Path, named: Path) -> tuple[str, tuple[Piece, ...]]:
    """The schema of a copied database, and the large blobs it names; errors speak of the one `named`."""
    engine = connect(database, read_only=True)
    try:
        with Guard("read", named), engine.connect() as connection:
            revision = revision_of(connection, named)
            if revision is None:
                raise DamageError(f"'{named}' is empty; restore the state directory from a backup")
            query = sa.select(blobs_table.c.sha256, blobs_table.c.byte_count).where(blobs_table.c.data.is_(None))
            rows = connection.execute(query.order_by(blobs_table.c.sha256)).all()
            return revision, tuple(Piece(row.sha256, row.byte_count) for row in rows)
    except ValueError as error:
        raise DamageError(f"'{named}' is damaged: {error}") from error
    finally:
        engine.dispose()


def _link(source: Path, target: Path) -> bool:
    """Whether a hard link could be made; not over the bounds of a file system, nor on one that has none.

    Raises `FileNotFoundError` without a source.
    """
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise storage_error("link", target, error) from error
    return True


def _fill(target: Path, source: Path, piece: Piece) -> None:
    digest = sha256()
    with target.open("r+b") as writing:
        for chunk in _chunks(source):
            digest.update(chunk)
            writing.write(chunk)
        if Piece(digest.hexdigest(), writing.tell()) != piece:
            raise DamageError(_damaged(source))


def _piece_of(path: Path) -> Piece:
    digest, byte_count = sha256(), 0
    for chunk in _chunks(path):
        digest.update(chunk)
        byte_count += len(chunk)
    return Piece(digest.hexdigest(), byte_count)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except FileNotFoundError:
        raise DamageError(f"'{path}' is missing; restore from a backup that has it") from None
    except OSError as error:
        raise storage_error("read", path, error) from error


def _damaged(path: Path) -> str:
    return f"'{path}' is damaged: its digest is not its name; restore the state directory from an earlier backup"
