"""The rows of one kind in the store: found in any process's segments, added to one of our own."""

import contextlib
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from fedrt.statefile import storage_error
from silo.feature_store.kinds import FeatureKind, Row, RowKey
from silo.feature_store.room import alone, make_room, segment_bytes
from silo.feature_store.segments import Segment, SegmentWriter, continue_segment, create_segment, header_of

CHECKERS = 8  # threads that compute checksums
WRITTEN_AT_ONCE = 64 << 20  # bytes: copied side by side first, and all of them refused if the disk has not room for all


class Shelf:
    """Made by `FeatureStore.shelf`. What it has found or added stays in use, hence in the store, while it exists."""

    def __init__(self, root: Path, kind: FeatureKind, max_bytes: int) -> None:
        self._root = root
        self._kind = kind
        self._max_bytes = max_bytes
        self._segments: dict[Path, Segment] = {}
        self._writer: SegmentWriter | None = None
        self._kept: list[int] = []  # descriptors of the segments that we wrote

    def find(self, wanted: Collection[RowKey], on_segment: Callable[[], None] = lambda: None) -> dict[RowKey, Row]:
        """The rows that are there and whole, read-only, mapped from disk. `on_segment` is called again and again.

        A row that is there twice is taken from any segment: copies agree, as the same image was encoded in the same
        way. Raises `StorageError`.
        """
        missing = set(wanted)
        found: dict[RowKey, Row] = {}
        prefixes = np.unique(np.array([int.from_bytes(key[:8], "little") for key in missing], np.uint64))
        with ThreadPoolExecutor(min(CHECKERS, os.cpu_count() or 1)) as pool:
            for path in self._paths():
                if not missing:
                    break
                segment = self._segments.setdefault(path, Segment(path, self._kind))
                try:
                    found |= segment.find(missing, prefixes, pool)
                except FileNotFoundError:
                    continue  # another process has just removed it
                except OSError as error:
                    raise storage_error("read", path, error) from error
                missing -= found.keys()
                on_segment()
        return found

    def save(self, rows: dict[RowKey, Row]) -> None:
        """Make rows durable, and take out of `rows` what is. Raises `StorageError`; the rest is still there then."""
        path = self._root / self._kind.name
        try:
            while rows:
                shape = next(iter(rows.values())).shape
                writer = self._writer_with_room((shape[0], shape[1]))
                part = max(1, WRITTEN_AT_ONCE // writer.header.row_bytes)
                keys = list(islice(rows, min(part, writer.room)))
                writer.write(keys, [rows[key] for key in keys])
                for key in keys:
                    del rows[key]
        except OSError as error:
            raise storage_error("write", path, error) from error

    def close(self) -> None:
        """Let others continue, or remove, what is written here; what was found stays mapped while it is referred to."""
        self._end_segment()
        for descriptor in self._kept:
            os.close(descriptor)
        self._kept.clear()
        self._segments.clear()

    def _paths(self) -> list[Path]:
        try:
            return sorted((self._root / self._kind.name).glob("*.keys"))
        except OSError as error:
            raise storage_error("read", self._root, error) from error

    def _writer_with_room(self, shape: tuple[int, int]) -> SegmentWriter:
        if self._writer is not None and self._writer.room > 0:
            return self._writer
        self._end_segment()
        with alone(self._root):
            writer = self._begin_segment(shape)
            self._kept.append(writer.kept)
            self._writer = writer
            try:
                make_room(self._root, self._max_bytes)
            except BaseException:
                self._end_segment()
                os.close(self._kept.pop())
                raise
        return writer

    def _begin_segment(self, shape: tuple[int, int]) -> SegmentWriter:
        for path in self._paths():
            if (writer := continue_segment(path, self._kind, shape)) is not None:
                return writer
        size = segment_bytes(self._max_bytes)
        return create_segment(self._root / self._kind.name, header_of(self._kind, shape, size))

    def _end_segment(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
