"""Puts a backup into an empty state directory: every digest is checked first, and it is all or nothing.

Blobs are put there first and the database last, by a rename: before that, the directory holds no store.
"""

import contextlib
from pathlib import Path

import fedrt
from coordinator.backup import BLOBS, DATABASE, FORMAT, BackupManifest, copy_piece, load_manifest, verify
from coordinator.migrations import HEAD, REVISIONS
from fedrt.errors import ConfigurationError
from fedrt.locking import DirectoryLock
from fedrt.statefile import ensure_private_directory, remove_unfinished


def restore(source: Path, state_directory: Path) -> BackupManifest:
    """Put a backup into a state directory that is missing or holds no store; all of it or nothing.

    Raises `ConfigurationError` if a coordinator runs there, a store is there, or the backup is none or of a newer
    version; `DamageError` if a digest differs, before anything is written; `StorageError` if the disk refuses.
    """
    manifest = load_manifest(source)
    _check_version(source, manifest)
    lock = DirectoryLock(state_directory)
    try:
        _check_empty(state_directory)
        verify(source, manifest)
        _put_back(source, state_directory, manifest)
    finally:
        lock.release()
    return manifest


def _check_version(source: Path, manifest: BackupManifest) -> None:
    if manifest.format > FORMAT or manifest.schema_revision not in REVISIONS:
        raise ConfigurationError(
            f"backup '{source}' was written by a newer fedrt ({manifest.fedrt_version}, schema "
            f"{manifest.schema_revision}; this is {fedrt.__version__}, schema {HEAD}); install that version"
        )


def _check_empty(state_directory: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):  # SQLite would play a -wal into whatever database is beside it
        path = state_directory / f"{DATABASE}{suffix}"
        if path.exists():
            raise ConfigurationError(
                f"state_directory '{state_directory}' holds a store ('{path.name}'), which a restore does not touch; "
                "move it away first, or name another state_directory"
            )


def _put_back(source: Path, state_directory: Path, manifest: BackupManifest) -> None:
    remove_unfinished(state_directory)
    blobs, placed = state_directory / BLOBS, list[Path]()
    try:
        ensure_private_directory(blobs)
        remove_unfinished(blobs)
        for blob in manifest.blobs:
            placed.append(blobs / blob.sha256)
            copy_piece(source / BLOBS / blob.sha256, placed[-1], blob)
        copy_piece(source / DATABASE, state_directory / DATABASE, manifest.database)  # last: it makes it a store
    except BaseException:
        with contextlib.suppress(OSError):
            for path in placed:
                path.unlink(missing_ok=True)
        raise
