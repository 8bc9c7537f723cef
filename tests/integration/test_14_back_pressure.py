"""What a silo can do to the coordinator's memory, and a coordinator to a silo: bounded, and its own session only.

The coordinator is a process of its own, so that its memory can be measured. Beside the silo that misbehaves an honest
one works on an experiment from before to after, and must succeed.
"""

import asyncio
import contextlib
import itertools
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from coordinator import session_service
from coordinator.inbox import ResultArrived, SessionOpened
from coordinator.orchestrator import Orchestrator
from fedrt.payload import CHUNK_BYTES
from fedrt.session.allowance import FRAME_BURST
from fedrt.session.connection import MAX_OPEN_PAYLOADS
from fedrt.spec import ExperimentSpec
from fedrt.tls import IdentityFiles, server_credentials
from fedrt.transport import GRPC_OPTIONS
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import session_service_pb2_grpc
from fedrt.v1 import task_pb2 as task_pb
from fedrt.v1 import tensor_pb2 as tensor_pb
from tests.fakes.federation import Federation, make_spec
from tests.fakes.proxy import Proxy
from tests.fakes.raw_silo import FINISHED, FLOAT32, RUNNING, RawSilo, manifest, success
from tests.fakes.workers import FakeWorker
from tests.integration.conftest import Logs
from tests.integration.following import State, Watch, connected

Request = session_pb.OpenSessionRequest
Code = grpc.StatusCode
MIB = 1024 * 1024
SLOW = 60.0  # seconds that any single step may take on a machine that is very busy
PATIENT = "silence_limit: 1h\n"  # silos written by hand send no heartbeats, and a busy machine may pause
HEARTBEAT = Request(heartbeat=session_pb.Heartbeat()).SerializeToString()
LATE, INVALID = task_pb.RESULT_VERDICT_LATE, task_pb.RESULT_VERDICT_INVALID

measured = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")


def of_mib(size: int, silo: str = "south") -> ExperimentSpec:
    """An experiment whose shared tensors have this many MiB."""
    return make_spec(1, (silo,), hyperparameters=f'{{"context_length": {size * 512}}}')


@dataclass(frozen=True)
class Apart:
    """The coordinator's process."""

    process: asyncio.subprocess.Process
    log: Path

    def ended(self, silo: str) -> list[tuple[str, str]]:
        """The status and the message with which the sessions of a silo ended, as the coordinator says."""
        entries = [json.loads(line) for line in self.log.read_text().splitlines()]
        said = [entry for entry in entries if entry["event"] == "session ended" and entry["silo"] == silo]
        return [(entry["status"], entry["message"]) for entry in said]

    def memory_mib(self, key: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{key}:\s+(\d+)", status).group(1)) / 1024


@contextlib.asynccontextmanager
async def apart(federation: Federation, extra: str = "") -> AsyncIterator[Apart]:
    """The coordinator, listening, in a process of its own."""
    script = Path(sys.executable).parent / "fedrt-coordinator"
    config, log = federation.coordinator_yaml(extra), federation.directory / "coordinator.log"
    config.write_text(config.read_text().replace("log: {level: error}", "log: {level: info, format: json}"))
    with log.open("w") as stderr:
        process = await asyncio.create_subprocess_exec(script, "run", "-c", config, stderr=stderr)
    try:
        async with asyncio.timeout(SLOW), federation.admin():
            pass
        yield Apart(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        assert await asyncio.wait_for(process.wait(), SLOW) == 0


@contextlib.asynccontextmanager
async def beside_an_honest_silo(federation: Federation, most_mib: float, extra: str = PATIENT) -> AsyncIterator[Apart]:
    """North works while a test does its worst, and then succeeds; the coordinator's peak has grown by less."""
    worker = FakeWorker(gate=asyncio.Event())
    async with apart(federation, extra) as coordinator:
        honest = federation.start_silo("north", worker)
        await Watch(federation).until(connected("north"), SLOW)
        await federation.create("unaffected", make_spec(3, ("north",)))
        await asyncio.wait_for(worker.began.wait(), SLOW)
        before = coordinator.memory_mib("VmRSS")
        yield coordinator
        worker.gate.set()
        experiment, _ = await federation.finish("unaffected", SLOW)
        assert experiment.state == State.STATE_SUCCEEDED
        assert not worker.abandoned
        assert not honest.task.done()
        assert coordinator.memory_mib("VmHWM") - before < most_mib
        await federation.stop()


def south(federation: Federation, port: int | None = None) -> RawSilo:
    return RawSilo(port or federation.port, federation.directory / "certs/silos/south")


def assert_ended(ended: tuple[Code, str], code: Code, complaint: str) -> None:
    """A write of grpc.aio that meets the end of its call hides the status; then it is enough that there is an end."""
    if ended != (Code.INTERNAL, "Internal error from Core"):
        assert ended[0] is code, ended
        assert complaint in ended[1]


async def send_until_ended(raw: RawSilo, messages: Iterator[bytes]) -> None:
    """Send one after the other until the session ends. A write that meets the end of a call hides its status."""
    async with asyncio.timeout(SLOW):
        for message in messages:
            if raw.call.done():
                return
            await raw.write(message)


def chunk(payload_id: str, offset: int, data: bytes) -> bytes:
    piece = tensor_pb.PayloadChunk(payload_id=payload_id, offset=offset, data=data)
    return Request(payload_chunk=piece).SerializeToString()


async def cancel(federation: Federation, name: str) -> None:
    async with federation.admin() as stub:
        await stub.CancelExperiment(pb.CancelExperimentRequest(experiment_id=name))


async def make_known(federation: Federation) -> None:
    """South has been there once, so experiments may ask it."""
    async with south(federation) as raw:
        await raw.hello()
        await Watch(federation).until(connected("south"), SLOW)


# ---- it does not read


@measured
async def test_01_one_that_never_reads_pins_no_tensors_of_experiments_that_are_over(federation: Federation) -> None:
    count, size = 12, 16  # 192 MiB of tensors in all
    async with beside_an_honest_silo(federation, most_mib=120) as coordinator, south(federation) as raw:
        await raw.hello()
        raw.listens.clear()
        for number in range(count):
            name = f"unread-{number}"
            await federation.create(name, of_mib(size))  # when this returns, the offer is on its way
            accepted = task_pb.TaskReply(task_id=f"{name}/1/train/south", acceptance=task_pb.TaskAcceptance())
            await raw.send(task_reply=accepted)
            await raw.write(HEARTBEAT)
            await cancel(federation, name)
        assert not raw.call.done()  # held back, not ended
        assert coordinator.process.returncode is None


# ---- it floods


@measured
async def test_02_a_flood_of_heartbeats_ends_its_session(federation: Federation) -> None:
    async with beside_an_honest_silo(federation, most_mib=20) as coordinator, south(federation) as raw:
        await raw.hello()
        await send_until_ended(raw, itertools.repeat(HEARTBEAT))
        [(status, message)] = coordinator.ended("south")
    assert status == "RESOURCE_EXHAUSTED"
    assert "frames that nobody asked for" in message


@measured
async def test_03_a_flood_of_progress_ends_its_session(federation: Federation) -> None:
    progress = Request(task_progress=task_pb.TaskProgress(task_id="t", step_count=1)).SerializeToString()
    async with beside_an_honest_silo(federation, most_mib=20) as coordinator, south(federation) as raw:
        await raw.hello({"t": FINISHED})
        await send_until_ended(raw, itertools.repeat(progress))
        [(status, _)] = coordinator.ended("south")
    assert status == "RESOURCE_EXHAUSTED"


def endless_result(task_id: str) -> task_pb.TaskResult:
    """As much as a result may hold without any tensor."""
    headers = [tensor_pb.TensorHeader(name=f"{n:0>128}", element_type=FLOAT32, shape=[1] * 8) for n in range(1024)]
    described = tensor_pb.PayloadManifest(payload_id=task_id, tensors=headers, byte_count=4096, sha256=bytes(32))
    return success(task_id, described, metrics={f"{n:0>128}": 0.0 for n in range(256)})


@measured
async def test_04_a_flood_of_results_of_unknown_tasks_leaves_nothing_behind(federation: Federation) -> None:
    names = [f"t{number}" for number in range(60)]
    async with beside_an_honest_silo(federation, most_mib=40), south(federation) as raw:
        await raw.hello(dict.fromkeys(names, FINISHED))
        for name in names:
            await raw.result(endless_result(name), bytes(4096))
        for name in names:
            ack = await raw.next("result_ack")
            assert (ack.task_id, ack.verdict) == (name, task_pb.RESULT_VERDICT_UNKNOWN_TASK)


async def test_05_what_nobody_waits_for_does_not_reach_the_orchestrator(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Any] = []
    submit = Orchestrator.submit
    monkeypatch.setattr(
        Orchestrator, "submit", lambda self, message: (submitted.append(message), submit(self, message))
    )
    federation.start_coordinator(PATIENT)
    async with south(federation) as raw:
        await raw.hello({"t": FINISHED, "u": RUNNING})
        await raw.result(endless_result("t"), bytes(4096))
        await raw.next("result_ack")
    [opened] = [message for message in submitted if isinstance(message, SessionOpened)]
    [arrived] = [message for message in submitted if isinstance(message, ResultArrived)]
    assert opened.hello.held_tasks == ()
    assert arrived.result.manifest is None
    assert len(repr(arrived.result)) < 300


# ---- payloads


@measured
async def test_06_more_than_was_announced_ends_its_session(federation: Federation) -> None:
    async with beside_an_honest_silo(federation, most_mib=30) as coordinator, south(federation) as raw:
        await raw.hello()
        await federation.create("more", make_spec(1, ("south",)))
        offer = await raw.next("task_offer")
        await raw.accept(offer)
        described, data = manifest("p", {"context": np.ones((16, 512), np.float32)})
        await raw.result(success(offer.task_id, described), data[:-4])
        starts = itertools.count(len(data) - 4, CHUNK_BYTES)
        await send_until_ended(raw, (chunk("p", at, bytes(CHUNK_BYTES)) for at in starts))
        [(status, message)] = coordinator.ended("south")
    assert status == "INVALID_ARGUMENT"
    assert "and at most 32768" in message


@measured
async def test_07_more_than_is_allowed_is_invalid_and_its_bytes_are_passed_over(federation: Federation) -> None:
    size = 96 * MIB
    extra = f"{PATIENT}limits: {{max_payload: 64KiB}}\n"
    async with beside_an_honest_silo(federation, most_mib=40, extra=extra), south(federation) as raw:
        await raw.hello()
        await federation.create("huge", make_spec(1, ("south",)))
        offer = await raw.next("task_offer")
        await raw.accept(offer)
        header = tensor_pb.TensorHeader(name="context", element_type=FLOAT32, shape=[size // 4])
        described = tensor_pb.PayloadManifest(payload_id="p", tensors=[header], byte_count=size, sha256=bytes(32))
        await raw.result(success(offer.task_id, described), bytes(size))
        assert (await raw.next("result_ack")).verdict == INVALID
        assert not raw.call.done()


@measured
async def test_08_announcements_without_a_byte_cost_nothing_and_are_counted(federation: Federation) -> None:
    names = [f"silent-{number:02}" for number in range(MAX_OPEN_PAYLOADS + 1)]
    async with beside_an_honest_silo(federation, most_mib=40):
        await make_known(federation)
        tasks = {}
        async with south(federation) as raw:  # so that rounds begin
            await raw.hello()
            for name in names:
                await federation.create(name, make_spec(1, ("south",)))
                tasks[f"{name}/1/train/south"] = RUNNING
        described, _ = manifest("p", {"context": np.ones((16, 512), np.float32)})
        async with south(federation) as raw:
            welcome = await raw.hello(tasks)
            assert not welcome.obsolete_task_ids
            for task_id in tasks:
                described.payload_id = task_id
                await raw.result(success(task_id, described))
            ended = await raw.status()
    assert_ended(ended, Code.INVALID_ARGUMENT, f"more than {MAX_OPEN_PAYLOADS} payloads are open")


async def test_09_a_payload_that_trickles_ends_with_its_round(federation: Federation) -> None:
    federation.start_coordinator(PATIENT)
    landing = federation.directory / "coordinator/blobs/intake"
    async with south(federation) as raw:
        await raw.hello()
        await federation.create("trickle", of_mib(2))
        offer = await raw.next("task_offer")
        await raw.accept(offer)
        described, data = manifest("p", {"context": np.ones((1024, 512), np.float32)})
        await raw.result(success(offer.task_id, described), data[:-CHUNK_BYTES])
        async with asyncio.timeout(SLOW):
            while not list(landing.iterdir()):  # noqa: ASYNC110  it announces itself nowhere
                await asyncio.sleep(0.01)
        await cancel(federation, "trickle")
        ack = await raw.next("result_ack")
        assert (ack.verdict, ack.message) == (LATE, "cancelled by an operator")
        assert list(landing.iterdir()) == []
        await raw.chunk("p", len(data) - CHUNK_BYTES, data[-CHUNK_BYTES:])  # too late, and no offence
        await federation.create("next", make_spec(1, ("south",)))
        await raw.work_honestly()
        await raw.work_honestly()
        assert (await federation.finish("next", SLOW))[0].state == State.STATE_SUCCEEDED


async def test_10_crumbs_of_a_payload_are_a_flood(
    federation: Federation, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedrt.session.allowance.Allowance.spend", only(100))
    federation.start_coordinator(PATIENT)
    async with south(federation) as raw:
        await raw.hello()
        await federation.create("crumbs", make_spec(1, ("south",)))
        offer = await raw.next("task_offer")
        await raw.accept(offer)
        described, data = manifest("p", {"context": np.ones((16, 512), np.float32)})
        await raw.result(success(offer.task_id, described))
        await send_until_ended(raw, (chunk("p", at, data[at : at + 1]) for at in range(len(data) - 1)))
        [ended] = [entry for entry in logs if entry["event"] == "session ended"]
    assert ended["status"] == "RESOURCE_EXHAUSTED"


def only(count: int) -> Any:
    """An allowance that does not come back with time."""
    left = itertools.count(count, -1)
    return lambda self, now, cost=1.0: next(left) > 0


# ---- messages


@measured
@pytest.mark.parametrize(
    ("count", "code", "complaint"),
    [(3_000_000, Code.RESOURCE_EXHAUSTED, "larger than max"), (200_000, Code.INVALID_ARGUMENT, "has 200000 items")],
)
async def test_11_a_hello_of_a_million_entries_is_not_unfolded(
    federation: Federation, count: int, code: Code, complaint: str
) -> None:
    hello = Request(hello=session_pb.Hello(held_tasks=[session_pb.HeldTask(task_id="t")] * count)).SerializeToString()
    async with beside_an_honest_silo(federation, most_mib=100):
        for _ in range(3):
            async with south(federation) as raw:
                await raw.write(hello)
                ended = await raw.status()
            assert_ended(ended, code, complaint)


@measured
async def test_12_messages_of_16_mib_are_not_read(federation: Federation) -> None:
    size = 16 * MIB - 10
    length = bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14 & 0x7F | 0x80, size >> 21])
    message = b"\xfa\x06" + length + bytes(size)  # field 111: a frame that nobody has invented yet
    async with beside_an_honest_silo(federation, most_mib=30):
        for _ in range(8):
            async with south(federation) as raw:
                await raw.hello()
                await raw.write(message)
                ended = await raw.status()
            assert_ended(ended, Code.RESOURCE_EXHAUSTED, "larger than max")


class Throttled(Proxy):
    """A proxy that lets only so many bytes more pass on the way to the coordinator, once `left` is set."""

    left: int | None = None

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        upstream = gate is not self.downstream
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if upstream and self.left is not None:
                    data, self.left = data[: self.left], max(0, self.left - len(data))
                writer.write(data)
                await writer.drain()


@measured
async def test_13_half_a_message_and_then_silence_ends_its_session(federation: Federation) -> None:
    message = b"\xfa\x06\x80\xc0\x36" + bytes(0x36 << 14 | 0x40 << 7)  # 0.9 MB
    extra = "heartbeat_interval: 500ms\nsilence_limit: 2s\n"
    async with (
        beside_an_honest_silo(federation, most_mib=20, extra=extra),
        Throttled(federation.port).started() as proxy,
        south(federation, proxy.port) as raw,
    ):
        await raw.hello()
        proxy.left = 100_000
        writing = asyncio.create_task(raw.write(message))
        ended = await raw.status()
        await writing
    assert_ended(ended, Code.DEADLINE_EXCEEDED, "nothing was heard for 2 seconds")


# ---- sessions


async def test_14_one_identity_has_few_sessions_and_takes_one_place(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedrt.transport.HANDSHAKE_LIMIT", 600.0)  # twenty handshakes take long on a busy machine
    federation.start_coordinator(f"{PATIENT}limits: {{max_sessions: 2}}\n")
    async with contextlib.AsyncExitStack() as stack:
        older = [await stack.enter_async_context(south(federation)) for _ in range(20)]
        for raw in older[: -session_service.MAX_SESSIONS_OF_A_SILO]:
            code, details = await raw.status()
            assert code is Code.ABORTED, details
        assert not any(raw.call.done() for raw in older[-session_service.MAX_SESSIONS_OF_A_SILO :])
        await older[-1].hello()
        federation.start_silo("north", FakeWorker())
        await Watch(federation).until(connected("north"), SLOW)
        async with RawSilo(federation.port, federation.directory / "certs/silos/west") as raw:
            assert (await raw.status())[0] is Code.RESOURCE_EXHAUSTED


async def test_15_a_silo_that_dials_without_end_is_told_to_wait_and_no_other_is(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_service, "SESSION_COST", FRAME_BURST / 2 - 1000)
    federation.start_coordinator(PATIENT)
    for _ in range(2):
        async with south(federation) as raw:
            await raw.hello()
    async with south(federation) as raw:
        code, details = await raw.status()
    assert (code, details) == (
        Code.RESOURCE_EXHAUSTED,
        "this silo has dialled or sent too often; dial again later",
    )
    federation.start_silo("north", FakeWorker())
    await Watch(federation).until(connected("north"), SLOW)


async def test_16_no_session_opens_while_the_orchestrator_is_far_behind(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.start_coordinator()
    await make_known(federation)
    monkeypatch.setattr(session_service, "MAX_BACKLOG", 0)
    async with south(federation) as raw:
        code, details = await raw.status()
    assert (code, details) == (Code.UNAVAILABLE, "the coordinator is behind with its work; dial again later")


# ---- the other direction: a coordinator that misbehaves


class Coordinator(session_service_pb2_grpc.SessionServiceServicer):
    """Welcomes silos and lets `misbehave` do its worst to the first session; the second is the silo's recovery."""

    def __init__(self, misbehave: Any) -> None:
        self.misbehave = misbehave
        self.sessions = 0
        self.recovered = asyncio.Event()

    async def OpenSession(self, request_iterator: Any, context: Any) -> None:
        self.sessions += 1
        await context.read()
        welcome = session_pb.Welcome(session_id="s")
        welcome.heartbeat_interval.FromMilliseconds(2500)
        welcome.silence_limit.FromMilliseconds(60_000)
        await context.write(session_pb.OpenSessionResponse(welcome=welcome))
        if self.sessions == 1:
            await self.misbehave(context)
        else:
            self.recovered.set()
            while await context.read() is not grpc.aio.EOF:
                pass


@contextlib.asynccontextmanager
async def fake_coordinator(federation: Federation, misbehave: Any) -> AsyncIterator[Coordinator]:
    server, service = grpc.aio.server(options=GRPC_OPTIONS), Coordinator(misbehave)
    session_service_pb2_grpc.add_SessionServiceServicer_to_server(service, server)
    identity = IdentityFiles(federation.directory / "certs/coordinator")
    server.add_secure_port(f"127.0.0.1:{federation.port}", server_credentials(identity))
    await server.start()
    try:
        yield service
    finally:
        await server.stop(0)


@pytest.mark.parametrize("kind", ["heartbeat", "task_cancel"])
async def test_17_a_coordinator_that_floods_loses_the_session_and_the_silo_dials_again(
    federation: Federation, logs: Logs, kind: str
) -> None:
    frames = {
        "heartbeat": session_pb.OpenSessionResponse(heartbeat=session_pb.Heartbeat()),
        "task_cancel": session_pb.OpenSessionResponse(task_cancel=task_pb.TaskCancel(task_id="t")),
    }

    async def flood(context: Any) -> None:
        while True:
            await context.write(frames[kind])

    async with fake_coordinator(federation, flood) as coordinator:
        silo = federation.start_silo("north", FakeWorker())
        await asyncio.wait_for(coordinator.recovered.wait(), SLOW)
        assert not silo.task.done()
        await federation.stop()
    [lost] = [entry for entry in logs if entry["event"] == "session lost" and "nobody asked" in entry["reason"]]
    assert lost["log_level"] == "warning"
