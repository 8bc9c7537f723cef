"""Keeps one session with the coordinator open: dial, introduce, pump, and after a loss back off and dial again."""

import asyncio
import enum
import random
from collections.abc import Callable
from datetime import UTC, datetime

import grpc
import structlog

import fedrt
from fedrt.certificates import Expectation
from fedrt.complaint import Complaint
from fedrt.errors import IdentityError, PayloadError, RemoteProtocolError
from fedrt.identity import Role as IdentityRole
from fedrt.metrics import SiloMetrics
from fedrt.session.capabilities import OURS
from fedrt.session.connection import Phase, Role, TaskPhase
from fedrt.session.frames import (
    Drain,
    Frame,
    Hello,
    PayloadChunk,
    ResultAck,
    TaskCancel,
    TaskOffer,
    TaskProgress,
    TaskReply,
    TaskResult,
    UnreadableAck,
    UnreadableOffer,
    Welcome,
)
from fedrt.task import RefusalReason, Result
from fedrt.tls import channel_credentials, explain_handshake_failure
from fedrt.transport import GRPC_OPTIONS, SilenceError, StreamEndedError, Transport
from fedrt.v1 import session_service_pb2_grpc
from silo import ledger as ledgers
from silo.agent import Agent, OfferArrived, SessionDown, SessionUp, TensorsArrived
from silo.backoff import Backoff
from silo.departures import Departures
from silo.dialling import ANSWER_LIMIT, DIAL_OPTIONS, Dialling, unreadable
from silo.work import WorkerReport

_BROKEN = ("socket closed", "connection reset", "broken pipe", "stream removed")
_REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


class Ended(enum.Enum):
    """How a session ended, as far as it matters for the next attempt."""

    SERVED = "served"
    TURNED_AWAY = "turned away"  # the coordinator has no room for us or for our results now
    UNANSWERED = "unanswered"


class CoordinatorSession:
    """One open session; the agent sees it as an `agent.Session`."""

    def __init__(self, transport: Transport, agent: Agent, metrics: SiloMetrics) -> None:
        self.transport = transport
        self.welcomed = False
        self._agent = agent
        self._metrics = metrics
        self._log = structlog.get_logger("silo.link")
        self._offers: dict[str, TaskOffer] = {}

    def reply(self, reply: ledgers.Reply) -> None:
        """Answer an offer, if it was made in this session; an acceptance also begins to collect the tensors."""
        if self.transport.connection.task_phase(reply.task_id) is not TaskPhase.OFFERED:
            return
        offer = self._offers.pop(reply.task_id, None)
        if offer is not None and offer.manifest is not None and reply.refusal is None:
            task_id = reply.task_id
            self.transport.collect(offer.manifest, lambda data: self._tensors(task_id, data))
        self.transport.post(TaskReply(reply.task_id, reply.refusal, reply.message[:1000]))

    def send(self, result: Result, data: memoryview | None) -> None:
        """Send a result, unless this session has sent it already."""
        if self.transport.connection.task_phase(result.task_id) is not TaskPhase.WORKING:
            return
        self.transport.post(TaskResult(result))
        if result.manifest is not None and data is not None:
            self.transport.post_payload(result.manifest.payload_id, data)

    def progress(self, task_id: str, done: int, planned: int) -> None:
        """Say how far a task is, if the coordinator can make sense of it."""
        if self.transport.connection.task_phase(task_id) is TaskPhase.WORKING:
            self.transport.post(TaskProgress(task_id, done, planned))

    def drain(self, grace_period: float) -> None:
        """Say that the silo is stopping."""
        if self.welcomed and self.transport.connection.our_phase is Phase.OPEN:
            self.transport.post(Drain("the silo is stopping", grace_period, reconnect=False))

    def on_frame(self, frame: Frame) -> None:
        """Pass on what the coordinator says."""
        match frame:
            case Welcome():
                self.welcomed = True
                self._agent.submit(SessionUp(self, frame.obsolete_task_ids))
            case TaskOffer(task, manifest):
                self._offers[task.task_id] = frame
                self._agent.submit(OfferArrived(task, manifest))
            case UnreadableOffer(task_id, message):
                self._log.warning("offer cannot be read", task=task_id, message=message)
                reason = RefusalReason.METHOD_MISMATCH
                text = f"this silo's fedrt cannot read the offer: {message[:1000]}"
                self.transport.post(TaskReply(task_id, reason, text))
            case TaskCancel(task_id, message):
                self._log.warning("task cancelled by the coordinator", task=task_id, message=message)
                self._agent.submit(ledgers.CancelArrived(task_id))
            case ResultAck(task_id, verdict, message):
                if message:
                    self._log.warning("result not counted", task=task_id, message=message)
                self._agent.submit(ledgers.VerdictArrived(task_id, verdict))
            case UnreadableAck(task_id, message):
                text = "verdict cannot be read; the result is kept and sent again; upgrade this silo"
                self._log.warning(text, task=task_id, message=message)
            case Drain(message):
                self._log.info("coordinator drains", message=message)
            case _:
                pass

    def _tensors(self, task_id: str, data: memoryview | PayloadError) -> None:
        if not isinstance(data, PayloadError):
            self._metrics.payload_bytes.labels("in").inc(len(data))
        self._agent.submit(TensorsArrived(task_id, data))


class Link:
    """Runs until `finish`; raises `IdentityError` when dialling again cannot help."""

    def __init__(
        self, dialling: Dialling, agent: Agent, report: WorkerReport, departures: Departures, metrics: SiloMetrics
    ) -> None:
        self._dialling = dialling
        self._agent = agent
        self._report = report
        self._departures = departures
        self._metrics = metrics
        self._log = structlog.get_logger("silo.link")
        random_ = random.Random()  # noqa: S311  # jitter, not a secret
        self._backoff = Backoff(dialling.initial_delay, dialling.max_delay, random_)
        self._complaint = Complaint()
        self._session: CoordinatorSession | None = None
        self._finished = asyncio.Event()
        self._draining: float | None = None
        self.on_connected: Callable[[], None] = lambda: None
        self.on_disconnected: Callable[[str], None] = lambda why: None  # after each session and each attempt

    async def run(self) -> None:
        """Keep a session open until `finish`."""
        sessions = 0
        while not self._finished.is_set():
            ended = await self._one_session(first=sessions == 0)
            if ended is not Ended.UNANSWERED:
                sessions += 1
            if ended is Ended.SERVED:
                self._backoff.reset()
            if self._finished.is_set():
                return
            delay = self._backoff.next_wait()
            self._log.debug("dialling again", seconds=round(delay, 2))
            try:
                async with asyncio.timeout(delay):
                    await self._finished.wait()
            except TimeoutError:
                continue

    def drain(self, grace_period: float) -> None:
        """Tell the coordinator that the silo is stopping, now or as soon as a session is open."""
        self._draining = grace_period
        if self._session is not None:
            self._session.drain(grace_period)

    @property
    def is_open(self) -> bool:
        """Whether the coordinator has welcomed us and may settle results."""
        return self._session is not None and self._session.welcomed

    def finish(self) -> None:
        """End the session once everything queued is written, and do not dial again."""
        self._finished.set()
        if self._session is not None:
            self._session.transport.finish()

    async def _one_session(self, first: bool) -> Ended:
        """Dial and pump until the session ends."""
        if (problem := unreadable(self._dialling.files)) is not None:
            self._complain(problem, "IDENTITY_UNREADABLE")
            self.on_disconnected(problem)
            return Ended.UNANSWERED
        async with self._channel() as channel:
            call = session_service_pb2_grpc.SessionServiceStub(channel).OpenSession()
            session = CoordinatorSession(Transport(Role.SILO, call, self._sent), self._agent, self._metrics)
            self._session = session
            session.transport.post(
                Hello(
                    software_version=fedrt.__version__,
                    methods=self._report.methods,
                    held_tasks=self._agent.held,
                    device=self._report.device,
                    memory_bytes=self._report.memory_bytes,
                    capabilities=OURS,
                )
            )
            try:
                return await self._pump(session, first)
            finally:
                self._session = None
                self._metrics.connected.set(0)
                self._agent.submit(SessionDown(session))
                call.cancel()

    def _channel(self) -> grpc.aio.Channel:
        """Raises `IdentityError` if our files are not fit for use."""
        settings = self._dialling
        options: list[tuple[str, int | str]] = [*GRPC_OPTIONS, *DIAL_OPTIONS]
        if settings.server_name is not None:
            options.append(("grpc.ssl_target_name_override", settings.server_name))
        credentials = channel_credentials(settings.files, Expectation(IdentityRole.SILO, settings.federation))
        return grpc.aio.secure_channel(settings.address, credentials, options)

    async def _pump(self, session: CoordinatorSession, first: bool) -> Ended:
        """Until the session has ended; says why. Raises `IdentityError` if the next one would end in the same way."""
        ended, why, status = None, "the coordinator ended the session", ""
        try:
            async with asyncio.timeout(ANSWER_LIMIT) as answer:
                await session.transport.run(lambda frame: self._on_frame(session, frame, first, answer))
        except grpc.aio.AioRpcError as error:
            why, status = self._explain(error, session.welcomed), error.code().name
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                ended = Ended.TURNED_AWAY
        except TimeoutError:
            why = f"the coordinator does not answer: nothing within {ANSWER_LIMIT:g} seconds of dialling"
            status = "TIME_LIMIT"
        except (RemoteProtocolError, SilenceError, StreamEndedError) as error:
            why, status = str(error), type(error).__name__
        if status:
            self._complain(why, status)
        elif not self._finished.is_set():
            self._log.info("session ended by the coordinator")
        self._metrics.connected.set(0)
        if not self._finished.is_set():
            self.on_disconnected(why)
        return ended or (Ended.SERVED if session.welcomed else Ended.UNANSWERED)

    def _on_frame(self, session: CoordinatorSession, frame: Frame, first: bool, answer: asyncio.Timeout) -> None:
        if isinstance(frame, Welcome):
            answer.reschedule(None)
            self._complaint.end()
            self._metrics.connected.set(1)
            if not first:
                self._metrics.reconnects.inc()
            self._log.info("session open", session=frame.session_id, coordinator_version=frame.software_version)
            self.on_connected()
        session.on_frame(frame)
        if isinstance(frame, Welcome) and self._draining is not None:
            session.drain(self._draining)

    def _complain(self, why: str, status: str) -> None:
        log = self._log.warning if self._complaint.is_due(why) else self._log.debug  # an outage may take hours
        log("session lost", address=self._dialling.address, status=status, reason=why)

    def _sent(self, frame: Frame) -> None:
        self._departures.record(frame)
        if isinstance(frame, PayloadChunk):
            self._metrics.payload_bytes.labels("out").inc(len(frame.chunk.data))

    def _explain(self, error: grpc.aio.AioRpcError, welcomed: bool) -> str:
        """Why the session ended. Raises `IdentityError` if the next one would end in the same way."""
        code, details = error.code(), error.details() or ""
        if code in _REFUSED:
            raise IdentityError(f"the coordinator at '{self._dialling.address}' refused this silo: {details}")
        if code is grpc.StatusCode.ABORTED:
            raise IdentityError(f"{details}: another daemon runs with this silo's identity; stop one of the two")
        if code is grpc.StatusCode.UNAVAILABLE and not welcomed:
            return explain_handshake_failure(self._dialling.files, details, datetime.now(UTC))
        return explain_lost_session(details)


def explain_lost_session(details: str) -> str:
    """Why an open session ended: what the coordinator said, or what it means that gRPC only saw a connection end."""
    if any(symptom in details.lower() for symptom in _BROKEN):
        return f"the connection broke ({details}): the coordinator has stopped or the network failed; work goes on"
    return details
