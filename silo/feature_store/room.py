"""Keeps a store within its bound: the least recently used segments that no live process has in use go first.

What a process has mapped stays readable for it whatever is removed. A segment that is being written counts as if it
were full, so that several writers together stay within the bound.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedrt.errors import StorageError
from fedrt.notation import format_size
from fedrt.statefile import storage_error
from silo.feature_store.records import is_locked, lock_file
from silo.feature_store.segments import WORDS, read_header, remove_segment

LEAST_SEGMENT = 1 << 20  # bytes
SEGMENTS = 128  # of a full store, about: few enough to have all of them open


class NoRoom(StorageError):
    """The store is full, and all of it in use."""


@dataclass(frozen=True)
class SegmentFiles:
    """A segment as it lies on disk. `used_ns`: when it was last written or mapped."""

    keys_path: Path
    byte_count: int
    used_ns: int

    @property
    def row_count(self) -> int:
        """Rows that were written, damaged ones and copies included."""
        with contextlib.suppress(OSError):
            return max(0, self.keys_path.stat().st_size // (4 * WORDS) - 1)
        return 0


def segment_files(directory: Path) -> list[SegmentFiles]:
    """Every segment of every kind, the least recently used first. Raises `OSError`."""
    found = []
    for keys_path in directory.glob("*/*.keys"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it
            keys = keys_path.stat()
            rows = _size(keys_path.with_suffix(".rows"))
            found.append(SegmentFiles(keys_path, keys.st_size + rows, keys.st_mtime_ns))
    return sorted(found, key=lambda one: (one.used_ns, one.keys_path.name))


def segment_bytes(max_bytes: int) -> int:
    """The size of a full segment in a store with this bound."""
    return max(max_bytes // SEGMENTS, LEAST_SEGMENT)


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """While this lasts, no other process makes or removes segments. Raises `OSError`, and as `check_owner` does."""
    check_owner(directory)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_owner(directory: Path) -> None:
    """Raise `StorageError` if the store is another user's, who could not read what we, being root, would write."""
    try:
        owner, user = directory.stat().st_uid, os.geteuid()
    except OSError as error:
        raise storage_error("open", directory, error) from error
    if owner != user:
        raise StorageError(
            f"the store of features '{directory}' belongs to user {owner}, not to us ({user}); run this as that user, "
            "or set another features.directory"
        )


def make_room(directory: Path, max_bytes: int) -> None:
    """Remove segments until the store, and what its writers may still write, is within the bound.

    Called while `alone`. Raises `NoRoom` and `OSError`.
    """
    files = segment_files(directory)
    sizes = {one.keys_path: _reserved(one) for one in files}
    total = sum(sizes.values())
    for one in files:
        if total <= max_bytes:
            return
        if remove_unused(one.keys_path):
            total -= sizes[one.keys_path]
    if total > max_bytes:
        raise NoRoom(
            f"the store of features '{directory}' may hold {format_size(max_bytes)}, and all of that is in use; raise "
            "features.max_size, or set features.directory to a larger disk"
        )


def remove_unused(keys_path: Path) -> bool:
    """Remove a segment unless a live process writes or maps it; whether it is gone. Raises `OSError`."""
    keys = lock_file(keys_path, os.O_RDWR, "exclusive")
    if keys is None:
        return not keys_path.exists()
    try:
        if is_locked(keys_path.with_suffix(".rows")):
            return False
        remove_segment(keys_path)
        return True
    finally:
        os.close(keys)


def clear_leftovers(directory: Path) -> None:
    """Remove what dead processes have left half made or half removed. Called while `alone`. Raises `OSError`."""
    for rows_path in directory.glob("*/*.rows"):
        if not rows_path.with_suffix(".keys").exists() and not is_locked(rows_path):
            rows_path.unlink(missing_ok=True)
    for one in segment_files(directory):
        if read_header(one.keys_path) is None or not one.row_count:
            remove_unused(one.keys_path)


def _reserved(one: SegmentFiles) -> int:
    header = read_header(one.keys_path)
    if header is None or not is_locked(one.keys_path):
        return one.byte_count
    return max(one.byte_count, header.capacity * (header.row_bytes + 4 * WORDS))


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
