import dataclasses
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedrt.session.frames import HeldState
from fedrt.task import RefusalReason, Verdict
from silo.ledger import (
    MAX_HELD,
    CancelArrived,
    DrainOrdered,
    Forget,
    HoldState,
    Ledger,
    Offered,
    OutcomeStored,
    Promote,
    Reply,
    Send,
    SessionDown,
    SessionUp,
    Start,
    StoreCancelled,
    TensorsArrived,
    VerdictArrived,
    held_tasks,
    step,
)


def after(*events, ledger: Ledger | None = None):
    """The ledger after these events, and the effects of the last one."""
    state, effects = ledger or Ledger(), ()
    for event in events:
        state, effects = step(state, event)
    return state, effects


OFFER, ARRIVED, STORED = Offered("t", "e-t", True), TensorsArrived("t"), OutcomeStored("t")


def test_a_task_goes_from_its_offer_to_its_verdict():
    ledger, effects = after(OFFER)
    assert effects == (Reply("t"),)
    assert ledger.state("t") is HoldState.WAITING
    ledger, effects = after(ARRIVED, ledger=ledger)
    assert effects == (Start("t"),)
    assert ledger.running == "t"
    ledger, effects = after(STORED, ledger=ledger)
    assert effects == (Send("t"),)
    assert ledger.state("t") is HoldState.FINISHED
    ledger, effects = after(VerdictArrived("t", Verdict.ACCEPTED), ledger=ledger)
    assert effects == (Promote("t"),)
    assert ledger.is_idle


def test_a_task_without_tensors_starts_at_once():
    assert after(Offered("t", "e-t", False))[1] == (Reply("t"), Start("t"))


@pytest.mark.parametrize("verdict", Verdict)
def test_only_accepted_and_duplicate_promote(verdict: Verdict):
    ledger, effects = after(OFFER, ARRIVED, STORED, VerdictArrived("t", verdict))
    promoted = verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE)
    assert effects == ((Promote("t"),) if promoted else (Forget("t"),))
    assert ledger.is_idle


@pytest.mark.parametrize("early", [(), (OFFER,), (OFFER, ARRIVED)])
def test_a_verdict_before_the_outcome_is_durable_changes_nothing(early: tuple):
    before, _ = after(*early)
    assert after(*early, VerdictArrived("t", Verdict.ACCEPTED)) == (before, ())


def test_a_second_task_waits_for_the_first():
    ledger, effects = after(OFFER, ARRIVED, Offered("u", "e-u", False))
    assert effects == (Reply("u"),)
    assert ledger.state("u") is HoldState.QUEUED
    ledger, effects = after(STORED, ledger=ledger)
    assert effects == (Send("t"), Start("u"))


@pytest.mark.parametrize(
    ("history", "effects"),
    [
        ((OFFER,), (Reply("t"),)),
        ((OFFER, ARRIVED), (Reply("t"),)),
        ((OFFER, ARRIVED, STORED), (Reply("t"), Send("t"))),
    ],
)
def test_an_offer_of_what_is_held_is_accepted_again_and_not_begun_twice(history: tuple, effects: tuple):
    before, _ = after(*history)
    assert after(*history, OFFER) == (before, effects)


def test_what_is_held_is_kept_even_if_the_policy_has_changed():
    forbidden = dataclasses.replace(OFFER, refusal=RefusalReason.POLICY, message="no")
    assert after(OFFER, ARRIVED, forbidden)[1] == (Reply("t"),)


def test_a_refusal_of_the_policy_is_passed_on():
    forbidden = dataclasses.replace(OFFER, refusal=RefusalReason.POLICY, message="no")
    assert after(forbidden) == (Ledger(), (Reply("t", RefusalReason.POLICY, "no"),))


def test_a_silo_that_holds_as_much_as_it_may_is_busy():
    ledger, _ = after(*(Offered(f"t{index}", f"e{index}", True) for index in range(MAX_HELD)))
    ledger, effects = after(Offered("more", "e-more", True), ledger=ledger)
    assert effects == (Reply("more", RefusalReason.BUSY, f"this silo already holds {MAX_HELD} tasks"),)
    assert ledger.state("more") is None


@pytest.mark.parametrize("history", [(OFFER,), (OFFER, ARRIVED), (Offered("a", "e-a", False), OFFER, ARRIVED)])
def test_a_cancelled_task_becomes_a_failure_that_awaits_its_verdict(history: tuple):
    ledger, effects = after(*history, CancelArrived("t"))
    assert effects == (StoreCancelled("t"),)
    ledger, effects = after(STORED, ledger=ledger)
    assert ledger.state("t") is HoldState.FINISHED
    assert Send("t") in effects
    assert after(VerdictArrived("t", Verdict.LATE), ledger=ledger)[1] == (Forget("t"),)


def test_cancelling_what_is_finished_or_unknown_changes_nothing():
    finished, _ = after(OFFER, ARRIVED, STORED)
    assert after(CancelArrived("t"), ledger=finished) == (finished, ())
    assert after(CancelArrived("x"), ledger=finished) == (finished, ())


def test_a_lost_session_forgets_tasks_whose_tensors_were_under_way_and_nothing_else():
    ledger, _ = after(Offered("r", "e-r", False), Offered("q", "e-q", False), Offered("w", "e-w", True))
    ledger, effects = after(SessionDown(), ledger=ledger)
    assert effects == (Forget("w"),)
    assert [(task.task_id, task.state) for task in held_tasks(ledger)] == [
        ("r", HeldState.RUNNING),
        ("q", HeldState.RUNNING),
    ]


def test_a_new_session_sends_what_is_finished_and_forgets_what_is_obsolete():
    ledger, _ = after(
        Offered("f", "e-f", False), OutcomeStored("f"), Offered("r", "e-r", False), Offered("q", "e-q", False)
    )
    ledger, effects = after(SessionUp(("r", "unheard-of")), ledger=ledger)
    assert effects == (Forget("r"), Start("q"), Send("f"))


def test_draining_forgets_what_has_not_begun_and_takes_nothing_new():
    ledger, _ = after(Offered("r", "e-r", False), Offered("q", "e-q", False), Offered("w", "e-w", True))
    ledger, effects = after(DrainOrdered(), ledger=ledger)
    assert effects == (Forget("q"), Forget("w"))
    assert ledger.running == "r"
    ledger, effects = after(OFFER, ledger=ledger)
    assert effects == (Reply("t", RefusalReason.DRAINING, "this silo is stopping"),)
    ledger, effects = after(OutcomeStored("r"), VerdictArrived("r", Verdict.ACCEPTED), ledger=ledger)
    assert ledger.is_idle


def test_work_waits_for_the_verdict_on_an_earlier_result_of_its_experiment():
    first, second, other = Offered("t1", "e", False), Offered("t2", "e", False), Offered("u", "f", False)
    ledger, effects = after(first, OutcomeStored("t1"), second)
    assert effects == (Reply("t2"),)
    ledger, effects = after(other, ledger=ledger)
    assert effects == (Reply("u"), Start("u"))
    ledger, effects = after(OutcomeStored("u"), VerdictArrived("t1", Verdict.DUPLICATE), ledger=ledger)
    assert effects == (Promote("t1"), Start("t2"))


class Histories(RuleBasedStateMachine):
    """A coordinator and a network that do as they please, with a driver that performs every effect."""

    @staticmethod
    def experiment(task_id: str) -> str:
        return f"e{len(task_id)}"  # two experiments with several tasks each

    tasks = st.sampled_from([f"t{index}" for index in range(MAX_HELD + 3)])

    @initialize()
    def begin(self) -> None:
        self.ledger = Ledger()
        self.working: set[str] = set()
        self.spool: set[str] = set()
        self.taken: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.promoted: Counter[str] = Counter()
        self.started: Counter[str] = Counter()
        self.drained = False

    def tell(self, event) -> tuple:
        before = self.ledger
        self.ledger, effects = step(before, event)
        assert step(before, event) == (self.ledger, effects)  # a function
        for effect in effects:
            match effect:
                case Reply(task_id, None):
                    self.taken[task_id] += before.state(task_id) is None
                case Start(task_id):
                    assert not self.working, "two tasks run"
                    unsettled = {self.experiment(other) for other in self.spool}
                    assert self.experiment(task_id) not in unsettled, "work begins from outdated private tensors"
                    self.working.add(task_id)
                    self.started[task_id] += 1
                case StoreCancelled(task_id):
                    self.working.discard(task_id)
                    self.spool.add(task_id)
                    self.tell(OutcomeStored(task_id))
                case Send(task_id):
                    assert task_id in self.spool, "a result leaves before it is durable"
                case Promote(task_id):
                    assert task_id in self.spool
                    self.spool.remove(task_id)
                    self.promoted[task_id] += 1
                case Forget(task_id):
                    self.working.discard(task_id)
                    self.spool.discard(task_id)
        return effects

    @rule(task_id=tasks, has_tensors=st.booleans(), refusal=st.none() | st.just(RefusalReason.POLICY))
    def offer(self, task_id: str, has_tensors: bool, refusal: RefusalReason | None) -> None:
        held = self.ledger.state(task_id)
        effects = self.tell(Offered(task_id, self.experiment(task_id), has_tensors, refusal, "no" if refusal else ""))
        replies = [effect for effect in effects if isinstance(effect, Reply)]
        assert len(replies) == 1
        assert replies[0].task_id == task_id
        if held is not None:
            assert replies[0].refusal is None
        elif self.drained:
            assert replies[0].refusal is RefusalReason.DRAINING

    @rule(task_id=tasks)
    def tensors(self, task_id: str) -> None:
        self.tell(TensorsArrived(task_id))

    @precondition(lambda self: self.working)
    @rule()
    def work_ends(self) -> None:
        task_id = self.working.pop()
        self.spool.add(task_id)
        self.tell(OutcomeStored(task_id))

    @rule(task_id=tasks)
    def cancel(self, task_id: str) -> None:
        self.tell(CancelArrived(task_id))

    @rule(task_id=tasks, verdict=st.sampled_from(Verdict))
    def settle(self, task_id: str, verdict: Verdict) -> None:
        finished = self.ledger.state(task_id) is HoldState.FINISHED
        promotes = finished and verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE)
        self.accepted[task_id] += promotes
        effects = self.tell(VerdictArrived(task_id, verdict))
        assert (Promote(task_id) in effects) == promotes
        assert (Forget(task_id) in effects) == (finished and not promotes)

    @rule(obsolete=st.sets(tasks, max_size=3))
    def session_up(self, obsolete: set[str]) -> None:
        effects = self.tell(SessionUp(tuple(obsolete)))
        finished = {h.task_id for h in self.ledger.holds if h.state is HoldState.FINISHED}
        assert {effect.task_id for effect in effects if isinstance(effect, Send)} == finished

    @rule()
    def session_down(self) -> None:
        self.tell(SessionDown())
        assert all(hold.state is not HoldState.WAITING for hold in self.ledger.holds)

    @rule()
    def drain(self) -> None:
        self.drained = True
        self.tell(DrainOrdered())

    @invariant()
    def at_most_one_task_runs_and_none_waits_for_nothing(self) -> None:
        running = [hold.task_id for hold in self.ledger.holds if hold.state is HoldState.RUNNING]
        assert running == list(self.working)
        unsettled = {hold.experiment_id for hold in self.ledger.holds if hold.state is HoldState.FINISHED}
        if any(h.state is HoldState.QUEUED and h.experiment_id not in unsettled for h in self.ledger.holds):
            assert running

    @invariant()
    def finished_is_what_is_spooled(self) -> None:
        finished = {hold.task_id for hold in self.ledger.holds if hold.state is HoldState.FINISHED}
        assert finished == self.spool

    @invariant()
    def private_state_advanced_once_per_accepted_result(self) -> None:
        assert self.promoted == self.accepted

    @invariant()
    def nothing_starts_more_often_than_it_was_taken(self) -> None:
        assert all(self.started[task_id] <= self.taken[task_id] for task_id in self.started)

    @invariant()
    def holds_are_bounded_and_told_apart(self) -> None:
        ids = [hold.task_id for hold in self.ledger.holds]
        assert len(ids) == len(set(ids)) <= MAX_HELD
        told = {task.task_id: task.state for task in held_tasks(self.ledger)}
        for hold in self.ledger.holds:
            expected = {HoldState.WAITING: None, HoldState.FINISHED: HeldState.FINISHED}
            assert told.get(hold.task_id) is expected.get(hold.state, HeldState.RUNNING)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
