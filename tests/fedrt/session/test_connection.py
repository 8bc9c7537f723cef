"""The session's rules: every illegal frame is refused without a trace, and no legal one is refused on arrival."""

import copy
from collections import Counter, deque
from itertools import permutations

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fedrt.errors import LocalProtocolError, RemoteProtocolError
from fedrt.payload import CHUNK_BYTES, Chunk
from fedrt.session.connection import MAX_OPEN_OFFERS, MAX_OPEN_PAYLOADS, Connection, Phase, Role, TaskPhase
from fedrt.session.frames import (
    Drain,
    Heartbeat,
    HeldState,
    HeldTask,
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
    UnreadableResult,
    Welcome,
)
from fedrt.task import Failure, FailureReason, RefusalReason, Result, Success, TaskKind, Verdict
from fedrt.wire import request_from_pb, request_to_pb
from tests.samples import payload, task

WELCOME = Welcome("s1", 5.0, 15.0)
HEARTBEAT = Heartbeat(0.0)
DRAIN = Drain("upgrade", 60.0, reconnect=True)
MANIFEST, DATA = payload("p1", elements=4)  # 16 bytes


def hello(*held):
    return Hello("1.0", held_tasks=tuple(HeldTask(task_id, HeldState.RUNNING) for task_id in held))


def offer(task_id="t1", manifest=None):
    return TaskOffer(task(task_id), manifest)


def reply(task_id="t1", refusal=None):
    return TaskReply(task_id, refusal)


def result(task_id="t1", manifest=None):
    return TaskResult(Result(task_id, Success(3, {}, 1.0), manifest))


def ack(task_id="t1", verdict=Verdict.ACCEPTED):
    return ResultAck(task_id, verdict)


def chunk(start=0, stop=16, payload_id="p1"):
    return PayloadChunk(Chunk(payload_id, start, b"x" * (stop - start)))


def snapshot(connection):
    """Everything a connection remembers, as text."""
    return repr(sorted(vars(connection).items()))


class Wire:
    """Two ends and a network that delivers each direction in order, but as late as it likes."""

    def __init__(self):
        self.ends = {role: Connection(role) for role in Role}
        self.under_way = {role: deque() for role in Role}  # by speaker

    def speak(self, role, frame):
        """Send, or raise and leave no trace."""
        end = self.ends[role]
        before = snapshot(end)
        try:
            end.send(frame)
        except LocalProtocolError:
            assert snapshot(end) == before
            raise
        self.under_way[role].append(frame)

    def deliver(self, role):
        """The oldest frame of a speaker arrives. Legal to send is legal on arrival: this must never raise."""
        hearer = Role.SILO if role is Role.COORDINATOR else Role.COORDINATOR
        frame = self.under_way[role].popleft()
        self.ends[hearer].receive(frame)
        return frame

    def say(self, *lines):
        """Speak and deliver at once: `(silo, frame)` or `(coordinator, frame)`."""
        for role, frame in lines:
            self.speak(role, frame)
            self.deliver(role)
        return self

    def illegal(self, role, frame, message):
        """Neither may `role` send the frame, nor may its peer take it, and neither end changes."""
        with pytest.raises(LocalProtocolError, match=message):
            self.speak(role, frame)
        hearer = self.ends[Role.SILO if role is Role.COORDINATOR else Role.COORDINATOR]
        before = snapshot(hearer)
        with pytest.raises(RemoteProtocolError, match=message):
            hearer.receive(frame)
        assert snapshot(hearer) == before

    def phases(self, task_id="t1"):
        return {end.task_phase(task_id) for end in self.ends.values()}


SILO, COORDINATOR = Role.SILO, Role.COORDINATOR
OPENING = ((SILO, hello()), (COORDINATOR, WELCOME))


def opened(*held):
    return Wire().say((SILO, hello(*held)), (COORDINATOR, WELCOME))


def offered(manifest=None):
    return opened().say((COORDINATOR, offer("t1", manifest)))


def working(manifest=None):
    return offered(manifest).say((SILO, reply()))


SILO_FRAMES = [HEARTBEAT, reply(), TaskProgress("t1", 1, 2), result(), chunk(), DRAIN]
COORDINATOR_FRAMES = [HEARTBEAT, offer(), TaskCancel("t1"), chunk(), ack(), DRAIN]
SHORT = {"ids": lambda frame: type(frame).__name__}


class TestIntroductions:
    def test_both_are_open_after_hello_and_welcome(self):
        wire = opened()
        assert all(end.is_open for end in wire.ends.values())
        assert {end.our_phase for end in wire.ends.values()} == {Phase.OPEN}

    def test_a_session_is_not_open_before_welcome(self):
        wire = Wire().say((SILO, hello()))
        assert not any(end.is_open for end in wire.ends.values())

    @pytest.mark.parametrize("frame", SILO_FRAMES, **SHORT)
    def test_a_silo_says_nothing_before_hello(self, frame):
        Wire().illegal(SILO, frame, "silo must not send .* in phase 'start'")

    @pytest.mark.parametrize("frame", SILO_FRAMES, **SHORT)
    def test_a_silo_says_nothing_between_hello_and_welcome(self, frame):
        Wire().say((SILO, hello("t1"))).illegal(SILO, frame, "silo must not send .* before Welcome")

    @pytest.mark.parametrize("frame", COORDINATOR_FRAMES, **SHORT)
    def test_the_coordinator_says_nothing_before_welcome(self, frame):
        Wire().say((SILO, hello())).illegal(COORDINATOR, frame, "coordinator must not send .* in phase 'start'")

    def test_the_coordinator_does_not_welcome_before_hello(self):
        Wire().illegal(COORDINATOR, WELCOME, "coordinator must not send Welcome before Hello")

    def test_a_second_hello_is_illegal(self):
        opened().illegal(SILO, hello(), "silo must not send Hello in phase 'open'")
        Wire().say((SILO, hello())).illegal(SILO, hello(), "silo must not send Hello in phase 'open'")

    def test_a_second_welcome_is_illegal(self):
        opened().illegal(COORDINATOR, WELCOME, "coordinator must not send Welcome in phase 'open'")

    @pytest.mark.parametrize("frame", [WELCOME, offer(), TaskCancel("t1"), ack()], **SHORT)
    def test_a_silo_does_not_speak_as_coordinator(self, frame):
        opened().illegal(SILO, frame, "silo must not send")

    @pytest.mark.parametrize("frame", [hello(), reply(), TaskProgress("t1", 1, 2), result()], **SHORT)
    def test_a_coordinator_does_not_speak_as_silo(self, frame):
        opened().illegal(COORDINATOR, frame, "coordinator must not send")


class TestHeldTasks:
    def test_held_tasks_are_worked_on_in_the_new_session(self):
        wire = opened("t1")
        assert wire.phases() == {TaskPhase.WORKING}
        wire.say((SILO, TaskProgress("t1", 1, 2)), (SILO, result()), (COORDINATOR, ack()))
        assert wire.phases() == {None}

    def test_a_held_task_is_not_offered_again(self):
        opened("t1").illegal(COORDINATOR, offer(), "TaskOffer .*task 't1' is already working")

    def test_a_task_held_twice_is_illegal(self):
        Wire().illegal(SILO, hello("t1", "t1"), "Hello from silo: a held task is named twice")

    def test_obsolete_tasks_are_forgotten_and_may_be_offered_again(self):
        wire = Wire().say((SILO, hello("t1", "t2")), (COORDINATOR, Welcome("s1", 5.0, 15.0, ("t1",))))
        assert wire.phases("t1") == {None}
        assert wire.phases("t2") == {TaskPhase.WORKING}
        wire.illegal(SILO, result("t1"), "task 't1' is unknown, not working")
        wire.say((COORDINATOR, offer("t1")))

    def test_only_held_tasks_are_called_obsolete(self):
        wire = Wire().say((SILO, hello("t1")))
        wire.illegal(
            COORDINATOR, Welcome("s1", 5.0, 15.0, ("t1", "t9")), "task 't9' is called obsolete, but is not held"
        )


class TestOffersAndReplies:
    def test_an_accepted_task_is_worked_on_until_its_result_is_settled(self):
        wire = offered()
        assert wire.phases() == {TaskPhase.OFFERED}
        wire.say((SILO, reply()))
        assert wire.phases() == {TaskPhase.WORKING}
        wire.say((SILO, result()))
        assert wire.phases() == {TaskPhase.RETURNED}
        wire.say((COORDINATOR, ack()))
        assert wire.phases() == {None}

    @pytest.mark.parametrize("refusal", RefusalReason)
    def test_a_refused_task_is_forgotten_and_may_be_offered_again(self, refusal):
        wire = offered(MANIFEST).say((SILO, reply(refusal=refusal)))
        assert wire.phases() == {None}
        assert not wire.ends[COORDINATOR].owes("p1")
        wire.say((COORDINATOR, offer("t1", MANIFEST)))

    def test_a_settled_task_may_be_offered_again(self):
        working().say((SILO, result()), (COORDINATOR, ack()), (COORDINATOR, offer()))

    def test_a_reply_to_a_task_that_was_not_offered_is_illegal(self):
        opened().illegal(SILO, reply(), "TaskReply from silo: task 't1' is unknown, not offered")

    @pytest.mark.parametrize("refusal", [None, RefusalReason.BUSY])
    def test_a_second_reply_is_illegal(self, refusal):
        working().illegal(SILO, reply(refusal=refusal), "task 't1' is working, not offered")

    def test_an_open_offer_is_not_repeated(self):
        offered().illegal(COORDINATOR, offer(), "task 't1' is already offered")
        working().illegal(COORDINATOR, offer(), "task 't1' is already working")
        working().say((SILO, result())).illegal(COORDINATOR, offer(), "task 't1' is already returned")

    def test_progress_is_told_only_while_working(self):
        offered().illegal(SILO, TaskProgress("t1", 1, 2), "task 't1' is offered, not working")
        working().say((SILO, TaskProgress("t1", 1, 2)))
        working().say((SILO, result())).illegal(SILO, TaskProgress("t1", 1, 2), "task 't1' is returned, not working")

    def test_a_cancellation_is_always_legal_and_changes_nothing(self):
        for wire in (opened(), offered(), working(), working().say((SILO, result()))):
            before = [snapshot(end) for end in wire.ends.values()]
            wire.say((COORDINATOR, TaskCancel("t1")), (COORDINATOR, TaskCancel("unknown")))
            assert [snapshot(end) for end in wire.ends.values()] == before

    def test_a_payload_announced_in_two_offers_is_illegal(self):
        offered(MANIFEST).illegal(COORDINATOR, offer("t2", MANIFEST), "payload 'p1' is announced twice")

    def test_an_offer_may_carry_no_tensors(self):
        wire = Wire().say(*OPENING, (COORDINATOR, TaskOffer(task("t1", TaskKind.INITIALIZE), None)))
        assert wire.phases() == {TaskPhase.OFFERED}


class TestResults:
    def test_a_result_without_acceptance_is_illegal(self):
        opened().illegal(SILO, result(), "TaskResult from silo: task 't1' is unknown, not working")
        offered().illegal(SILO, result(), "TaskResult from silo: task 't1' is offered, not working")

    def test_a_result_is_not_returned_twice(self):
        working().say((SILO, result())).illegal(SILO, result(), "task 't1' is returned, not working")

    def test_a_settled_result_is_not_returned_again(self):
        wire = working().say((SILO, result()), (COORDINATOR, ack()))
        wire.illegal(SILO, result(), "task 't1' is unknown, not working")

    def test_an_acknowledgement_needs_a_result(self):
        opened().illegal(COORDINATOR, ack(), "ResultAck from coordinator: task 't1' is unknown, not returned")
        offered().illegal(COORDINATOR, ack(), "task 't1' is offered, not returned")
        working().illegal(COORDINATOR, ack(), "task 't1' is working, not returned")

    def test_a_result_is_acknowledged_once(self):
        wire = working().say((SILO, result()), (COORDINATOR, ack()))
        wire.illegal(COORDINATOR, ack(), "task 't1' is unknown, not returned")

    def test_a_failure_is_a_result(self):
        failure = TaskResult(Result("t1", Failure(FailureReason.OUT_OF_MEMORY, "too big"), None))
        assert working().say((SILO, failure)).phases() == {TaskPhase.RETURNED}

    def test_a_silo_owes_its_payload_even_once_the_result_is_settled(self):
        wire = working()
        silo = wire.ends[SILO]
        assert not silo.owes("p1")
        wire.say((SILO, result("t1", MANIFEST)))
        assert silo.owes("p1")
        wire.say((COORDINATOR, ack(verdict=Verdict.INVALID)))
        assert silo.owes("p1")
        wire.say((SILO, chunk()))
        assert not silo.owes("p1")

    def test_results_with_chunks_still_under_way_may_already_be_settled(self):
        """The coordinator calls a wrong announcement invalid at once; the chunks keep coming and are legal."""
        wire = working().say((SILO, result("t1", MANIFEST)), (SILO, chunk(0, 8)), (COORDINATOR, ack()))
        wire.say((SILO, chunk(8, 16)))
        assert not wire.ends[SILO].owes("p1")


class TestChunks:
    def test_chunks_of_an_offer_follow_its_acceptance(self):
        wire = working(MANIFEST)
        assert wire.ends[COORDINATOR].owes("p1")
        wire.say((COORDINATOR, chunk(0, 10)), (COORDINATOR, chunk(10, 16)))
        assert not wire.ends[COORDINATOR].owes("p1")

    def test_a_chunk_before_acceptance_is_illegal(self):
        offered(MANIFEST).illegal(COORDINATOR, chunk(), "PayloadChunk from coordinator: task 't1' is not yet accepted")

    def test_a_chunk_after_a_refusal_is_illegal(self):
        wire = offered(MANIFEST).say((SILO, reply(refusal=RefusalReason.POLICY)))
        wire.illegal(COORDINATOR, chunk(), "payload 'p1' is not announced")

    def test_chunks_of_an_offer_end_with_the_task(self):
        wire = working(MANIFEST).say((COORDINATOR, chunk(0, 10)), (SILO, result()))
        wire.say((COORDINATOR, chunk(10, 12)), (COORDINATOR, ack()))
        wire.illegal(COORDINATOR, chunk(12, 16), "payload 'p1' is not announced")

    def test_a_gap_an_overlap_and_an_overrun_are_illegal(self):
        wire = working().say((SILO, result("t1", MANIFEST)), (SILO, chunk(0, 10)))
        wire.illegal(SILO, chunk(11, 16), "bytes 11 to 16 of payload 'p1'; expected is byte 10 and at most 16")
        wire.illegal(SILO, chunk(9, 16), "bytes 9 to 16 of payload 'p1'; expected is byte 10")
        wire.illegal(SILO, chunk(0, 10), "bytes 0 to 10 of payload 'p1'; expected is byte 10")
        wire.illegal(SILO, chunk(10, 17), "bytes 10 to 17 of payload 'p1'; expected is byte 10 and at most 16")
        wire.say((SILO, chunk(10, 16)))

    def test_a_chunk_after_the_last_is_illegal(self):
        wire = working().say((SILO, result("t1", MANIFEST)), (SILO, chunk()))
        wire.illegal(SILO, chunk(16, 17), "payload 'p1' is not announced")

    def test_a_chunk_of_an_unknown_payload_is_illegal(self):
        working(MANIFEST).illegal(COORDINATOR, chunk(payload_id="p2"), "payload 'p2' is not announced")

    def test_a_silo_does_not_send_what_the_coordinator_announced(self):
        working(MANIFEST).illegal(SILO, chunk(), "payload 'p1' is not announced")

    def test_the_two_directions_may_use_one_payload_id(self):
        wire = working(MANIFEST).say((SILO, result("t1", MANIFEST)), (SILO, chunk(0, 4)), (COORDINATOR, chunk(0, 8)))
        wire.say((SILO, chunk(4, 16)), (COORDINATOR, chunk(8, 16)))

    def test_chunks_of_several_payloads_may_alternate(self):
        wire = opened("t1", "t2")
        wire.say((SILO, result("t1", MANIFEST)), (SILO, result("t2", payload("p2")[0])))
        wire.say((SILO, chunk(0, 8)), (SILO, chunk(0, 9, "p2")), (SILO, chunk(8, 16)), (SILO, chunk(9, 16, "p2")))
        assert not any(wire.ends[SILO].owes(payload_id) for payload_id in ("p1", "p2"))

    def test_too_many_open_payloads_are_illegal(self):
        wire = opened()
        for number in range(MAX_OPEN_PAYLOADS):
            assert wire.ends[COORDINATOR].may_announce
            wire.say((COORDINATOR, offer(f"t{number}", payload(f"p{number}")[0])))
        assert not wire.ends[COORDINATOR].may_announce
        more = offer("more", payload("more")[0])
        wire.illegal(COORDINATOR, more, "more than 64 payloads are open")
        wire.say((COORDINATOR, offer("without")))
        wire.say((SILO, reply("t0", RefusalReason.BUSY)), (COORDINATOR, more))

    def test_too_many_offers_without_a_reply_are_illegal(self):
        wire = opened()
        for number in range(MAX_OPEN_OFFERS):
            assert wire.ends[COORDINATOR].may_offer
            wire.say((COORDINATOR, offer(f"t{number}")))
        assert not wire.ends[COORDINATOR].may_offer
        wire.illegal(COORDINATOR, offer("more"), "more than 100 offers are open")
        wire.say((SILO, reply("t0")), (COORDINATOR, offer("more")))

    def test_the_payloads_of_a_task_are_those_announced_and_not_completely_sent(self):
        wire = opened()
        wire.say((COORDINATOR, offer("t1", MANIFEST)), (SILO, reply("t1")))
        assert wire.ends[COORDINATOR].payloads_of("t1") == {"p1"}
        assert wire.ends[COORDINATOR].payloads_of("t2") == frozenset()
        assert wire.ends[SILO].is_owed("p1")
        assert not wire.ends[COORDINATOR].is_owed("p1")
        wire.say((COORDINATOR, chunk(0, 16)))
        assert wire.ends[COORDINATOR].payloads_of("t1") == frozenset()
        assert not wire.ends[SILO].is_owed("p1")

    def test_too_many_open_results_are_illegal(self):
        names = [f"t{number}" for number in range(MAX_OPEN_PAYLOADS + 1)]
        wire = opened(*names)
        for name in names[:-1]:
            wire.say((SILO, result(name, payload(name)[0])))
        wire.illegal(SILO, result(names[-1], payload(names[-1])[0]), "more than 64 payloads are open")
        assert wire.phases(names[-1]) == {TaskPhase.WORKING}


class TestDrain:
    def test_no_offers_after_the_coordinator_drains(self):
        wire = opened().say((COORDINATOR, DRAIN))
        wire.illegal(COORDINATOR, offer(), "coordinator must not send TaskOffer in phase 'drained'")

    def test_a_second_drain_is_illegal(self):
        for role in Role:
            opened().say((role, DRAIN)).illegal(role, DRAIN, "must not send Drain in phase 'drained'")

    def test_what_runs_is_finished_and_settled_after_both_drained(self):
        wire = working(MANIFEST).say((SILO, DRAIN), (COORDINATOR, DRAIN), (COORDINATOR, chunk()))
        wire.say((SILO, HEARTBEAT), (SILO, TaskProgress("t1", 1, 1)), (SILO, result("t1", MANIFEST)), (SILO, chunk()))
        wire.say((COORDINATOR, TaskCancel("t1")), (COORDINATOR, HEARTBEAT), (COORDINATOR, ack()))
        assert wire.phases() == {None}
        assert {end.our_phase for end in wire.ends.values()} == {Phase.DRAINED}

    def test_an_offer_that_crosses_the_drain_of_the_silo_is_legal_and_can_be_refused(self):
        wire = opened()
        wire.speak(SILO, DRAIN)
        wire.speak(COORDINATOR, offer())
        wire.deliver(SILO)
        wire.deliver(COORDINATOR)
        wire.say((SILO, reply(refusal=RefusalReason.DRAINING)))
        assert wire.phases() == {None}


class TestUnreadableFrames:
    """They replace, on arrival only, an offer or a result that this version cannot read."""

    def test_an_unreadable_offer_is_refused(self):
        wire = opened()
        wire.speak(COORDINATOR, offer("t1", MANIFEST))
        wire.under_way[COORDINATOR].clear()
        wire.ends[SILO].receive(UnreadableOffer("t1", "kind 77 is not known"))
        wire.say((SILO, reply(refusal=RefusalReason.METHOD_MISMATCH)))
        assert wire.phases() == {None}

    def test_an_unreadable_offer_keeps_to_the_rules_of_an_offer(self):
        for wire in (offered(), working()):
            with pytest.raises(RemoteProtocolError, match="TaskOffer from coordinator: task 't1' is already"):
                wire.ends[SILO].receive(UnreadableOffer("t1", "?"))
        with pytest.raises(RemoteProtocolError, match="coordinator must not send TaskOffer in phase 'drained'"):
            opened().say((COORDINATOR, DRAIN)).ends[SILO].receive(UnreadableOffer("t1", "?"))

    def test_an_unreadable_result_is_settled(self):
        wire = working()
        wire.speak(SILO, result())
        wire.under_way[SILO].clear()
        wire.ends[COORDINATOR].receive(UnreadableResult("t1", "reason 77 is not known"))
        assert wire.phases() == {TaskPhase.RETURNED}
        wire.say((COORDINATOR, ack(verdict=Verdict.INVALID)))
        assert wire.phases() == {None}

    def test_an_unreadable_result_keeps_to_the_rules_of_a_result(self):
        with pytest.raises(RemoteProtocolError, match="TaskResult from silo: task 't1' is offered, not working"):
            offered().ends[COORDINATOR].receive(UnreadableResult("t1", "?"))

    def test_an_unreadable_verdict_ends_the_task_in_this_session_as_any_verdict_does(self):
        wire = working().say((SILO, result()))
        wire.speak(COORDINATOR, ack())
        wire.under_way[COORDINATOR].clear()
        wire.ends[SILO].receive(UnreadableAck("t1", "verdict 77 is not known"))
        assert wire.phases() == {None}
        wire.say((COORDINATOR, offer()), (SILO, reply()), (SILO, result()), (COORDINATOR, ack()))

    def test_an_unreadable_verdict_keeps_to_the_rules_of_a_verdict(self):
        with pytest.raises(RemoteProtocolError, match="ResultAck from coordinator: task 't1' is working, not returned"):
            working().ends[SILO].receive(UnreadableAck("t1", "?"))

    @pytest.mark.parametrize(
        "frame", [UnreadableOffer("t1", "?"), UnreadableResult("t1", "?"), UnreadableAck("t1", "?")], **SHORT
    )
    def test_nobody_sends_an_unreadable_frame(self, frame):
        role = SILO if isinstance(frame, UnreadableResult) else COORDINATOR
        with pytest.raises(LocalProtocolError):
            opened("t1" if role is SILO else "t2").speak(role, frame)


def test_the_chunks_of_an_unreadable_result_do_not_end_the_session():
    """A later silo may return an element type that we do not know; its chunks are already under way."""
    wire = working()
    wire.speak(SILO, result("t1", MANIFEST))
    wire.speak(SILO, chunk())
    message = request_to_pb(wire.under_way[SILO].popleft())
    message.task_result.success.shared_tensors.tensors[0].element_type = 77
    wire.ends[COORDINATOR].receive(request_from_pb(message))
    wire.deliver(SILO)
    wire.say((COORDINATOR, ack(verdict=Verdict.INVALID)))
    assert wire.phases() == {None}


HISTORIES = st.integers(2, 400).flatmap(lambda size: st.binary(min_size=size, max_size=size))


class Walk:
    """A conversation that follows from some bytes: its frames are legal often, but far from always.

    One byte makes one decision, and the first option is the dullest; so a failing history shrinks to few, dull frames.
    """

    TASKS = ("t1", "t2", "t3")
    PAYLOADS = tuple(payload(f"p{number}", elements) for number, elements in enumerate([1, 3, 5]))

    def __init__(self, history, unreadable_share=0.0):
        self.decisions = iter(history)
        self.wire = Wire()
        self.seen = Counter()
        self.unreadable_share = unreadable_share
        self.unreadable = set()  # tasks whose offer the silo could not read: it only refuses those

    def choose(self, options):
        return options[next(self.decisions, 0) % len(options)]

    def happens(self, share):
        return next(self.decisions, 0) >= 256 * (1 - share)

    def some(self, at_most):
        """Up to so many tasks."""
        return self.choose([tasks for count in range(at_most + 1) for tasks in permutations(self.TASKS, count)])

    def go(self):
        """Until the bytes are used up."""
        for decision in self.decisions:
            role = tuple(Role)[decision % 2]
            if self.wire.under_way[role] and decision >= 128:
                self.deliver(role)
            else:
                self.speak(role)
        return self

    def speak(self, role):
        frame = self.frame(role)
        try:
            self.wire.speak(role, frame)
        except LocalProtocolError:
            self.seen["illegal", type(frame)] += 1
        else:
            self.seen["legal", type(frame)] += 1
            note(f"{role.value} says {frame}")

    def deliver(self, role):
        waiting = self.wire.under_way[role]
        match waiting[0]:
            case TaskOffer(task):
                self.unreadable.discard(task.task_id)
                if self.happens(self.unreadable_share):
                    self.unreadable.add(task.task_id)
                    waiting[0] = UnreadableOffer(task.task_id, "?")
            case ResultAck(task_id) if self.happens(self.unreadable_share):
                waiting[0] = UnreadableAck(task_id, "?")
            case TaskResult(result) if self.happens(self.unreadable_share):
                payload_id = result.manifest.payload_id if result.manifest else ""
                waiting[0] = UnreadableResult(result.task_id, "?", payload_id)
        note(f"arrives: {waiting[0]}")
        self.wire.deliver(role)

    def deliver_all(self):
        while waiting := [role for role in Role if self.wire.under_way[role]]:
            self.deliver(self.choose(waiting))
        return self

    def frame(self, role):
        return self.silo_frame() if role is SILO else self.coordinator_frame()

    def silo_frame(self):
        if self.wire.ends[SILO].our_phase is Phase.START and not self.happens(0.3):
            return hello(*self.some(3))
        offered, working = self.task(SILO, TaskPhase.OFFERED), self.task(SILO, TaskPhase.WORKING)
        refusals = [RefusalReason.BUSY] if offered in self.unreadable else [None, None, RefusalReason.POLICY]
        match self.choose(["rare", "reply", "reply", "progress", "result", "result", "chunk", "chunk", "chunk"]):
            case "reply":
                return TaskReply(offered, self.choose(refusals))
            case "progress":
                return TaskProgress(working, 1, 2)
            case "result":
                return result(working, self.manifest())
            case "chunk":
                return self.chunk(SILO)
        return self.rare_frame(hello(), WELCOME)

    def coordinator_frame(self):
        if self.wire.ends[COORDINATOR].our_phase is Phase.START and not self.happens(0.3):
            return Welcome("s", 1.0, 2.0, self.some(1))
        match self.choose(["rare", "offer", "offer", "chunk", "chunk", "ack"]):
            case "offer":
                return offer(self.task(COORDINATOR, None), self.manifest())
            case "chunk":
                return self.chunk(COORDINATOR)
            case "ack":
                return ack(self.task(COORDINATOR, TaskPhase.RETURNED))
        return self.rare_frame(TaskCancel(self.choose(self.TASKS)), WELCOME, reply("t1"))

    def rare_frame(self, *others):
        return DRAIN if self.happens(0.02) else self.choose([HEARTBEAT, *others])

    def task(self, role, phase):
        """A task that this end believes to be in the phase; sometimes any."""
        fitting = [name for name in self.TASKS if self.wire.ends[role].task_phase(name) is phase]
        return self.choose(self.TASKS if not fitting or self.happens(0.1) else fitting)

    def manifest(self):
        return self.choose([None, None, None, *(manifest for manifest, _ in self.PAYLOADS)])

    def chunk(self, role):
        """Mostly the next piece of an open payload; sometimes one that starts or ends wrongly."""
        open_payloads = self.wire.ends[role]._speakers[role].payloads
        payload_id = self.choose([*open_payloads, "p0"])
        start = open_payloads[payload_id].offset if payload_id in open_payloads else 0
        start += self.happens(0.1)
        return chunk(start, start + self.choose(range(1, 9)), payload_id)


def test_no_frame_that_is_legal_to_send_is_illegal_on_arrival():
    """`Walk.deliver` would raise."""
    seen = Counter()

    @settings(max_examples=3000)
    @given(HISTORIES)
    def converse(history):
        seen.update(Walk(history, unreadable_share=0.1).go().deliver_all().seen)

    converse()
    often = (TaskOffer, TaskReply, TaskResult, TaskProgress, PayloadChunk, ResultAck)
    assert min(seen["legal", kind] for kind in often) > 300
    assert min(seen["illegal", kind] for kind in often) > 100
    assert min(seen[verdict, kind] for verdict in ("legal", "illegal") for kind in (Hello, Welcome, Drain)) >= 5


@settings(max_examples=500)
@given(HISTORIES)
def test_both_ends_remember_the_same_once_everything_has_arrived(history):
    first, second = Walk(history).go().deliver_all().wire.ends.values()
    assert first._speakers == second._speakers
    assert first._tasks == second._tasks


def test_random_frames_from_a_peer_are_taken_or_change_nothing():
    verdicts = Counter()

    @settings(max_examples=500)
    @given(HISTORIES, st.lists(st.binary(min_size=1, max_size=10), min_size=1, max_size=10))
    def intrude(history, intrusions):
        walk = Walk(history).go()
        for intrusion in intrusions:
            role, *decisions = intrusion
            role, walk.decisions = tuple(Role)[role % 2], iter(decisions)
            hearer, frame = copy.deepcopy(walk.wire.ends[COORDINATOR if role is SILO else SILO]), walk.frame(role)
            before = snapshot(hearer)
            try:
                hearer.receive(frame)
            except RemoteProtocolError:
                assert snapshot(hearer) == before
                verdicts["refused"] += 1
            else:
                verdicts["taken"] += 1

    intrude()
    assert min(verdicts.values()) > 500


def test_a_chunk_as_large_as_allowed_crosses():
    manifest, _ = payload("big", CHUNK_BYTES // 4 + 1)
    wire = working().say((SILO, result("t1", manifest)), (SILO, chunk(0, CHUNK_BYTES, "big")))
    wire.say((SILO, chunk(CHUNK_BYTES, CHUNK_BYTES + 4, "big")))
