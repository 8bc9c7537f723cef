"""Tensors as bytes: a manifest that describes them, bounded chunks that carry them, and the inverse. No I/O.

The bytes are the C-order little-endian buffers of the tensors, concatenated in the order of the manifest.
"""

import enum
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fedrt.errors import PayloadError
from fedrt.tensors import Array, Tensors

CHUNK_BYTES = 256 * 1024
MAX_TENSORS = 1024
MAX_NAME_LENGTH = 128
MAX_ID_LENGTH = 200  # of tasks, experiments, sessions and payloads
MAX_DIMENSIONS = 8


class ElementType(enum.Enum):
    """The element types that may be exchanged, as numpy spells them."""

    FLOAT32 = "<f4"
    FLOAT16 = "<f2"
    INT64 = "<i8"

    @property
    def byte_count(self) -> int:
        """Bytes per element."""
        return int(self.value[2])


@dataclass(frozen=True)
class TensorHeader:
    """Describes one tensor of a payload."""

    name: str
    element_type: ElementType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_NAME_LENGTH:
            raise PayloadError(f"a tensor name has {len(self.name)} characters; allowed are 1 to {MAX_NAME_LENGTH}")
        if len(self.shape) > MAX_DIMENSIONS or any(extent < 1 for extent in self.shape):
            raise PayloadError(f"tensor {self.name!r} has an impossible shape")

    @property
    def byte_count(self) -> int:
        """The bytes of this tensor."""
        return math.prod(self.shape) * self.element_type.byte_count


@dataclass(frozen=True)
class Manifest:
    """Describes a payload; cannot exist with sizes that disagree."""

    payload_id: str
    tensors: tuple[TensorHeader, ...]
    byte_count: int
    sha256: bytes

    def __post_init__(self) -> None:
        if not 0 < len(self.payload_id) <= MAX_ID_LENGTH:
            raise PayloadError(f"a payload id has {len(self.payload_id)} characters; allowed are 1 to {MAX_ID_LENGTH}")
        if not 0 < len(self.tensors) <= MAX_TENSORS:
            raise PayloadError(f"a manifest has {len(self.tensors)} tensors; allowed are 1 to {MAX_TENSORS}")
        if len({header.name for header in self.tensors}) != len(self.tensors):
            raise PayloadError("a manifest names a tensor twice")
        if len(self.sha256) != 32:
            raise PayloadError(f"a SHA-256 digest has {len(self.sha256)} bytes; expected are 32")
        announced = sum(header.byte_count for header in self.tensors)
        if self.byte_count != announced:
            raise PayloadError(f"a manifest announces {self.byte_count} bytes, but its tensors take {announced}")


@dataclass(frozen=True)
class Chunk:
    """One piece of a payload."""

    payload_id: str
    offset: int
    data: bytes | memoryview

    def __post_init__(self) -> None:
        if not 0 < len(self.data) <= CHUNK_BYTES:
            raise PayloadError(f"a chunk has {len(self.data)} bytes; allowed are 1 to {CHUNK_BYTES}")
        if len(self.payload_id) > MAX_ID_LENGTH:
            raise PayloadError(f"a payload id has {len(self.payload_id)} characters; allowed are 1 to {MAX_ID_LENGTH}")


def headers_of(tensors: Tensors) -> tuple[TensorHeader, ...]:
    """Headers in name order, the order in which `pack` writes.

    Raises `PayloadError` for an element type that is not exchanged.
    """
    return tuple(
        TensorHeader(name, _element_type(name, tensors[name]), tuple(tensors[name].shape)) for name in sorted(tensors)
    )


def _element_type(name: str, array: Array) -> ElementType:
    try:
        return ElementType(array.dtype.newbyteorder("<").str)
    except ValueError:
        raise PayloadError(f"tensor {name!r} has type {array.dtype}, which is not exchanged") from None


def pack(tensors: Tensors) -> memoryview:
    """The bytes of the tensors in name order; does not copy a single contiguous tensor."""
    views = [
        np.ascontiguousarray(tensors[header.name], np.dtype(header.element_type.value)).reshape(-1).view(np.uint8).data
        for header in headers_of(tensors)
    ]
    return views[0] if len(views) == 1 else memoryview(b"".join(views))


def unpack(headers: Iterable[TensorHeader], data: bytes | bytearray | memoryview) -> dict[str, Array]:
    """Read-only views of `data`, one per header."""
    tensors: dict[str, Array] = {}
    offset = 0
    for header in headers:
        array = np.frombuffer(data, np.dtype(header.element_type.value), math.prod(header.shape), offset)
        array.flags.writeable = False
        tensors[header.name] = array.reshape(header.shape)
        offset += header.byte_count
    return tensors


def describe(payload_id: str, tensors: Tensors) -> tuple[Manifest, memoryview]:
    """The manifest of the tensors together with their bytes."""
    data = pack(tensors)
    return Manifest(payload_id, headers_of(tensors), len(data), hashlib.sha256(data).digest()), data


def chunks(payload_id: str, data: bytes | memoryview) -> Iterator[Chunk]:
    """Cut the bytes of a payload; each chunk is a view, not a copy."""
    view = memoryview(data)
    for offset in range(0, len(view), CHUNK_BYTES):
        yield Chunk(payload_id, offset, view[offset : offset + CHUNK_BYTES])


class Assembler:
    """Checks the chunks of one payload as they arrive and passes their bytes on; by default it collects them.

    Whatever the sender does, never more bytes are passed on than the manifest announced.
    """

    def __init__(self, manifest: Manifest, sink: Callable[[bytes | memoryview], None] | None = None) -> None:
        self.manifest = manifest
        self._buffer = bytearray()
        self._sink = self._buffer.extend if sink is None else sink
        self._offset = 0
        self._digest = hashlib.sha256()

    def add(self, chunk: Chunk) -> bool:
        """Take the next chunk and return whether the payload is complete.

        Raises `PayloadError` for a gap, an overlap, a byte too many, or a digest that differs at the end.
        """
        if chunk.offset != self._offset:
            raise PayloadError(f"a chunk starts at byte {chunk.offset}; expected was {self._offset}")
        if chunk.offset + len(chunk.data) > self.manifest.byte_count:
            raise PayloadError(f"a payload has more than the announced {self.manifest.byte_count} bytes")
        self._sink(chunk.data)
        self._offset += len(chunk.data)
        self._digest.update(chunk.data)
        if self._offset < self.manifest.byte_count:
            return False
        if self._digest.digest() != self.manifest.sha256:
            raise PayloadError("the digest of a payload differs from its manifest")
        return True

    def data(self) -> memoryview:
        """The collected bytes; meaningful once `add` has returned True, and empty if a sink took them."""
        return memoryview(self._buffer).toreadonly()

    def tensors(self) -> Mapping[str, Array]:
        """The collected tensors; meaningful once `add` has returned True."""
        return unpack(self.manifest.tensors, self.data())
