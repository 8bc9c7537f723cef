"""Frames that the protocol forbids, and silence: the session ends with a status that says why; no other one notices."""

import asyncio

import grpc
import pytest

from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import task_pb2 as task_pb
from fedrt.v1 import tensor_pb2 as tensor_pb
from tests.fakes.federation import Federation, make_spec
from tests.fakes.raw_silo import FINISHED, RawSilo, success
from tests.fakes.workers import FakeWorker
from tests.integration.conftest import Logs
from tests.integration.following import State, Watch, connected, gone

Request = session_pb.OpenSessionRequest
HELLO = Request(hello=session_pb.Hello(software_version="raw"))
HEARTBEAT = Request(heartbeat=session_pb.Heartbeat())

ILLEGAL: dict[str, tuple[list[Request | bytes], str]] = {
    "a heartbeat before hello": ([HEARTBEAT], "silo must not send Heartbeat in phase 'start'"),
    "a second hello": ([HELLO, HELLO], "silo must not send Hello in phase 'open'"),
    "a chunk that was never announced": (
        [HELLO, Request(payload_chunk=tensor_pb.PayloadChunk(payload_id="p", data=b"x"))],
        "payload 'p' is not announced",
    ),
    "an empty chunk": ([HELLO, Request(payload_chunk=tensor_pb.PayloadChunk(payload_id="p"))], "a chunk has 0 bytes"),
    "a chunk larger than allowed": (
        [HELLO, Request(payload_chunk=tensor_pb.PayloadChunk(payload_id="p", data=bytes(256 * 1024 + 1)))],
        "a chunk has 262145 bytes; allowed are 1 to 262144",
    ),
    "a reply to what was not offered": (
        [HELLO, Request(task_reply=task_pb.TaskReply(task_id="t", acceptance=task_pb.TaskAcceptance()))],
        "task 't' is unknown, not offered",
    ),
    "a reply without an answer": (
        [HELLO, Request(task_reply=task_pb.TaskReply(task_id="t"))],
        "a task reply holds no answer",
    ),
    "progress of what is not held": (
        [HELLO, Request(task_progress=task_pb.TaskProgress(task_id="t"))],
        "task 't' is unknown, not working",
    ),
    "a result of what is not held": (
        [HELLO, Request(task_result=success("t", None))],
        "task 't' is unknown, not working",
    ),
    "a result without a task": ([HELLO, Request(task_result=success("", None))], "an id has 0 characters"),
    "a held task named twice": (
        [
            Request(
                hello=session_pb.Hello(held_tasks=[session_pb.HeldTask(task_id="t", state=FINISHED) for _ in range(2)])
            )
        ],
        "a held task is named twice",
    ),
    "more held tasks than anyone has": (
        [
            Request(
                hello=session_pb.Hello(
                    held_tasks=[session_pb.HeldTask(task_id=f"t{i}", state=FINISHED) for i in range(1001)]
                )
            )
        ],
        "a list has 1001 items; allowed are 1000",
    ),
    "a second drain": (
        [HELLO, Request(drain=session_pb.Drain()), Request(drain=session_pb.Drain())],
        "silo must not send Drain in phase 'drained'",
    ),
    "garbage": ([b"\xff\xff\xff\xff garbage"], "cannot be read"),
    "garbage after hello": ([HELLO, b"\xff\xff\xff\xff garbage"], "cannot be read"),
}


@pytest.mark.parametrize("kind", ILLEGAL)
async def test_01_an_illegal_frame_ends_its_session_and_no_other(federation: Federation, logs: Logs, kind: str) -> None:
    frames, complaint = ILLEGAL[kind]
    worker = FakeWorker(gate=asyncio.Event())
    federation.start_coordinator()
    federation.start_silo("north", worker)
    await Watch(federation).until(connected("north"))
    await federation.create("unaffected", make_spec(1, ("north",)))
    await worker.began.wait()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        for frame in frames:
            await raw.write(frame)
        code, details = await raw.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT, details
    assert complaint in details
    worker.gate.set()
    experiment, _ = await federation.finish("unaffected")
    assert experiment.state == State.STATE_SUCCEEDED
    assert not [e for e in logs if e["event"] == "silo" and e["silo"] == "north" and not e["connected"]]


async def test_02_a_frame_of_a_later_version_is_passed_over(federation: Federation) -> None:
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        await raw.write(b"\xfa\x06\x03abc")  # field 111: a frame that nobody has invented yet
        await raw.write(b"")
        await federation.create("later", make_spec(1, ("south",)))
        await raw.work_honestly()
        await raw.work_honestly()
        assert (await federation.finish("later"))[0].state == State.STATE_SUCCEEDED


async def test_03_a_refusal_whose_reason_is_of_a_later_version_is_a_refusal(federation: Federation) -> None:
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        await federation.create("unwanted", make_spec(1, ("south",), retries=0))
        offer = await raw.next("task_offer")
        refusal = task_pb.TaskRefusal(reason=99, message="the battery is low")  # proto: new values may be added
        await raw.send(task_reply=task_pb.TaskReply(task_id=offer.task_id, refusal=refusal))
        experiment, _ = await federation.finish("unwanted", limit=40)
    assert experiment.state == State.STATE_FAILED
    assert "the battery is low" in experiment.status_message


async def test_04_silence_ends_a_session_and_the_others_live_on(federation: Federation) -> None:
    federation.start_coordinator("heartbeat_interval: 100ms\nsilence_limit: 300ms\n")
    silo = federation.start_silo("north", FakeWorker())
    watch = Watch(federation)
    await watch.until(connected("north"))
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        welcome = await raw.hello()
        assert welcome.heartbeat_interval.ToMilliseconds() == 100
        assert welcome.silence_limit.ToMilliseconds() == 300
        code, details = await raw.status()
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details == "nothing was heard for 0.3 seconds"
    await watch.until(gone("south"))
    await federation.create("audible", make_spec(1, ("north",)))
    assert (await federation.finish("audible"))[0].state == State.STATE_SUCCEEDED
    assert not silo.task.done()


async def test_05_a_silo_that_says_nothing_at_all_is_not_waited_for(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedrt.transport.HANDSHAKE_LIMIT", 0.2)
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        code, _ = await raw.status()
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    async with federation.admin():
        pass
    assert not federation.running["coordinator"].task.done()


async def test_06_heartbeats_keep_an_idle_session_open(federation: Federation, logs: Logs) -> None:
    federation.start_coordinator("heartbeat_interval: 100ms\nsilence_limit: 1s\n")  # a busy machine may pause for 0.1 s
    federation.start_silo("north", FakeWorker())
    watch = Watch(federation)
    await watch.until(connected("north"))
    before = len(logs)  # a dial before the coordinator listened is logged as a lost session too
    with pytest.raises(TimeoutError):
        await watch.until(gone("north"), limit=3)
    assert not [entry for entry in logs[before:] if entry["event"] == "session lost"]


async def test_07_no_more_sessions_than_allowed(federation: Federation) -> None:
    federation.start_coordinator("limits: {max_sessions: 1}\n")
    federation.start_silo("north", FakeWorker())
    await Watch(federation).until(connected("north"))
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        code, details = await raw.status()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == "the coordinator serves as many silos as limits.max_sessions allows"


@pytest.mark.parametrize("number", [10**6, 2**63 - 1, 2**63, 2**64 - 1])
async def test_08_a_resumption_beyond_any_number_waits_for_what_comes(federation: Federation, number: int) -> None:
    federation.start_coordinator()
    async with federation.admin() as stub:
        call = stub.WatchEvents(pb.WatchEventsRequest(after_event_number=number))
        with pytest.raises(TimeoutError):  # and not with an error of the database
            async with asyncio.timeout(0.2):
                await call.read()


@pytest.mark.parametrize(("size", "token"), [(-1, ""), (1001, ""), (1, "x"), (1, "-1"), (1, "9" * 30)])
async def test_09_a_page_that_cannot_be_is_refused(federation: Federation, size: int, token: str) -> None:
    federation.start_coordinator()
    async with federation.admin() as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="page_token") as refused:
            await stub.ListExperiments(pb.ListExperimentsRequest(page_size=size, page_token=token))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
