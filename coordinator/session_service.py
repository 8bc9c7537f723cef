"""Serves silos' sessions: translates frames into messages for the orchestrator and its orders into frames."""

import asyncio
import contextlib
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import structlog

import fedrt
from coordinator.inbox import (
    ArrivedTensors,
    Message,
    OfferRefused,
    ResultArrived,
    ResultInvalid,
    SessionClosed,
    SessionOpened,
    SiloDrained,
)
from coordinator.intake import Intake, IntakeMemory
from coordinator.orchestrator import Orchestrator
from coordinator.records import TensorsRef
from coordinator.validation import check_announcement
from fedrt.errors import FailureReason, LocalProtocolError, PayloadError, RemoteProtocolError, StorageError, TensorError
from fedrt.metrics import CoordinatorMetrics
from fedrt.payload import Manifest
from fedrt.session.allowance import SESSION_COST, Allowance
from fedrt.session.capabilities import PROTOCOL_1_0, named_by_both, needed, understood
from fedrt.session.connection import MAX_OPEN_OFFERS, MAX_OPEN_PAYLOADS, Phase, Role, TaskPhase
from fedrt.session.frames import (
    Drain,
    Frame,
    Hello,
    PayloadChunk,
    ResultAck,
    TaskCancel,
    TaskOffer,
    TaskReply,
    TaskResult,
    UnreadableResult,
    Welcome,
)
from fedrt.session.liveness import Intervals
from fedrt.task import Failure, RefusalReason, Result, Task, Verdict
from fedrt.tls import peer_identity
from fedrt.transport import ExcessError, SilenceError, StreamEndedError, Transport
from fedrt.v1 import session_service_pb2_grpc

INTAKE_MEMORY_BYTES = 64 * 1024 * 1024  # of small results of all silos on their way into the store
MAX_BACKLOG = 10_000  # messages before the orchestrator, above which no session opens
MAX_SESSIONS_OF_A_SILO = 4  # the current one, and some that are lost without anyone having noticed yet
MAX_STATUS_TEXT = 500  # characters; percent-encoded as a header it has to stay below 8 KiB

# stands for what a silo returns unasked: nothing of that is kept, and its verdict does not depend on it
_UNASKED = Failure(FailureReason.INTERNAL, "no round waits for this result")


@dataclass(frozen=True)
class SessionLimits:
    """What silos may use, how often they must be heard, and where large payloads land."""

    intervals: Intervals
    max_payload_bytes: int
    max_sessions: int
    intake_directory: Path


class SiloSession:
    """One open session; the orchestrator sees it as a `presence.Session`."""

    def __init__(self, silo_id: str, rpc: Any, service: "SessionService") -> None:
        self.silo_id = silo_id
        self.session_id = uuid.uuid4().hex
        self.opened = False
        self._capabilities = PROTOCOL_1_0
        self._software_version = ""
        self._service = service
        self._orchestrator = service.orchestrator
        self._transport = Transport(Role.COORDINATOR, rpc, self._on_sent, service.allowances[silo_id])
        self._offered: dict[str, tuple[str, memoryview]] = {}  # task -> the payload that follows its acceptance
        self._intakes: dict[str, Intake] = {}
        self._ended: asyncio.Future[tuple[grpc.StatusCode, str]] = asyncio.get_running_loop().create_future()

    async def run(self) -> tuple[grpc.StatusCode, str]:
        """Serve until the session ends; returns the status to end it with."""
        pump = asyncio.create_task(self._transport.run(self._on_frame))
        try:
            waited: set[asyncio.Future[Any]] = {pump, self._ended}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                return self._ended.result()
            pump.result()
        except ExcessError as error:
            return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        except RemoteProtocolError as error:
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except StreamEndedError as error:
            return grpc.StatusCode.CANCELLED, str(error)
        except SilenceError as error:
            return grpc.StatusCode.DEADLINE_EXCEEDED, str(error)
        except StorageError as error:
            self._service.log.error("a payload cannot be stored", silo=self.silo_id, reason=str(error))
            return grpc.StatusCode.RESOURCE_EXHAUSTED, "the coordinator cannot store results now; dial again later"
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            for intake in self._intakes.values():
                intake.discard()
            if self.opened:
                self._orchestrator.submit(SessionClosed(self))
        return grpc.StatusCode.OK, ""

    # ---- what the orchestrator orders

    def offer(self, task: Task, manifest: Manifest | None, data: memoryview | None) -> None:
        """Offer a task, unless this session knows it already."""
        connection = self._transport.connection
        if connection.our_phase is not Phase.OPEN or connection.task_phase(task.task_id) is not None:
            return
        if missing := needed(task) - self._capabilities:
            names = ", ".join(sorted(repr(capability.value) for capability in missing))
            old = f"this silo (fedrt {self._software_version}) does not understand {names}; upgrade it"
            self._submit(OfferRefused(self.silo_id, task.task_id, RefusalReason.METHOD_MISMATCH, old))
            return
        if not connection.may_offer or (manifest is not None and not connection.may_announce):
            busy = f"the session already has {MAX_OPEN_PAYLOADS} payloads or {MAX_OPEN_OFFERS} offers under way"
            self._submit(OfferRefused(self.silo_id, task.task_id, RefusalReason.BUSY, busy))
            return
        self._post(TaskOffer(task, manifest))
        if manifest is not None and data is not None:
            self._offered[task.task_id] = (manifest.payload_id, data)

    def settle(self, task_id: str, verdict: Verdict, message: str) -> None:
        """Acknowledge a result, if it arrived in this session; otherwise the silo sends it again and asks."""
        if self._transport.connection.task_phase(task_id) is TaskPhase.RETURNED:
            self._offered.pop(task_id, None)
            self._post(ResultAck(task_id, verdict, message[:1000]))

    def cancel(self, task_id: str, message: str) -> None:
        """Tell the silo to abandon a task, and let go of what was going to it and of what was coming from it."""
        if self._transport.connection.our_phase is Phase.START:
            return
        self._offered.pop(task_id, None)
        self._transport.withdraw(task_id)
        self._post(TaskCancel(task_id, message[:1000]))
        intake = self._intakes.pop(task_id, None)
        if intake is not None:
            self._transport.pass_over(intake.payload_id)
            intake.discard()
            self._service.metrics.results.labels(Verdict.LATE.value).inc()
            self.settle(task_id, Verdict.LATE, message)

    def replace(self) -> None:
        """End with ABORTED: a newer session of this silo has come."""
        self._end(grpc.StatusCode.ABORTED, "a newer session of this silo has replaced this one")

    def drain(self, grace_period: float) -> None:
        """Say that the coordinator is stopping and end once everything queued is written."""
        if self._transport.connection.our_phase is Phase.OPEN:
            self._post(Drain("the coordinator is stopping", grace_period, reconnect=True))
        self._transport.finish()

    # ---- frames

    def _post(self, frame: Frame) -> None:
        try:
            self._transport.post(frame)
        except LocalProtocolError as error:  # our bug ends this session, not the coordinator
            self._service.log.error("a frame could not be sent", silo=self.silo_id, reason=str(error))
            self._end(grpc.StatusCode.INTERNAL, "the coordinator failed; see its log")

    def _end(self, status: grpc.StatusCode, message: str) -> None:
        if not self._ended.done():
            self._ended.set_result((status, message))

    def _on_sent(self, frame: Frame) -> None:
        metrics = self._service.metrics
        metrics.frames_sent.labels(type(frame).__name__).inc()
        if isinstance(frame, PayloadChunk):
            metrics.payload_bytes.labels("out").inc(len(frame.chunk.data))

    def _on_frame(self, frame: Frame) -> None:
        self._service.metrics.frames_received.labels(type(frame).__name__).inc()
        match frame:
            case Hello():
                self._welcome(frame)
            case TaskReply(task_id, None):
                if task_id in self._offered:
                    self._transport.post_payload(*self._offered.pop(task_id))
            case TaskReply(task_id, reason, message) if reason is not None:
                self._offered.pop(task_id, None)
                self._submit(OfferRefused(self.silo_id, task_id, reason, message))
            case TaskResult(result):
                self._on_result(result)
            case UnreadableResult(task_id, message):
                self._submit(ResultInvalid(self.silo_id, task_id, message))
            case Drain():
                self._submit(SiloDrained(self))
            case _:
                pass  # heartbeats and progress need no answer

    def _welcome(self, hello: Hello) -> None:
        intervals = self._service.limits.intervals
        self._capabilities = understood(hello.capabilities)
        self._software_version = hello.software_version
        self._post(
            Welcome(
                session_id=self.session_id,
                heartbeat_interval=intervals.heartbeat,
                silence_limit=intervals.silence,
                obsolete_task_ids=self._orchestrator.active.obsolete(self.silo_id, hello.held_tasks),
                software_version=fedrt.__version__,
                capabilities=named_by_both(hello.capabilities),
            )
        )
        self.opened = True
        waiting_for = self._orchestrator.active.waiting_for
        wanted = tuple(task for task in hello.held_tasks if waiting_for(self.silo_id, task.task_id))
        self._submit(SessionOpened(self, replace(hello, held_tasks=wanted)))  # the others are nobody's business

    def _on_result(self, result: Result) -> None:
        expected = self._orchestrator.active.expectation(self.silo_id, result.task_id)
        if expected is None:
            self._submit(ResultArrived(self.silo_id, Result(result.task_id, _UNASKED, None), None))
            return
        try:
            check_announcement(result, expected.kind, expected.specs, expected.sent_sha256)
            if result.manifest is not None and result.manifest.byte_count > self._service.limits.max_payload_bytes:
                raise PayloadError(
                    f"the payload has {result.manifest.byte_count} bytes; limits.max_payload of the coordinator allows "
                    f"{self._service.limits.max_payload_bytes}"
                )
        except (PayloadError, TensorError) as error:
            self._submit(ResultInvalid(self.silo_id, result.task_id, str(error)))
            return
        if result.manifest is None:
            self._submit(ResultArrived(self.silo_id, result, None))
        else:
            self._collect(result, result.manifest)

    def _collect(self, result: Result, manifest: Manifest) -> None:
        intake = Intake(manifest, self._service.limits.intake_directory, self._service.intake_memory)
        self._intakes[result.task_id] = intake

        def done(data: memoryview | PayloadError) -> None:
            del self._intakes[result.task_id]
            if isinstance(data, PayloadError):
                intake.discard()
                self._submit(ResultInvalid(self.silo_id, result.task_id, str(data)))
                return
            self._service.metrics.payload_bytes.labels("in").inc(manifest.byte_count)
            tensors = ArrivedTensors(TensorsRef(manifest.tensors, manifest.sha256.hex()), intake.finish())
            self._submit(ResultArrived(self.silo_id, result, tensors))

        self._transport.collect(manifest, done, intake.write)

    def _submit(self, message: Message) -> None:
        self._orchestrator.submit(message)


class SessionService(session_service_pb2_grpc.SessionServiceServicer):
    """Opens sessions and ends them all when the coordinator drains."""

    def __init__(self, orchestrator: Orchestrator, metrics: CoordinatorMetrics, limits: SessionLimits) -> None:
        self.orchestrator = orchestrator
        self.metrics = metrics
        self.limits = limits
        self.intake_memory = IntakeMemory(INTAKE_MEMORY_BYTES)
        self.allowances: defaultdict[str, Allowance] = defaultdict(lambda: Allowance(time.monotonic()))
        self._sessions: set[SiloSession] = set()
        self._by_silo: defaultdict[str, list[SiloSession]] = defaultdict(list)  # oldest first
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.log = structlog.get_logger("coordinator.sessions")

    async def OpenSession(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]
        """Serve one silo. Who may call is decided before, by `authorization`."""
        await context.send_initial_metadata(())  # now: ending the call while the first frame is written would repeat it
        silo_id = peer_identity(context.auth_context()).name
        refusal = self._refusal(silo_id)
        if refusal is not None:
            await context.abort(*refusal)
        session = SiloSession(silo_id, context, self)
        log = self.log.bind(silo=silo_id, session=session.session_id)
        self._add(session)
        log.debug("session opens")
        try:
            status, message = await session.run()
        finally:
            self._remove(session)
        log.info("session ended", status=status.name, message=message[:MAX_STATUS_TEXT])
        if status is not grpc.StatusCode.OK:
            await context.abort(status, message[:MAX_STATUS_TEXT])

    def _refusal(self, silo_id: str) -> tuple[grpc.StatusCode, str] | None:
        """Why no session opens now; None if one does, which is then paid for."""
        if self._draining:
            return grpc.StatusCode.UNAVAILABLE, "the coordinator is stopping; dial again later"
        if self.orchestrator.backlog >= MAX_BACKLOG:
            return grpc.StatusCode.UNAVAILABLE, "the coordinator is behind with its work; dial again later"
        if not self.allowances[silo_id].spend(time.monotonic(), SESSION_COST):
            self.log.warning("silo dials or floods too often", silo=silo_id)
            return grpc.StatusCode.RESOURCE_EXHAUSTED, "this silo has dialled or sent too often; dial again later"
        if len(self._by_silo) >= self.limits.max_sessions and silo_id not in self._by_silo:
            message = "the coordinator serves as many silos as limits.max_sessions allows"
            return grpc.StatusCode.RESOURCE_EXHAUSTED, message
        return None

    def _add(self, session: SiloSession) -> None:
        of_silo = self._by_silo[session.silo_id]
        of_silo.append(session)
        if len(of_silo) > MAX_SESSIONS_OF_A_SILO:
            of_silo[0].replace()
        self._sessions.add(session)
        self._idle.clear()
        self.metrics.sessions_open.set(len(self._sessions))

    def _remove(self, session: SiloSession) -> None:
        self._sessions.discard(session)
        self._by_silo[session.silo_id].remove(session)
        if not self._by_silo[session.silo_id]:
            del self._by_silo[session.silo_id]
        if not self._sessions:
            self._idle.set()
        self.metrics.sessions_open.set(len(self._sessions))

    async def drain(self, grace_period: float) -> None:
        """Tell every silo that the coordinator is stopping and wait until the sessions have ended."""
        self._draining = True
        for session in self._sessions:
            session.drain(grace_period)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_period):
                await self._idle.wait()
