"""Two transports over an in-memory stream: what is posted arrives, silence ends, large payloads yield."""

import asyncio
import contextlib
import time
import weakref
from collections import Counter

import grpc
import numpy as np
import pytest

from fedrt import transport
from fedrt.errors import LocalProtocolError, PayloadError, RemoteProtocolError
from fedrt.payload import CHUNK_BYTES, Chunk, Manifest, describe
from fedrt.session.allowance import Allowance
from fedrt.session.connection import Role
from fedrt.session.frames import (
    Drain,
    Heartbeat,
    Hello,
    PayloadChunk,
    ResultAck,
    TaskCancel,
    TaskOffer,
    TaskProgress,
    TaskReply,
    TaskResult,
    Welcome,
)
from fedrt.task import RefusalReason, Result, Success, Verdict
from fedrt.transport import ExcessError, SilenceError, Transport
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.wire import request_to_pb
from tests.samples import payload, task

LONG = Welcome("s1", 30.0, 60.0)
SHORT = Welcome("s1", 0.05, 0.2)
ALIVE = Welcome("s1", 0.05, 1.0)  # a busy machine may pause for longer than 0.2 s
PATIENCE = 5.0  # seconds after which a test gives up


class OneWay:
    """One direction: serialised messages, at most `room` of them under way."""

    def __init__(self, kind, room):
        self.queue = asyncio.Queue(room)
        self.kind = kind
        self.written = Counter()  # by the name of the frame

    async def write(self, message):
        self.written[message.WhichOneof("frame")] += 1
        await self.queue.put(message.SerializeToString())

    async def read(self):
        data = await self.queue.get()
        return data if data is grpc.aio.EOF else self.kind.FromString(data)


class FakeStream:
    """What one end sees of a bidirectional call."""

    def __init__(self, incoming, outgoing):
        self.read = incoming.read
        self.write = outgoing.write


class End:
    """A transport with what has arrived at it and what it has sent."""

    def __init__(self, role, stream):
        self.sent, self.arrived, self.payloads = [], [], {}
        self.transport = Transport(role, stream, self.sent.append)
        self.react = lambda frame: None
        self.running = None

    def start(self):
        self.running = asyncio.create_task(self.transport.run(self.on_frame))

    def on_frame(self, frame):
        self.arrived.append(frame)
        self.react(frame)

    def collect(self, manifest):
        self.transport.collect(manifest, lambda outcome: self.payloads.__setitem__(manifest.payload_id, outcome))

    def count(self, kind):
        return sum(isinstance(frame, kind) for frame in self.arrived)


class Pair:
    """A silo and a coordinator with a stream between them."""

    def __init__(self, room):
        self.requests = OneWay(session_pb.OpenSessionRequest, room)
        self.responses = OneWay(session_pb.OpenSessionResponse, room)
        self.silo = End(Role.SILO, FakeStream(self.responses, self.requests))
        self.coordinator = End(Role.COORDINATOR, FakeStream(self.requests, self.responses))

    async def open(self, welcome=LONG):
        """Start both ends and introduce them to each other."""
        self.coordinator.react = lambda frame: (
            self.coordinator.transport.post(welcome) if isinstance(frame, Hello) else None
        )
        self.silo.start()
        self.coordinator.start()
        await asyncio.sleep(0.01)  # a handshake takes its time; the intervals change while both already watch
        self.silo.transport.post(Hello("1.0"))
        await until(lambda: self.silo.arrived and self.silo.arrived[0] == welcome)


async def until(condition):
    """Wait until the condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  any fact, not an event
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def pair(room=4):
    both = Pair(room)
    try:
        yield both
    finally:
        for end in (both.silo, both.coordinator):
            if end.running:
                end.running.cancel()
                await asyncio.gather(end.running, return_exceptions=True)


def result(manifest=None, task_id="t1"):
    return TaskResult(Result(task_id, Success(3, {"loss": 0.5}, 1.0), manifest))


def large_payload(chunk_count, payload_id="p1"):
    values = np.random.default_rng(chunk_count).integers(0, 2**40, chunk_count * CHUNK_BYTES // 8 - 1)
    return describe(payload_id, {"context": values})


async def accept_a_task(both, manifest=None, task_id="t1"):
    both.coordinator.transport.post(TaskOffer(task(task_id), manifest))
    await until(lambda: any(isinstance(f, TaskOffer) and f.task.task_id == task_id for f in both.silo.arrived))
    both.silo.transport.post(TaskReply(task_id))
    await until(lambda: TaskReply(task_id) in both.coordinator.arrived)


async def test_frames_cross_in_both_directions_in_order():
    async with pair() as both:
        await both.open()
        await accept_a_task(both)
        reports = [TaskProgress("t1", step, 20) for step in range(20)]
        for report in [*reports, result()]:
            both.silo.transport.post(report)
        await until(lambda: both.coordinator.count(TaskResult))
        assert both.coordinator.arrived[2:] == [*reports, result()]
        both.coordinator.transport.post(ResultAck("t1", Verdict.ACCEPTED))
        await until(lambda: both.silo.count(ResultAck))
        assert both.silo.sent == [Hello("1.0"), TaskReply("t1"), *reports, result()]


async def test_payloads_cross_in_both_directions_at_once():
    async with pair() as both:
        await both.open()
        down, down_data = large_payload(9, "down")
        up, up_data = large_payload(5, "up")
        await accept_a_task(both, down)
        both.silo.collect(down)
        both.coordinator.collect(up)
        both.coordinator.transport.post_payload("down", down_data)
        both.silo.transport.post(result(up))
        both.silo.transport.post_payload("up", up_data)
        await until(lambda: both.silo.payloads and both.coordinator.payloads)
        assert both.silo.payloads["down"] == down_data
        assert both.coordinator.payloads["up"] == up_data


async def test_chunks_do_not_reach_the_frame_handler():
    async with pair() as both:
        await both.open()
        manifest, data = payload()
        await accept_a_task(both, manifest)
        both.silo.collect(manifest)
        both.coordinator.transport.post_payload("p1", data)
        await until(lambda: both.silo.payloads)
        assert not both.silo.count(PayloadChunk)


async def test_control_frames_overtake_the_chunks_of_a_large_payload():
    async with pair(room=1) as both:
        await both.open()
        manifest, data = large_payload(200)
        await accept_a_task(both, manifest)
        both.silo.collect(manifest)
        both.coordinator.transport.post_payload("p1", data)
        await until(lambda: both.responses.written["payload_chunk"] >= 5)
        both.coordinator.transport.post(TaskCancel("t1"))
        await until(lambda: both.silo.count(TaskCancel))
        assert both.responses.written["payload_chunk"] < 100
        await until(lambda: both.silo.payloads)
        assert both.silo.payloads["p1"] == data


async def test_payloads_take_turns():
    async with pair(room=1) as both:
        await both.open()
        manifests = []
        for name in ("a", "b"):
            manifest, data = large_payload(20, name)
            manifests.append((manifest, data))
            await accept_a_task(both, manifest, name)
            both.silo.collect(manifest)
        for manifest, data in manifests:
            both.coordinator.transport.post_payload(manifest.payload_id, data)
        await until(lambda: len(both.silo.payloads) == 2)
        order = [frame.chunk.payload_id for frame in both.coordinator.sent if isinstance(frame, PayloadChunk)]
        assert order == ["a", "b"] * 20


async def test_a_payload_that_is_no_longer_wanted_is_not_sent():
    async with pair(room=1) as both:
        await both.open()
        manifest, data = large_payload(200)
        await accept_a_task(both, manifest)
        both.coordinator.transport.post_payload("p1", data)
        both.silo.transport.post(result())
        await until(lambda: both.coordinator.count(TaskResult))
        both.coordinator.transport.post(ResultAck("t1", Verdict.ACCEPTED))
        await until(lambda: both.silo.count(ResultAck))
        sent = both.responses.written["payload_chunk"]
        await asyncio.sleep(0.05)
        assert both.responses.written["payload_chunk"] == sent < 200
        assert not both.coordinator.running.done()


async def test_a_spoilt_payload_is_reported_and_the_session_goes_on():
    async with pair() as both:
        await both.open()
        manifest, data = large_payload(3)
        spoilt = Manifest(manifest.payload_id, manifest.tensors, manifest.byte_count, b"\0" * 32)
        await accept_a_task(both)
        both.coordinator.collect(spoilt)
        both.silo.transport.post(result(spoilt))
        both.silo.transport.post_payload("p1", data)
        await until(lambda: both.coordinator.payloads)
        assert isinstance(both.coordinator.payloads["p1"], PayloadError)
        assert "digest" in str(both.coordinator.payloads["p1"])
        both.coordinator.transport.post(ResultAck("t1", Verdict.INVALID))
        await until(lambda: both.silo.count(ResultAck))


async def test_a_payload_can_be_taken_piece_by_piece():
    async with pair() as both:
        await both.open()
        manifest, data = large_payload(3)
        await accept_a_task(both)
        pieces, outcomes = [], []
        both.coordinator.transport.collect(manifest, outcomes.append, lambda piece: pieces.append(bytes(piece)))
        both.silo.transport.post(result(manifest))
        both.silo.transport.post_payload("p1", data)
        await until(lambda: outcomes)
        assert b"".join(pieces) == data
        assert len(pieces) == 3
        assert [len(outcome) for outcome in outcomes] == [0]


async def test_a_sink_that_refuses_spoils_the_payload_and_not_the_session():
    def refuse(piece):
        raise PayloadError("not finite")

    async with pair() as both:
        await both.open()
        manifest, data = large_payload(3)
        await accept_a_task(both)
        outcomes = []
        both.coordinator.transport.collect(manifest, outcomes.append, refuse)
        both.silo.transport.post(result(manifest))
        both.silo.transport.post_payload("p1", data)
        await until(lambda: both.requests.written["payload_chunk"] == 3)
        both.silo.transport.post(Drain("done", 1.0, reconnect=False))
        await until(lambda: both.coordinator.count(Drain))
        assert [str(outcome) for outcome in outcomes] == ["not finite"]


async def test_a_payload_that_nobody_collects_is_passed_over():
    async with pair() as both:
        await both.open()
        manifest, data = large_payload(3)
        await accept_a_task(both)
        both.silo.transport.post(result(manifest))
        both.silo.transport.post_payload("p1", data)
        await until(lambda: both.requests.written["payload_chunk"] == 3)
        both.silo.transport.post(Drain("done", 1.0, reconnect=False))
        await until(lambda: both.coordinator.count(Drain))
        assert both.coordinator.payloads == {}


async def test_heartbeats_keep_an_idle_session_alive():
    async with pair() as both:
        await both.open(ALIVE)
        await until(lambda: min(both.silo.count(Heartbeat), both.coordinator.count(Heartbeat)) >= 30)
        assert not both.silo.running.done()
        assert not both.coordinator.running.done()
        sent = [frame for frame in both.silo.sent if isinstance(frame, Heartbeat)]
        assert abs(sent[-1].send_time - time.time()) < PATIENCE


@pytest.mark.parametrize("hung", ["silo", "coordinator"])
async def test_silence_after_the_introduction_ends_the_session(hung):
    async with pair() as both:
        await both.open(SHORT)
        alive = both.coordinator if hung == "silo" else both.silo
        getattr(both, hung).running.cancel()  # it neither reads nor writes
        began = time.monotonic()
        with pytest.raises(SilenceError, match=r"nothing was heard for 0\.2 seconds"):
            await asyncio.wait_for(alive.running, PATIENCE)
        assert time.monotonic() - began < 2.0


async def test_a_peer_that_never_introduces_itself_is_given_up(monkeypatch):
    monkeypatch.setattr(transport, "HANDSHAKE_LIMIT", 0.1)
    async with pair() as both:
        both.coordinator.start()
        with pytest.raises(SilenceError, match="nothing was heard"):
            await asyncio.wait_for(both.coordinator.running, PATIENCE)
        assert not both.responses.written


async def test_a_busy_session_is_not_silent_while_chunks_arrive():
    """The silo has nothing to say for itself, but its heartbeats pass between the chunks."""
    async with pair(room=1) as both:
        await both.open(ALIVE)
        manifest, data = large_payload(60)
        await accept_a_task(both, manifest)
        both.silo.collect(manifest)
        both.coordinator.transport.post_payload("p1", data)
        await until(lambda: both.silo.payloads)
        await until(lambda: both.coordinator.count(Heartbeat) >= 5)
        assert not both.coordinator.running.done()


async def test_frames_for_a_peer_that_does_not_read_are_bounded():
    async with pair(room=1) as both:
        await both.open()
        both.silo.running.cancel()
        await asyncio.gather(both.silo.running, return_exceptions=True)
        for _ in range(10):
            both.coordinator.transport.post(TaskCancel("t1"))
        await asyncio.sleep(0.01)
        unwritten = 10 - both.responses.written["task_cancel"]
        for _ in range(10_000 - unwritten):
            both.coordinator.transport.post(TaskCancel("t1"))
        await asyncio.sleep(0)
        assert not both.coordinator.running.done()
        for _ in range(100):
            both.coordinator.transport.post(TaskCancel("t1"))  # it raises nothing: whoever posts need not know
        with pytest.raises(ExcessError, match="the peer has left 10000 frames unread"):
            await asyncio.wait_for(both.coordinator.running, PATIENCE)
        assert both.responses.written["task_cancel"] <= 2


async def test_heartbeats_do_not_pile_up_for_a_peer_that_does_not_read():
    async with pair(room=1) as both:
        await both.open(SHORT)
        both.silo.running.cancel()
        await asyncio.gather(both.silo.running, return_exceptions=True)
        with pytest.raises(SilenceError):
            await asyncio.wait_for(both.coordinator.running, PATIENCE)
        assert both.responses.written["heartbeat"] <= 8


async def test_posting_an_illegal_frame_is_our_error_and_sends_nothing():
    async with pair() as both:
        await both.open()
        with pytest.raises(LocalProtocolError):
            both.coordinator.transport.post(ResultAck("t1", Verdict.ACCEPTED))
        both.coordinator.transport.post(TaskCancel("t1"))
        await until(lambda: both.silo.count(TaskCancel))
        assert both.responses.written["result_ack"] == 0


async def test_an_illegal_frame_of_the_peer_ends_the_session():
    async with pair() as both:
        await both.open()
        await both.requests.write(request_to_pb(TaskReply("never-offered")))
        with pytest.raises(RemoteProtocolError, match="task 'never-offered' is unknown"):
            await asyncio.wait_for(both.coordinator.running, PATIENCE)


async def test_a_frame_that_cannot_be_read_ends_the_session():
    async with pair() as both:
        await both.open()
        await both.requests.write(session_pb.OpenSessionRequest(drain=session_pb.Drain(message="x" * 3000)))
        with pytest.raises(RemoteProtocolError, match="a frame cannot be read: a text has 3000 characters"):
            await asyncio.wait_for(both.coordinator.running, PATIENCE)


async def test_a_frame_of_a_later_version_is_passed_over():
    async with pair() as both:
        await both.open()
        await both.requests.write(session_pb.OpenSessionRequest.FromString(b"\xfa\x01\x01x"))
        both.silo.transport.post(Drain("", 1.0, reconnect=True))
        await until(lambda: both.coordinator.count(Drain))


async def test_finish_writes_everything_that_was_queued_first():
    async with pair(room=2) as both:
        await both.open()
        manifest, data = large_payload(30)
        await accept_a_task(both)
        both.coordinator.collect(manifest)
        both.silo.transport.post(result(manifest))
        both.silo.transport.post_payload("p1", data)
        both.silo.transport.post(Drain("upgrade", 1.0, reconnect=True))
        both.silo.transport.finish()
        await asyncio.wait_for(both.silo.running, PATIENCE)
        assert both.requests.written["payload_chunk"] == 30
        await until(lambda: both.coordinator.payloads and both.coordinator.count(Drain))
        assert both.coordinator.payloads["p1"] == data


async def test_finish_ends_an_idle_session():
    async with pair() as both:
        await both.open()
        both.silo.transport.finish()
        await asyncio.wait_for(both.silo.running, PATIENCE)


async def test_the_end_of_the_stream_ends_the_session_quietly():
    async with pair() as both:
        await both.open()
        await both.responses.queue.put(grpc.aio.EOF)
        await asyncio.wait_for(both.silo.running, PATIENCE)


async def test_what_the_stream_raises_reaches_the_caller_and_no_pump_is_left():
    async with pair() as both:
        before = asyncio.all_tasks()

        async def broken(message):
            raise ConnectionResetError("the cable is cut")

        both.silo.transport._stream.write = broken
        both.silo.start()
        both.silo.transport.post(Hello("1.0"))
        with pytest.raises(ConnectionResetError, match="the cable is cut"):
            await asyncio.wait_for(both.silo.running, PATIENCE)
        assert asyncio.all_tasks() == before


async def test_a_handler_that_fails_ends_the_session_with_its_error():
    async with pair() as both:
        await both.open()

        def fail(frame):
            raise ZeroDivisionError

        both.silo.react = fail
        both.coordinator.transport.post(TaskCancel("t1"))
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(both.silo.running, PATIENCE)


# --- bounds


async def opened_with_few_tokens(both, tokens=3.0):
    """Both ends are open, and what the silo may send unasked is nearly used up and does not come back."""
    await both.open()
    both.coordinator.transport._allowance = Allowance(time.monotonic(), left=tokens, rate=0.0)


FLOODS = {
    "heartbeats": session_pb.OpenSessionRequest(heartbeat=session_pb.Heartbeat()),
    "frames of a later version": session_pb.OpenSessionRequest.FromString(b"\xfa\x01\x01x"),
    "progress": request_to_pb(TaskProgress("t1", 1, 2)),
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_of_frames_that_nobody_asked_for_ends_the_session(kind):
    async with pair() as both:
        await both.open()
        await accept_a_task(both)
        both.coordinator.transport._allowance = Allowance(time.monotonic(), left=3.0, rate=0.0)
        for _ in range(3):
            await both.requests.write(FLOODS[kind])
        both.silo.transport.post(Drain("still here", 1.0, reconnect=False))
        await until(lambda: both.coordinator.count(Drain))
        assert not both.coordinator.running.done()
        await both.requests.write(FLOODS[kind])
        with pytest.raises(ExcessError, match="frames that nobody asked for"):
            await asyncio.wait_for(both.coordinator.running, PATIENCE)


async def test_a_payload_in_crumbs_is_a_flood_and_one_in_whole_chunks_is_not():
    async with pair() as both:
        await opened_with_few_tokens(both)
        await accept_a_task(both)
        manifest, data = large_payload(9)
        both.coordinator.collect(manifest)
        both.silo.transport.post(result(manifest))
        both.silo.transport.post_payload("p1", data)
        await until(lambda: both.coordinator.payloads)
        await accept_a_task(both, task_id="t2")
        crumbled, data = large_payload(1, "p2")
        both.silo.transport.post(result(crumbled, "t2"))
        await until(lambda: both.coordinator.count(TaskResult) == 2)
        for at in range(4):
            await both.requests.write(request_to_pb(PayloadChunk(Chunk("p2", at, data[at : at + 1]))))
        with pytest.raises(ExcessError):
            await asyncio.wait_for(both.coordinator.running, PATIENCE)


async def test_a_payload_smaller_than_a_crumb_counts_for_nothing():
    async with pair() as both:
        await opened_with_few_tokens(both, tokens=0.0)
        manifest, data = payload()
        await accept_a_task(both)
        both.coordinator.collect(manifest)
        both.silo.transport.post(result(manifest))
        both.silo.transport.post_payload("p1", data)
        await until(lambda: both.coordinator.payloads)
        assert both.coordinator.payloads["p1"] == data


async def test_a_coordinator_that_floods_cancellations_ends_the_silos_session_and_no_more():
    async with pair() as both:
        await both.open()
        both.silo.transport._allowance = Allowance(time.monotonic(), left=2.0, rate=0.0)
        for _ in range(3):
            both.coordinator.transport.post(TaskCancel("t1"))
        with pytest.raises(ExcessError):
            await asyncio.wait_for(both.silo.running, PATIENCE)
        assert both.silo.count(TaskCancel) == 2


async def test_a_withdrawn_payload_is_let_go_of():
    async with pair(room=1) as both:
        await both.open()
        manifest, data = large_payload(200)
        kept, kept_data = large_payload(3, "kept")
        await accept_a_task(both, manifest)
        await accept_a_task(both, kept, "t2")
        both.silo.collect(kept)
        alive = memoryview(bytes(data))
        watched = weakref.ref(alive)
        both.coordinator.transport.post_payload("p1", alive)
        del alive
        both.coordinator.transport.post_payload("kept", kept_data)
        both.coordinator.transport.withdraw("t1")
        assert watched() is None
        await until(lambda: both.silo.payloads)
        assert both.silo.payloads["kept"] == kept_data
        assert both.responses.written["payload_chunk"] == 3


async def test_a_payload_that_is_passed_over_is_not_collected_and_disturbs_nothing():
    async with pair() as both:
        await both.open()
        manifest, data = large_payload(3)
        await accept_a_task(both)
        both.coordinator.collect(manifest)
        both.silo.transport.post(result(manifest))
        await until(lambda: both.coordinator.count(TaskResult))
        both.coordinator.transport.pass_over("p1")
        both.silo.transport.post_payload("p1", data)
        both.silo.transport.post(Drain("done", 1.0, reconnect=False))
        await until(lambda: both.requests.written["payload_chunk"] == 3)
        await accept_a_task_refused(both)
        assert both.coordinator.payloads == {}


async def accept_a_task_refused(both):
    """A frame to and fro: whatever was sent before has arrived."""
    both.coordinator.transport.post(TaskOffer(task("last"), None))
    await until(lambda: any(isinstance(f, TaskOffer) and f.task.task_id == "last" for f in both.silo.arrived))
    both.silo.transport.post(TaskReply("last", RefusalReason.DRAINING))
    await until(lambda: both.coordinator.count(TaskReply) == 2)


async def test_what_had_arrived_of_an_offer_is_dropped_with_its_task():
    async with pair(room=1) as both:
        await both.open()
        manifest, data = large_payload(50)
        await accept_a_task(both, manifest)
        both.silo.collect(manifest)
        chunk_sent = asyncio.Event()

        def withdraw(frame):
            if isinstance(frame, PayloadChunk):
                both.coordinator.transport.withdraw("t1")
                chunk_sent.set()

        both.coordinator.transport._on_sent = withdraw
        both.coordinator.transport.post_payload("p1", data)
        await asyncio.wait_for(chunk_sent.wait(), PATIENCE)
        assert list(both.silo.transport._collecting) == ["p1"]
        both.silo.transport.post(result())
        await until(lambda: both.coordinator.count(TaskResult))
        both.coordinator.transport.post(ResultAck("t1", Verdict.LATE))
        await until(lambda: both.silo.count(ResultAck))
        assert both.silo.transport._collecting == {}
