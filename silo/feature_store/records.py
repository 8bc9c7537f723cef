"""Append-only files of fixed-size records, each with a check word: one process at a time writes, any number read.

The kernel's lock on the file says whether its writer is alive, so nothing is left to clear by hand after kill -9. A
record that a crash cut off has no valid check word, and is no record.
"""

import fcntl
import os
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

_SEED = np.uint32(0x66656472)  # so that a record of zeros, as a file system may leave, is not valid
_STEP = 0x9E3779B1


def lock_file(path: Path, flags: int, lock: Literal["shared", "exclusive"]) -> int | None:
    """A descriptor of the file that holds its lock, or None if another process holds it, or it is gone or not for us.

    Closing the descriptor, and every copy of it, releases the lock. Raises `OSError`.
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    except PermissionError:
        if flags & os.O_CREAT:
            raise
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_SH if lock == "shared" else fcntl.LOCK_EX))
        if os.fstat(descriptor).st_nlink:  # else it was removed before we held it
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def is_locked(path: Path) -> bool:
    """Whether a process holds the file's lock. Raises `OSError`."""
    descriptor = lock_file(path, os.O_RDONLY, "exclusive")
    if descriptor is None:
        return path.exists()
    os.close(descriptor)
    return False


def sealed(payload: Words) -> Words:
    """Records [N, W] of payloads [N, W - 1]: with the check word at the end."""
    return np.concatenate([payload, _check(payload)[:, None]], axis=1)


def read_records(path: Path, words: int) -> Words:
    """All whole records [N, words] of a file, valid or not. Raises `OSError`."""
    content = path.read_bytes()
    count = len(content) // (4 * words)
    return np.frombuffer(content, np.uint32, count * words).reshape(count, words)


def valid(records: Words) -> npt.NDArray[np.bool_]:
    """Which of the records are as they were written."""
    checked: npt.NDArray[np.bool_] = records[:, -1] == _check(records[:, :-1])
    return checked


def invalidate(path: Path, index: int, words: int) -> None:
    """Make a record invalid for everyone, also while its writer appends. Raises `OSError`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, bytes(4 * words), 4 * words * index)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: memoryview, at: int) -> None:
    """Write everything at this offset. Raises `OSError`."""
    while content:
        done = os.pwrite(descriptor, content, at)
        content, at = content[done:], at + done


class RecordWriter:
    """The one writer of a file whose exclusive lock the descriptor holds; goes on after the last whole record."""

    def __init__(self, descriptor: int, words: int) -> None:
        self._descriptor = descriptor
        self._words = words
        self.count = self._count()

    def append(self, payload: Words) -> None:
        """Write payloads [N, words - 1] durably.

        Raises `OSError`; the next call goes on after the last whole record, for others may have read those before it.
        """
        try:
            write_all(self._descriptor, memoryview(sealed(payload).tobytes()), 4 * self._words * self.count)
            os.fdatasync(self._descriptor)
        finally:
            self.count = self._count()

    def close(self) -> None:
        """Let another process write."""
        os.close(self._descriptor)

    def _count(self) -> int:
        return os.fstat(self._descriptor).st_size // (4 * self._words)


def _check(payload: Words) -> Words:
    # every factor is odd, hence invertible modulo 2^32: no single wrong word goes unnoticed
    factors = np.arange(1, 2 * payload.shape[1], 2, dtype=np.uint32) * np.uint32(_STEP)
    total: Words = (payload * factors).sum(axis=1, dtype=np.uint32) + _SEED
    return total
