"""A silo written by hand: it speaks protobuf on a real mTLS stream and need not keep to any rule."""

import asyncio
import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from fedrt.payload import CHUNK_BYTES
from fedrt.transport import GRPC_OPTIONS
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import task_pb2 as task_pb
from fedrt.v1 import tensor_pb2 as tensor_pb

METHOD = "/fedrt.v1.SessionService/OpenSession"
LIMIT = 40.0  # seconds that anything may take
SOON = (("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 50))  # it may yet start
FLOAT32 = tensor_pb.ELEMENT_TYPE_FLOAT32
RUNNING, FINISHED = session_pb.HeldTask.STATE_RUNNING, session_pb.HeldTask.STATE_FINISHED


def credentials(directory: Path, trust: Path | None = None) -> grpc.ChannelCredentials:
    """Whatever lies in an identity directory, unchecked."""
    trusted = (trust or directory / "trust.pem").read_bytes()
    return grpc.ssl_channel_credentials(
        trusted, (directory / "key.pem").read_bytes(), (directory / "certificate.pem").read_bytes()
    )


def manifest(
    payload_id: str, tensors: Mapping[str, np.ndarray], data: bytes | None = None
) -> tuple[tensor_pb.PayloadManifest, bytes]:
    """A manifest and the bytes it describes; a test spoils what it likes."""
    packed = b"".join(tensors[name].tobytes() for name in sorted(tensors)) if data is None else data
    headers = [
        tensor_pb.TensorHeader(name=name, element_type=FLOAT32, shape=tensors[name].shape) for name in sorted(tensors)
    ]
    digest = hashlib.sha256(packed).digest()
    return tensor_pb.PayloadManifest(
        payload_id=payload_id, tensors=headers, byte_count=len(packed), sha256=digest
    ), packed


def success(
    task_id: str, shared: tensor_pb.PayloadManifest | None, examples: int = 10, metrics: Mapping[str, float] = {}
) -> task_pb.TaskResult:
    outcome = task_pb.TaskSuccess(shared_tensors=shared, example_count=examples, metrics=dict(metrics))
    return task_pb.TaskResult(task_id=task_id, success=outcome)


@dataclass
class RawSilo:
    """One session. Frames that arrive are kept in `frames`; heartbeats are dropped."""

    port: int
    identity: Path
    certified: grpc.ChannelCredentials | None = None
    is_welcome: bool = True  # whether the handshake is expected to succeed, at the latest in a moment
    frames: asyncio.Queue[session_pb.OpenSessionResponse | None] = field(default_factory=asyncio.Queue)
    kept: list[session_pb.OpenSessionResponse] = field(default_factory=list)
    listens: asyncio.Event = field(default_factory=asyncio.Event)  # clear it, and what arrives stays in the pipe

    async def __aenter__(self) -> "RawSilo":
        self.channel = grpc.aio.secure_channel(
            f"localhost:{self.port}", self.certified or credentials(self.identity), [*GRPC_OPTIONS, *SOON]
        )
        if self.is_welcome:
            await asyncio.wait_for(self.channel.channel_ready(), LIMIT)
        self.call = self.channel.stream_stream(
            METHOD,
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=session_pb.OpenSessionResponse.FromString,
        )()
        self.reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.reader.cancel()
        await asyncio.gather(self.reader, return_exceptions=True)
        self.call.cancel()
        await self.channel.close()

    async def _read(self) -> None:
        self.listens.set()
        try:
            while (message := await self.call.read()) is not grpc.aio.EOF:
                await self.listens.wait()
                if message.WhichOneof("frame") != "heartbeat":
                    self.frames.put_nowait(message)
        except grpc.aio.AioRpcError:
            pass
        self.frames.put_nowait(None)

    # ---- speaking

    async def send(self, **frame: Any) -> None:
        await self.write(session_pb.OpenSessionRequest(**frame))

    async def write(self, message: session_pb.OpenSessionRequest | bytes) -> None:
        """Nothing happens if the session has ended meanwhile; `status` says why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await asyncio.wait_for(self.call.write(message), LIMIT)

    async def hello(self, held: Mapping[str, int] = {}) -> session_pb.Welcome:
        tasks = [session_pb.HeldTask(task_id=task_id, state=state) for task_id, state in held.items()]
        await self.send(hello=session_pb.Hello(software_version="raw", held_tasks=tasks))
        return await self.next("welcome")

    async def accept(self, offer: task_pb.TaskOffer) -> bytes:
        """Take the task and return the bytes of its tensors."""
        await self.send(task_reply=task_pb.TaskReply(task_id=offer.task_id, acceptance=task_pb.TaskAcceptance()))
        data = b""
        while len(data) < offer.shared_tensors.byte_count:
            data += (await self.next("payload_chunk")).data
        return data

    async def result(self, result: task_pb.TaskResult, data: bytes = b"") -> None:
        """The result and the chunks of its payload."""
        await self.send(task_result=result)
        payload_id = result.success.shared_tensors.payload_id
        for offset in range(0, len(data), CHUNK_BYTES):
            await self.chunk(payload_id, offset, data[offset : offset + CHUNK_BYTES])

    async def chunk(self, payload_id: str, offset: int, data: bytes) -> None:
        await self.send(payload_chunk=tensor_pb.PayloadChunk(payload_id=payload_id, offset=offset, data=data))

    # ---- listening

    async def next(self, kind: str) -> Any:
        """The next frame of this kind; others that came before it are kept for later."""
        for message in self.kept:
            if message.WhichOneof("frame") == kind:
                self.kept.remove(message)
                return getattr(message, kind)
        async with asyncio.timeout(LIMIT):
            while True:
                message = await self.frames.get()
                if message is None:
                    raise AssertionError(f"the session ended ({await self.status()}) while waiting for {kind}")
                if message.WhichOneof("frame") == kind:
                    return getattr(message, kind)
                self.kept.append(message)

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the coordinator ended the session."""
        async with asyncio.timeout(LIMIT):
            return await self.call.code(), await self.call.details()

    # ---- an honest answer

    async def work_honestly(self, delta: float = 1.0, examples: int = 10) -> str:
        """Take the next offer and return a valid result; returns the task's id."""
        offer = await self.next("task_offer")
        await self.accept(offer)
        tensors = {t.name: np.full(t.shape, delta, np.float32) for t in offer.shared_tensors.tensors}
        if offer.kind != task_pb.TASK_KIND_TRAIN:
            await self.result(success(offer.task_id, None, examples))
        else:
            described, data = manifest(offer.task_id, tensors)
            await self.result(success(offer.task_id, described, examples), data)
        ack = await self.next("result_ack")
        assert ack.verdict == task_pb.RESULT_VERDICT_ACCEPTED, ack
        return offer.task_id
