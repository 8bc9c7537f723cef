"""Takes in the tensors of one result: small ones in memory, large ones straight into a file, judged as they arrive."""

import secrets
import weakref
from pathlib import Path
from typing import BinaryIO

import numpy as np

from coordinator.blobs import INLINE_BYTES, Blob, Landed, remove_arrival
from fedrt.errors import PayloadError
from fedrt.payload import Manifest
from fedrt.statefile import storage_error

_ITEM = 4  # bytes of a float32; a manifest that announces anything else has been refused before


class IntakeMemory:
    """How much memory small results may take on their way into the store, those of all silos together.

    So a round of a thousand silos that all answer at once costs no more memory than one of a few.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.taken = 0  # bytes

    def take(self, byte_count: int) -> bool:
        """Set bytes aside; False, and nothing is taken, if there is no room for them."""
        if self.taken + byte_count > self._limit:
            return False
        self.taken += byte_count
        return True

    def release(self, byte_count: int) -> None:
        """Give back what was set aside."""
        self.taken -= byte_count


class Intake:
    """The sink of a `fedrt.payload.Assembler`. Holds a bounded amount of memory, however large the payload is."""

    def __init__(self, manifest: Manifest, directory: Path, memory: IntakeMemory) -> None:
        self.payload_id = manifest.payload_id
        self._byte_count = manifest.byte_count
        self._memory = memory
        self._in_memory: bool | None = None  # decided with the first bytes: one who sends none takes no room
        self._headers = manifest.tensors
        self._judged = 0  # bytes
        self._buffer = bytearray()
        self._tail = b""
        self._file: BinaryIO | None = None
        self._path = directory / secrets.token_hex(16)

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes. Raises `PayloadError` for a value that is not finite, `StorageError` for the disk."""
        self._check_finite(data)
        if self._in_memory is None:
            self._in_memory = self._byte_count <= INLINE_BYTES and self._memory.take(self._byte_count)
        if self._in_memory:
            self._buffer += data
            return
        try:
            if self._file is None:
                self._file = self._path.open("xb", buffering=0)
                self._path.chmod(0o600)
            remaining = memoryview(data)
            while remaining:
                remaining = remaining[self._file.write(remaining) or 0 :]
        except OSError as error:
            raise storage_error("write", self._path, error) from error

    def finish(self) -> Blob:
        """What the store takes over, once the payload is complete."""
        if self._file is None:
            blob = memoryview(self._buffer).toreadonly()
            weakref.finalize(blob, self._memory.release, self._byte_count)  # the store lets go of it after its commit
            return blob
        self._file.close()
        return Landed(self._path, self._byte_count)

    def discard(self) -> None:
        """Forget what has arrived; once, and not after `finish`."""
        if self._in_memory:
            self._memory.release(self._byte_count)
            self._buffer = bytearray()
        if self._file is not None:
            self._file.close()
            remove_arrival(self._path)

    def _check_finite(self, data: bytes | memoryview) -> None:
        joined = self._tail + bytes(data) if self._tail else data
        whole = len(joined) // _ITEM * _ITEM
        self._tail = bytes(joined[whole:])
        finite = np.isfinite(np.frombuffer(joined, "<f4", whole // _ITEM))
        if not finite.all():
            name = self._tensor_at(self._judged + _ITEM * int(np.argmin(finite)))
            raise PayloadError(f"tensor {name!r} has values that are not finite")
        self._judged += whole

    def _tensor_at(self, offset: int) -> str:
        end = 0
        for header in self._headers:
            end += header.byte_count
            if offset < end:
                return header.name
        raise ValueError(f"byte {offset} lies beyond the payload")


def clear(directory: Path) -> None:
    """Remove what an earlier run of the coordinator did not finish taking in."""
    for path in directory.iterdir():
        path.unlink()
