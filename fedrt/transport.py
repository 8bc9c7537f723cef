"""Pumps one gRPC stream into a `Connection`: one reader, one writer, heartbeats, and payloads that yield to frames.

Posting never waits. Frames leave in the order in which they were posted; the chunks of payloads fill the gaps, one
payload after the other in turn, and are read from their buffer only when the peer has room for them.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from fedrt.errors import FedrtError, PayloadError, RemoteProtocolError, SpecError
from fedrt.payload import Assembler, Chunk, Manifest, chunks
from fedrt.session.allowance import FRAME_BURST, FRAME_RATE, Allowance
from fedrt.session.connection import Connection, Role
from fedrt.session.frames import Frame, Heartbeat, PayloadChunk, ResultAck, TaskCancel, TaskProgress, Welcome
from fedrt.session.liveness import Liveness
from fedrt.wire import request_from_pb, request_to_pb, response_from_pb, response_to_pb

MAX_POSTED_FRAMES = 10_000
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_REQUEST_BYTES = 1024 * 1024  # of what silos say; the largest legal frame, a Hello or a result, stays below
MAX_STREAMS = 16  # of one connection to the coordinator: a session, and questions about health
SMALL_CHUNK_BYTES = 16 * 1024  # a smaller one counts as a frame that nobody asked for, unless it is the last
HANDSHAKE_LIMIT = 20.0  # seconds a peer may take for its first frame
STATUS_LIMIT = 1.0  # seconds to wait for the status of a stream that no longer takes frames
GRPC_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
)

SESSION_SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.so_reuseport", 0),
)

_FLOOD = (
    f"the peer has sent {FRAME_BURST:.0f} frames that nobody asked for, and more than {FRAME_RATE:.0f} a second; "
    "stop what floods this session and dial again"
)

Collected = Callable[[memoryview | PayloadError], None]
Sink = Callable[[bytes | memoryview], None]  # may raise `PayloadError`


class SilenceError(FedrtError):
    """The peer has sent nothing for longer than the silence limit."""


class ExcessError(RemoteProtocolError):
    """The peer sends more, or reads less, than one session is allowed."""


class StreamEndedError(FedrtError):
    """The stream ended while we were writing; the reader may know why."""


class Stream(Protocol):
    """What grpc.aio gives on either end of a bidirectional call."""

    async def read(self) -> Any:
        """The next message, or `grpc.aio.EOF`."""

    async def write(self, message: Any, /) -> None:
        """Wait for room and write."""


class Transport:
    """One end of one session. Belongs to one asyncio task; `post` may be called from that event loop only."""

    def __init__(
        self,
        role: Role,
        stream: Stream,
        on_sent: Callable[[Frame], None] = lambda frame: None,
        allowance: Allowance | None = None,
    ) -> None:
        self.connection = Connection(role)
        self._stream = stream
        self._encode: Callable[[Any], Any] = request_to_pb if role is Role.SILO else response_to_pb
        self._decode: Callable[[Any], Frame | None] = response_from_pb if role is Role.SILO else request_from_pb
        self._on_sent = on_sent
        self._frames: deque[Frame] = deque()
        self._payloads: deque[tuple[str, Iterator[Chunk]]] = deque()
        self._collecting: dict[str, tuple[Assembler, Collected]] = {}
        self._wake = asyncio.Event()
        self._lost: asyncio.Future[None] | None = None  # what `run` waits on
        self._timer: asyncio.TimerHandle | None = None
        self._finishing = False
        now = time.monotonic()
        self._liveness = Liveness(HANDSHAKE_LIMIT, HANDSHAKE_LIMIT, now, now)
        self._allowance = Allowance(now) if allowance is None else allowance

    def post(self, frame: Frame) -> None:
        """Queue a frame, unless the peer never reads: then `run` ends. Raises `LocalProtocolError` if it is illegal."""
        self.connection.send(frame)
        if len(self._frames) >= MAX_POSTED_FRAMES:
            self._lose(ExcessError(f"the peer has left {MAX_POSTED_FRAMES} frames unread"))
            return
        self._adopt_intervals(frame)
        self._frames.append(frame)
        self._wake.set()

    def post_payload(self, payload_id: str, data: bytes | memoryview) -> None:
        """Queue the chunks of an announced payload; `data` must stay valid until they are sent or forgotten."""
        self._payloads.append((payload_id, chunks(payload_id, data)))
        self._wake.set()

    def withdraw(self, task_id: str) -> None:
        """Send no more chunks of this task's payloads, and let go of their bytes."""
        unwanted = self.connection.payloads_of(task_id)
        self._payloads = deque(entry for entry in self._payloads if entry[0] not in unwanted)

    def collect(self, manifest: Manifest, done: Collected, sink: Sink | None = None) -> None:
        """Collect an announced payload, in memory or into `sink`; `done` gets its bytes, or the error that spoilt it.

        Payloads that nobody collects are discarded. An error that `sink` raises spoils the payload.
        """
        self._collecting[manifest.payload_id] = (Assembler(manifest, sink), done)

    def pass_over(self, payload_id: str) -> None:
        """Collect no more of a payload; `done` is not called."""
        self._collecting.pop(payload_id, None)

    def finish(self) -> None:
        """End the session once everything queued has been written."""
        self._finishing = True
        self._wake.set()

    async def run(self, on_frame: Callable[[Frame], None]) -> None:
        """Pump until the peer ends the stream or `finish` was called.

        Raises `RemoteProtocolError`, `ExcessError` (one of these), `SilenceError`, `StreamEndedError`, and what reading
        from the stream raises.
        """
        reader = asyncio.create_task(self._read(on_frame))
        writer = asyncio.create_task(self._write())
        self._lost = asyncio.get_running_loop().create_future()
        pumps: tuple[asyncio.Future[None], ...] = (reader, writer, self._lost)
        self._watch_silence()
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if writer in done and writer.exception() is not None:
                await asyncio.wait({reader}, timeout=STATUS_LIMIT)  # it learns the status with which the peer ended
            ended = next(pump for pump in pumps if pump.done())
            ended.result()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _read(self, on_frame: Callable[[Frame], None]) -> None:
        while True:
            try:
                message = await self._stream.read()
                if message is grpc.aio.EOF:
                    return
                frame = self._decode(message)
            except (DecodeError, PayloadError, SpecError) as error:
                raise RemoteProtocolError(f"a frame cannot be read: {error}") from error
            now = time.monotonic()
            self._liveness.heard(now)
            if frame is not None:
                self.connection.receive(frame)
            if self._is_unasked(frame) and not self._allowance.spend(now):
                raise ExcessError(_FLOOD)
            if frame is not None:
                self._take(frame, on_frame)

    def _take(self, frame: Frame, on_frame: Callable[[Frame], None]) -> None:
        self._adopt_intervals(frame)
        if isinstance(frame, PayloadChunk):
            self._add_chunk(frame.chunk)
            return
        if isinstance(frame, ResultAck):  # what was offered with a task that is settled does not arrive any more
            self._collecting = {name: it for name, it in self._collecting.items() if self.connection.is_owed(name)}
        on_frame(frame)

    def _is_unasked(self, frame: Frame | None) -> bool:
        match frame:
            case None | Heartbeat() | TaskProgress() | TaskCancel():
                return True
            case PayloadChunk(chunk):
                return len(chunk.data) < SMALL_CHUNK_BYTES and self.connection.is_owed(chunk.payload_id)
            case _:
                return False

    def _adopt_intervals(self, frame: Frame) -> None:
        if isinstance(frame, Welcome):
            self._liveness.heartbeat_interval = frame.heartbeat_interval
            self._liveness.silence_limit = frame.silence_limit
            if self._timer is not None:  # it was set for the intervals of before
                self._watch_silence()

    def _add_chunk(self, chunk: Chunk) -> None:
        if chunk.payload_id not in self._collecting:
            return
        assembler, done = self._collecting[chunk.payload_id]
        try:
            if not assembler.add(chunk):
                return
        except PayloadError as error:
            del self._collecting[chunk.payload_id]
            done(error)
            return
        del self._collecting[chunk.payload_id]
        done(assembler.data())

    async def _write(self) -> None:
        while True:
            frame = self._next_frame()
            if frame is not None:
                try:
                    await self._stream.write(self._encode(frame))
                except (asyncio.InvalidStateError, grpc.RpcError, grpc.aio.BaseError) as error:
                    raise StreamEndedError(f"the stream ended: {error}") from error
                self._liveness.sent(time.monotonic())
                self._on_sent(frame)
            elif self._finishing:
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    def _next_frame(self) -> Frame | None:
        if self._frames:
            return self._frames.popleft()
        while self._payloads:
            payload_id, rest = self._payloads.popleft()
            if not self.connection.owes(payload_id):
                continue
            chunk = next(rest, None)
            if chunk is None:
                continue
            self._payloads.append((payload_id, rest))
            frame = PayloadChunk(chunk)
            self.connection.send(frame)
            return frame
        return None

    def _watch_silence(self) -> None:
        """See to it that neither side is silent, now and whenever that may change. A timer is cheaper than a task."""
        if self._timer is not None:
            self._timer.cancel()
        now = time.monotonic()
        if self._liveness.is_silent(now):
            self._lose(SilenceError(f"nothing was heard for {self._liveness.silence_limit:g} seconds"))
            return
        if self._liveness.heartbeat_due(now):
            if self.connection.is_open and not self._frames:
                self.post(Heartbeat(time.time()))
            self._liveness.sent(now)
        delay = max(0.0, self._liveness.next_check() - now)
        self._timer = asyncio.get_running_loop().call_later(delay, self._watch_silence)

    def _lose(self, error: FedrtError) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_exception(error)
