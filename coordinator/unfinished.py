"""Directories that appear whole or not at all: filled beside their destination, forced to disk, then renamed.

A lock inside tells a directory that is being filled from one whose maker was killed: the kernel releases it.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedrt.statefile import move_durably, storage_error

_LOCK, _SUFFIX = ".lock", ".fedrt-backup"


@contextlib.contextmanager
def unfinished_directory(destination: Path) -> Iterator[Path]:
    """A directory beside the destination that is moved there in the end, or removed."""
    try:
        directory, lock = _locked_directory(destination)
    except OSError as error:
        raise storage_error("create directory", destination, error) from error
    try:
        yield directory
        move_durably(directory, destination)
        (destination / _LOCK).unlink()
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise storage_error("write", destination, error) from error
        raise
    finally:
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Remove what backups that were killed have left beside the destination."""
    for directory in parent.glob(f".*{_SUFFIX}"):
        try:
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            with contextlib.suppress(OSError):
                directory.rmdir()  # killed between its first two steps, if it is empty
            continue
        with contextlib.suppress(BlockingIOError):  # its maker lives
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _locked_directory(destination: Path) -> tuple[Path, int]:
    """A new directory, and the descriptor of its lock."""
    while True:
        directory = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}{_SUFFIX}")
        directory.mkdir(mode=0o700)
        lock = _lock(directory)
        if lock is not None:
            return directory, lock


def _lock(directory: Path) -> int | None:
    """None if another backup has just taken the directory for a leftover, before there was a lock."""
    try:
        descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
    os.close(descriptor)
    return None
