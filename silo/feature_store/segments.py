"""A segment: two files that grow together, `.rows` with features and `.keys` with a record for each row.

A record holds the key of its row and a checksum over both. Rows are forced to disk before their records are written, so
whatever a crash cuts off has no record. The `.keys` of a segment are locked by the one process that writes, the `.rows`
by all that write or map them; a segment without any lock may be continued, or removed. It is never served unchecked.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import zlib
from collections.abc import Iterable, Sequence, Set
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from silo.feature_store.kinds import KEY_BYTES, FeatureKind, Row, RowKey
from silo.feature_store.records import (
    RecordWriter,
    Words,
    invalidate,
    lock_file,
    read_records,
    valid,
    write_all,
)

WORDS = 12  # of a record of 48 bytes: 9 of the key, the checksum, one of no meaning, the check word
KEY_WORDS = KEY_BYTES // 4
CHECKED_AT_ONCE = 64  # rows, by one thread: a future for each of a million rows would take more than the rows
_MAGIC = b"fedrtfea"


@dataclass(frozen=True)
class Header:
    """The first record of `.keys`: `shape` of a row, and how many of them there may be."""

    kind: str  # its name
    shape: tuple[int, int]
    item_bytes: int
    capacity: int

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.shape[0] * self.shape[1] * self.item_bytes


def header_of(kind: FeatureKind, shape: tuple[int, int], segment_bytes: int) -> Header:
    """For a new segment of about this size; at least one row fits."""
    header = Header(kind.name, shape, np.dtype(kind.element_type).itemsize, 1)
    return Header(header.kind, shape, header.item_bytes, max(1, segment_bytes // header.row_bytes))


def read_header(keys_path: Path) -> Header | None:
    """Of a segment, or None if it is damaged or not there yet."""
    with contextlib.suppress(OSError), keys_path.open("rb") as file:
        records = np.frombuffer(file.read(4 * WORDS).ljust(4 * WORDS, b"\0"), np.uint32).reshape(1, WORDS)
        content = records.tobytes()
        if valid(records)[0] and content.startswith(_MAGIC):
            tokens, width, item_bytes, capacity = (int(word) for word in records[0, 6:10])
            return Header(content[8:16].hex(), (tokens, width), item_bytes, capacity)
    return None


def checksum(key: RowKey, row: Row) -> int:
    """Over the key and the row."""
    return zlib.crc32(row.data, zlib.crc32(key))


class Segment:
    """A segment that is read; it stays mapped, hence locked, while any row of it is in use."""

    def __init__(self, keys_path: Path, kind: FeatureKind) -> None:
        self._keys_path = keys_path
        self._kind = kind
        self._mapped: npt.NDArray[np.floating] | None = None

    def find(self, wanted: Set[RowKey], prefixes: npt.NDArray[np.uint64], pool: Executor) -> dict[RowKey, Row]:
        """Rows of this segment that are wanted and whole; a damaged one loses its record and is not found again.

        `prefixes`: the first 8 bytes of each key wanted. Raises `OSError`.
        """
        header = read_header(self._keys_path)
        if header is None or header.kind != self._kind.name:
            return {}
        records = read_records(self._keys_path, WORDS)
        heads = np.ascontiguousarray(records[:, :2]).view(np.uint64)[:, 0]
        matching = np.flatnonzero(valid(records) & np.isin(heads, prefixes))
        keys = {int(at): records[at, :KEY_WORDS].tobytes() for at in matching if at > 0}
        numbers = [at for at, key in keys.items() if key in wanted]
        rows = self._map(header, max(numbers, default=0))
        if rows is None:
            return {}
        with contextlib.suppress(OSError):
            os.utime(self._keys_path)  # it is in use now

        def whole(part: list[int]) -> list[bool]:
            checksums = records[part, KEY_WORDS].tolist()
            return [
                at <= len(rows) and checksum(keys[at], rows[at - 1]) == expected
                for at, expected in zip(part, checksums, strict=True)
            ]

        found: dict[RowKey, Row] = {}
        parts = [numbers[at : at + CHECKED_AT_ONCE] for at in range(0, len(numbers), CHECKED_AT_ONCE)]
        for part, are_whole in zip(parts, pool.map(whole, parts), strict=True):
            for at, is_whole in zip(part, are_whole, strict=True):
                if is_whole:
                    found.setdefault(keys[at], rows[at - 1])
                else:
                    self._forget(at)
        return found

    def _map(self, header: Header, count: int) -> npt.NDArray[np.floating] | None:
        """At least `count` rows if the file has them; None if there is nothing to map, or it is being removed."""
        if count == 0 or (self._mapped is not None and len(self._mapped) >= count):
            return None if count == 0 else self._mapped
        descriptor = lock_file(self._keys_path.with_suffix(".rows"), os.O_RDONLY, "shared")
        if descriptor is None:
            return None
        try:
            whole = min(os.fstat(descriptor).st_size // header.row_bytes, header.capacity)
            if not whole:
                return np.empty((0, *header.shape), self._kind.element_type)
            # a mapping has its own copy of the descriptor, and with it the lock
            mapped = mmap.mmap(descriptor, whole * header.row_bytes, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self._mapped = np.frombuffer(mapped, self._kind.element_type).reshape(whole, *header.shape)
        return self._mapped

    def _forget(self, at: int) -> None:
        with contextlib.suppress(OSError):  # on a read-only disk it is checked, and passed over, every time
            invalidate(self._keys_path, at, WORDS)


class SegmentWriter:
    """The one writer of a segment. `kept` holds its lock as a segment in use, also after it is closed."""

    def __init__(self, header: Header, records: RecordWriter, kept: int) -> None:
        self.header = header
        self._records = records
        self.kept = kept

    @property
    def room(self) -> int:
        """How many more rows there may be."""
        return self.header.capacity - (self._records.count - 1)

    def write(self, keys: Sequence[RowKey], rows: Sequence[Row]) -> None:
        """Make rows durable, then their records. Raises `OSError`; one may try again with all of them.

        Rows that have a record are never touched again, whatever fails: another process may have them mapped, and would
        read others, or be killed (SIGBUS) where the file ends before its mapping.
        """
        offset = (self._records.count - 1) * self.header.row_bytes
        try:
            write_all(self.kept, np.stack(rows).data.cast("B"), offset)
            os.fdatasync(self.kept)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.kept, offset)  # a full disk is not to be filled with what is no row
            raise
        self._records.append(_records(keys, map(checksum, keys, rows)))

    def close(self) -> None:
        """Let another process go on with the segment once nobody maps it."""
        self._records.close()


def create_segment(directory: Path, header: Header) -> SegmentWriter:
    """A new segment. Raises `OSError`."""
    keys_path = directory / f"{secrets.token_hex(8)}.keys"
    descriptor = None
    while descriptor is None:  # one that clears the store may take the empty file for a dead process's
        descriptor = lock_file(keys_path, os.O_RDWR | os.O_CREAT, "exclusive")
    try:
        rows = os.open(keys_path.with_suffix(".rows"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(rows, fcntl.LOCK_SH)
            writer = SegmentWriter(header, RecordWriter(descriptor, WORDS), rows)
            numbers = np.array([[*header.shape, header.item_bytes, header.capacity, 0]], np.uint32)
            name = np.frombuffer(_MAGIC + bytes.fromhex(header.kind) + bytes(8), np.uint32)[None]
            writer._records.append(np.concatenate([name, numbers], axis=1))
            _sync_directory(directory)
        except BaseException:
            os.close(rows)
            raise
    except BaseException:
        os.close(descriptor)
        remove_segment(keys_path)
        raise
    return writer


def continue_segment(keys_path: Path, kind: FeatureKind, shape: tuple[int, int]) -> SegmentWriter | None:
    """The writer of a segment that nobody writes to and that has room for such rows, or None. Raises `OSError`."""
    header = read_header(keys_path)
    if header is None or header.kind != kind.name or header.shape != shape:
        return None
    descriptor = lock_file(keys_path, os.O_RDWR, "exclusive")
    if descriptor is None:
        return None
    records = RecordWriter(descriptor, WORDS)
    rows = lock_file(keys_path.with_suffix(".rows"), os.O_RDWR, "shared")
    if rows is not None:
        writer = SegmentWriter(header, records, rows)
        if writer.room > 0 and os.fstat(rows).st_size >= (records.count - 1) * header.row_bytes:
            return writer
        os.close(rows)
    records.close()
    return None


def remove_segment(keys_path: Path) -> None:
    """The records first: rows without records are nobody's. Who has it mapped reads on. Raises `OSError`."""
    keys_path.unlink(missing_ok=True)
    keys_path.with_suffix(".rows").unlink(missing_ok=True)


def _records(keys: Sequence[RowKey], checksums: Iterable[int]) -> Words:
    """Payloads [N, WORDS - 1]."""
    payload = np.zeros((len(keys), WORDS - 1), np.uint32)
    payload[:, :KEY_WORDS] = np.frombuffer(b"".join(keys), np.uint32).reshape(len(keys), KEY_WORDS)
    payload[:, KEY_WORDS] = list(checksums)
    return payload


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
