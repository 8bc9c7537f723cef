"""Whoever reads all blobs one after the other holds this lock, and nothing is removed meanwhile.

A backup, a check or a replay share it. Garbage collection takes it for each of its slices, and does not wait.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fedrt.statefile import storage_error

FILE_NAME = "backup.lock"


@contextlib.contextmanager
def keeping_blobs(state_directory: Path) -> Iterator[None]:
    """Nothing is removed from the store within the block; waits for a slice that removes. Raises `StorageError`."""
    with _opened(state_directory) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def removing_blobs(state_directory: Path) -> Iterator[bool]:
    """Whether blobs may be removed within the block; False, at once, while others keep them. Raises `StorageError`."""
    with _opened(state_directory) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _opened(state_directory: Path) -> Iterator[int]:
    """The lock file, made if it is missing; closing it gives the lock back."""
    path = state_directory / FILE_NAME
    try:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            owner = state_directory.stat()
            if owner.st_uid != os.geteuid():
                os.fchown(descriptor, owner.st_uid, owner.st_gid)  # made by root, needed by the coordinator
    except OSError as error:
        raise storage_error("open", path, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
