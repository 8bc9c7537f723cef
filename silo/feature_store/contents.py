"""Remembers the SHA-256 of image files by path, size, times and inode, so that a restart need not read them again.

The file's state is kept as a digest of its own: names of files are not.
"""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from silo.feature_store.records import RecordWriter, lock_file, read_records, valid

WORDS = 17  # 32 bytes of the state, 32 of the content, the check word
MAX_BYTES = 256 << 20  # of all that is remembered, about four million files
READERS = 8  # threads
NOTED_AT_ONCE = 4096  # digests that are computed until they are written
MAPPED_AT_ONCE = 4096  # files, to threads
SETTLED = 2_000_000_000  # nanoseconds after which a further change of the file has another time

_Given = TypeVar("_Given")
_Result = TypeVar("_Result")


def map_in_parts(pool: Executor, function: Callable[[_Given], _Result], given: Sequence[_Given]) -> Iterator[_Result]:
    """As `pool.map`, which would take 2 KiB for each that is given, be it millions, before it begins."""
    for at in range(0, len(given), MAPPED_AT_ONCE):
        yield from pool.map(function, given[at : at + MAPPED_AT_ONCE])


def file_state(path: Path) -> bytes:
    """32 bytes that change when the file does. Raises `OSError`."""
    found = path.stat()
    numbers = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino)
    return hashlib.sha256(os.fsencode(path.absolute()) + b"\0" + repr(numbers).encode()).digest()


class Contents:
    """What is known of files' contents; several processes may add at once. Without a directory nothing is remembered.

    `now`: nanoseconds since 1970.
    """

    def __init__(self, directory: Path | None, now: Callable[[], int] = time.time_ns) -> None:
        self._directory = directory
        self._now = now
        self._writer: RecordWriter | None = None

    def digests(self, paths: Iterable[Path], on_file: Callable[[], None]) -> tuple[dict[Path, bytes], dict[Path, str]]:
        """The SHA-256 of each file, and why others cannot be read. Only files that are not known are read."""
        with ThreadPoolExecutor(READERS) as pool:
            listed = list(paths)
            states = dict(zip(listed, map_in_parts(pool, _state_or_problem, listed), strict=True))
            problems = {path: state for path, state in states.items() if isinstance(state, str)}
            found = self._known({state: path for path, state in states.items() if isinstance(state, bytes)})
            unknown = [path for path in listed if path not in found and path not in problems]
            noted: list[bytes] = []
            for path, content in zip(unknown, map_in_parts(pool, _content_or_problem, unknown), strict=True):
                on_file()
                if isinstance(content, str):
                    problems[path] = content
                    continue
                found[path], state = content, states[path]
                if isinstance(state, bytes) and self._is_settled(path, state):
                    noted.append(state + content)
                if len(noted) >= NOTED_AT_ONCE:
                    noted = self._keep(noted)
        self._keep(noted)
        return found, problems

    def _known(self, states: Mapping[bytes, Path]) -> dict[Path, bytes]:
        wanted = np.frombuffer(b"".join(states), np.uint64)[::4]
        found: dict[Path, bytes] = {}
        for path in self._paths():
            with contextlib.suppress(OSError):
                records = read_records(path, WORDS)
                heads = np.ascontiguousarray(records[:, :2]).view(np.uint64)[:, 0]
                for at in np.flatnonzero(valid(records) & np.isin(heads, wanted)):
                    row = records[at].tobytes()
                    if row[:32] in states:
                        found[states[row[:32]]] = row[32:64]
        return found

    def _is_settled(self, path: Path, state: bytes) -> bool:
        """Whether the file did not change while it was read, and its times would tell if it changed now."""
        with contextlib.suppress(OSError):
            return file_state(path) == state and self._now() - path.stat().st_ctime_ns > SETTLED
        return False

    def _keep(self, noted: list[bytes]) -> list[bytes]:
        """Write what was noted; a disk that refuses only costs reading files again. Returns what is left: nothing."""
        with contextlib.suppress(OSError):
            if noted and self._directory is not None and self._directory.stat().st_uid == os.geteuid():
                self._writer = self._writer or self._open(self._directory)
                self._writer.append(np.frombuffer(b"".join(noted), np.uint32).reshape(len(noted), WORDS - 1))
        return []

    def close(self) -> None:
        """Let another process go on with our file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def clear_excess(self) -> None:
        """Begin anew when too much is remembered; it only costs reading the files again. Raises `OSError`."""
        paths = self._paths()
        if sum(path.stat().st_size for path in paths) > MAX_BYTES:
            self.clear()

    def clear(self) -> None:
        """Forget all but what live processes write. Raises `OSError`."""
        for path in self._paths():
            descriptor = lock_file(path, os.O_RDWR, "exclusive")
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)

    def _paths(self) -> list[Path]:
        return [] if self._directory is None else sorted(self._directory.glob("*.contents"))

    def _open(self, directory: Path) -> RecordWriter:
        """Go on with a file that nobody writes to, or begin one."""
        for path in self._paths():
            if (descriptor := lock_file(path, os.O_RDWR, "exclusive")) is not None:
                return RecordWriter(descriptor, WORDS)
        descriptor = None
        while descriptor is None:  # one that clears the store may take it in between
            name = f"{secrets.token_hex(8)}.contents"
            descriptor = lock_file(directory / name, os.O_RDWR | os.O_CREAT, "exclusive")
        return RecordWriter(descriptor, WORDS)


def _state_or_problem(path: Path) -> bytes | str:
    try:
        return file_state(path)
    except OSError as error:
        return error.strerror or type(error).__name__


def _content_or_problem(path: Path) -> bytes | str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        return error.strerror or type(error).__name__
