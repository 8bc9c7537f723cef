"""The language between the daemon and its worker process: typed frames over a pair of sockets. No torch, no pickle.

A frame is 4 bytes with the length of a JSON header (big-endian), the header, and the bytes of its tensors as
`fedrt.payload` packs them. The header says what the frame is, its plain fields, and the tensors that follow.
"""

import asyncio
import dataclasses
import json
import socket
import struct
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedrt.errors import FailureReason, FedrtError, RemoteProtocolError
from fedrt.payload import ElementType, TensorHeader, headers_of, pack, unpack
from fedrt.tensors import Tensors
from silo.sources import DataSource, FeatureSource, ModelSource
from silo.work import WorkerReport, WorkOrder, WorkOutcome

MAX_HEADER_BYTES = 64 << 20  # 100,000 class names of 200 characters, escaped
MAX_PAYLOAD_BYTES = 4 << 30
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class Load:
    """Daemon to worker, first: what to load. `threads`: CPU threads of torch, or its own choice.

    `data`: the images of each virtual silo by name, or of the daemon itself under "". Without `features`, features of
    images live in memory only.
    """

    model: ModelSource
    data: Mapping[str, DataSource]
    threads: int | None
    features: FeatureSource | None = None


@dataclass(frozen=True)
class Ready:
    """Worker to daemon: what it holds; again whenever that has changed."""

    report: WorkerReport


@dataclass(frozen=True)
class Misconfigured:
    """Worker to daemon, instead of `Ready`: the operator's files are wrong. For the silo's operator only."""

    message: str


@dataclass(frozen=True)
class Progress:
    """Worker to daemon: steps done, and steps planned or 0."""

    done: int
    planned: int


@dataclass(frozen=True)
class Failed:
    """Worker to daemon: the order failed. `is_final`: the process is not fit for another order and ends."""

    reason: FailureReason
    message: str
    is_final: bool


Frame = Load | WorkOrder | Ready | Misconfigured | Progress | WorkOutcome | Failed

_FRAMES: Mapping[str, type[Frame]] = {
    kind.__name__: kind for kind in (Load, WorkOrder, Ready, Misconfigured, Progress, WorkOutcome, Failed)
}
_TENSOR_FIELDS: Mapping[type[Frame], tuple[str, ...]] = {
    WorkOrder: ("shared", "private"),
    WorkOutcome: ("shared", "private"),
}


@dataclass(frozen=True)
class Header:
    """A parsed header: the kind of frame, its plain fields still as JSON values, and its tensors by field."""

    kind: type[Frame]
    fields: Mapping[str, Any]
    tensors: Mapping[str, tuple[TensorHeader, ...]]

    @property
    def payload_bytes(self) -> int:
        """How many bytes follow the header."""
        return sum(header.byte_count for headers in self.tensors.values() for header in headers)


def encode(frame: Frame) -> list[bytes | memoryview]:
    """The pieces of a frame, in order; tensors are not copied more than `pack` does."""
    kind = type(frame)
    groups: dict[str, Tensors] = {name: getattr(frame, name) for name in _TENSOR_FIELDS.get(kind, ())}
    header = {
        "frame": kind.__name__,
        "fields": {
            name: adapter.dump_python(getattr(frame, name), mode="json") for name, adapter in _adapters(kind).items()
        },
        "tensors": {
            name: [[one.name, one.element_type.value, one.shape] for one in headers_of(tensors)]
            for name, tensors in groups.items()
        },
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    return [_LENGTH.pack(len(text)), text, *(pack(tensors) for tensors in groups.values() if tensors)]


def parse_header(text: bytes) -> Header:
    """Raises `RemoteProtocolError` for anything that `encode` does not write, or too many bytes of tensors."""
    try:
        content = json.loads(text)
        kind = _FRAMES[content["frame"]]
        tensors = {
            name: tuple(TensorHeader(one, ElementType(code), tuple(shape)) for one, code, shape in rows)
            for name, rows in content["tensors"].items()
        }
        header = Header(kind, dict(content["fields"]), tensors)
    except (ValueError, KeyError, TypeError, AttributeError, FedrtError) as error:
        raise RemoteProtocolError(f"the header of a worker frame is malformed ({type(error).__name__})") from error
    if set(tensors) != set(_TENSOR_FIELDS.get(kind, ())) or set(header.fields) != set(_adapters(kind)):
        raise RemoteProtocolError(f"a worker frame '{kind.__name__}' has other fields than it should")
    if header.payload_bytes > MAX_PAYLOAD_BYTES:
        raise RemoteProtocolError(f"a worker frame announces {header.payload_bytes} bytes; allowed are 4 GiB")
    return header


def build(header: Header, payload: bytes | bytearray) -> Frame:
    """The frame; its arrays are read-only views of `payload`. Raises `RemoteProtocolError`."""
    if len(payload) != header.payload_bytes:
        raise RemoteProtocolError(f"a worker frame has {len(payload)} payload bytes, not {header.payload_bytes}")
    try:
        values = {
            name: adapter.validate_python(header.fields[name]) for name, adapter in _adapters(header.kind).items()
        }
        at = 0
        for name, headers in header.tensors.items():
            values[name] = unpack(headers, memoryview(payload)[at:])
            at += sum(one.byte_count for one in headers)
        return header.kind(**values)
    except (ValidationError, FedrtError) as error:
        raise RemoteProtocolError(f"a worker frame '{header.kind.__name__}' holds wrong values: {error}") from error


def _adapters(kind: type[Frame]) -> dict[str, TypeAdapter[Any]]:
    """One adapter for each field that is not a group of tensors."""
    return _adapters_by_name(kind.__name__)


@cache
def _adapters_by_name(name: str) -> dict[str, TypeAdapter[Any]]:
    kind = _FRAMES[name]
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in _TENSOR_FIELDS.get(kind, ())]
    return {name: TypeAdapter(hints[name]) for name in names}


def _header_length(prefix: bytes) -> int:
    length: int = _LENGTH.unpack(prefix)[0]
    if length > MAX_HEADER_BYTES:
        raise RemoteProtocolError(f"a worker frame announces a header of {length} bytes; allowed are 64 MiB")
    return length


def send(connection: socket.socket, frame: Frame) -> None:
    """Write a frame, blocking."""
    for piece in encode(frame):
        connection.sendall(piece)


def receive(connection: socket.socket) -> Frame | None:
    """Read a frame, blocking; None if the peer has closed between two frames. Raises `RemoteProtocolError`."""
    prefix = _read(connection, _LENGTH.size, may_end=True)
    if not prefix:
        return None
    header = parse_header(bytes(_read(connection, _header_length(bytes(prefix)))))
    return build(header, _read(connection, header.payload_bytes))


def _read(connection: socket.socket, count: int, may_end: bool = False) -> bytearray:
    buffer = bytearray(count)
    at = 0
    while at < count:
        got = connection.recv_into(memoryview(buffer)[at:])
        if not got:
            if may_end and not at:
                return bytearray()
            raise RemoteProtocolError("a worker frame was cut off")
        at += got
    return buffer


async def send_async(writer: asyncio.StreamWriter, frame: Frame) -> None:
    """Write a frame and wait until the peer has room for it."""
    for piece in encode(frame):
        writer.write(piece)
        await writer.drain()


async def receive_async(reader: asyncio.StreamReader) -> Frame | None:
    """Read a frame; None if the peer has closed between two frames. Raises `RemoteProtocolError`."""
    try:
        prefix = await reader.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise RemoteProtocolError("a worker frame was cut off") from error
        return None
    try:
        header = parse_header(await reader.readexactly(_header_length(prefix)))
        return build(header, await reader.readexactly(header.payload_bytes))
    except asyncio.IncompleteReadError as error:
        raise RemoteProtocolError("a worker frame was cut off") from error
