"""One round: who counts, when it is decided, and what may be repeated. Whole runs are in the golden transcripts."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rounds import (
    LOST_GRACE,
    REOFFER_DELAY,
    Aggregate,
    Aggregated,
    Ask,
    AskState,
    Cancel,
    Offer,
    Refused,
    ResultFailed,
    ResultStored,
    Round,
    RoundPhase,
    Settle,
    Standing,
    Tick,
    Withdrawn,
    absentees,
    next_tick,
    resume,
    standing,
    step,
)
from fedrt.task import RefusalReason, TaskKind, Verdict


def collecting(*silos, needed=2, kind=TaskKind.TRAIN):
    asks = tuple(Ask(silo, f"t-{silo}") for silo in silos or "abc")
    return Round(1, kind, 0, asks, needed, 0.0, 100.0, aggregates=kind is not TaskKind.EVALUATE)


def after(round_, *events, now=1.0):
    """The round after the events, and the effects of the last one."""
    effects = ()
    for event in events:
        round_, effects = step(round_, event, now)
    return round_, effects


def states(round_):
    return {ask.silo_id: ask.state.value for ask in round_.asks}


ALL_BACK = (ResultStored("t-a"), ResultStored("t-b"), ResultStored("t-c"))


def test_a_result_is_accepted_and_the_round_waits_for_the_others():
    round_, effects = after(collecting(), ResultStored("t-b"))
    assert effects == (Settle("b", "t-b", Verdict.ACCEPTED),)
    assert states(round_) == {"a": "offered", "b": "returned", "c": "offered"}
    assert round_.phase is RoundPhase.COLLECTING


def test_the_last_result_starts_the_aggregation_of_all_in_the_order_of_the_asks():
    round_, effects = after(collecting(), *reversed(ALL_BACK))
    assert effects == (Settle("a", "t-a", Verdict.ACCEPTED), Aggregate(("t-a", "t-b", "t-c")))
    assert round_.phase is RoundPhase.AGGREGATING
    round_, effects = after(round_, Aggregated())
    assert (round_.phase, round_.succeeded, effects) == (RoundPhase.CLOSED, True, ())


def test_a_second_copy_of_a_result_is_a_duplicate_in_every_phase():
    duplicate = (Settle("a", "t-a", Verdict.DUPLICATE),)
    early, _ = after(collecting(), ResultStored("t-a"))
    aggregating, _ = after(collecting(), *ALL_BACK)
    closed, _ = after(aggregating, Aggregated())
    for round_ in (early, aggregating, closed):
        for event in (ResultStored("t-a"), ResultFailed("t-a", "broken")):
            assert step(round_, event, 2.0) == (round_, duplicate)


def test_a_result_after_the_deadline_is_late_and_says_why():
    round_, effects = after(collecting(needed=1), ResultStored("t-a"), Tick(), now=100.0)
    message = "no result within the time limit"
    assert effects == (Cancel("b", "t-b", message), Cancel("c", "t-c", message), Aggregate(("t-a",)))
    assert step(round_, ResultStored("t-b"), 101.0) == (round_, (Settle("b", "t-b", Verdict.LATE, message),))


def test_a_deadline_with_too_few_results_closes_the_round_as_failed():
    round_, effects = after(collecting(), ResultStored("t-a"), Tick(), now=100.0)
    assert (round_.phase, round_.succeeded) == (RoundPhase.CLOSED, False)
    assert [type(effect) for effect in effects] == [Cancel, Cancel]


def test_a_reported_failure_is_acknowledged_and_an_invalid_result_called_so():
    round_, effects = after(collecting(needed=1), ResultFailed("t-a", "out of memory"))
    assert effects == (Settle("a", "t-a", Verdict.ACCEPTED, "out of memory"),)
    round_, effects = after(round_, ResultFailed("t-b", "wrong shape", Verdict.INVALID))
    assert effects == (Settle("b", "t-b", Verdict.INVALID, "wrong shape"),)
    assert states(round_) == {"a": "absent", "b": "absent", "c": "offered"}


def test_a_round_that_can_no_longer_succeed_waits_a_moment_for_reasons_then_cancels_the_rest():
    lost, effects = after(collecting(), ResultFailed("t-a", "x"), ResultFailed("t-b", "y"), now=10.0)
    why = "the round can no longer get enough results"
    assert effects == (Settle("b", "t-b", Verdict.ACCEPTED, "y"),)
    assert next_tick(lost) == 10.0 + LOST_GRACE
    assert step(lost, Tick(), 11.0) == (lost, ())
    said, effects = step(lost, Refused("t-c", RefusalReason.POLICY, "no"), 11.0)
    assert (said.phase, effects) == (RoundPhase.CLOSED, ())
    assert absentees(said)[2] == ("c", "refused (policy): no")
    round_, effects = step(lost, Tick(), 10.0 + LOST_GRACE)
    assert effects == (Cancel("c", "t-c", why),)
    assert (round_.phase, round_.succeeded) == (RoundPhase.CLOSED, False)
    assert absentees(round_) == (("a", "x"), ("b", "y"), ("c", why))


@pytest.mark.parametrize("reason", [RefusalReason.POLICY, RefusalReason.METHOD_MISMATCH])
def test_a_refusal_for_good_makes_an_absentee(reason):
    round_, effects = after(collecting(needed=1), Refused("t-a", reason, "not here"))
    assert effects == ()
    assert absentees(round_)[0] == ("a", f"refused ({reason.value}): not here")


def test_the_last_refusal_decides_the_round():
    round_, effects = after(
        collecting(needed=1), ResultStored("t-a"), ResultStored("t-b"), Refused("t-c", RefusalReason.POLICY, "")
    )
    assert effects == (Aggregate(("t-a", "t-b")),)
    assert round_.phase is RoundPhase.AGGREGATING


def test_a_busy_silo_is_asked_again_after_a_while_and_only_once():
    round_, effects = after(collecting(), Refused("t-a", RefusalReason.BUSY, "later"), now=10.0)
    assert effects == ()
    assert next_tick(round_) == 10.0 + REOFFER_DELAY
    assert step(round_, Tick(), 11.9) == (round_, ())
    round_, effects = step(round_, Tick(), 12.0)
    assert effects == (Offer("a", "t-a"),)
    assert next_tick(round_) == 100.0
    assert step(round_, Tick(), 13.0) == (round_, ())


def test_a_busy_silo_that_delivers_all_the_same_is_not_asked_again():
    round_, _ = after(collecting(), Refused("t-a", RefusalReason.BUSY, ""), ResultStored("t-a"), now=10.0)
    assert next_tick(round_) == 100.0
    assert step(round_, Tick(), 50.0) == (round_, ())


def test_a_draining_silo_keeps_its_ask():
    round_ = collecting()
    assert after(round_, Refused("t-a", RefusalReason.DRAINING, "bye")) == (round_, ())


@pytest.mark.parametrize("reason", RefusalReason)
def test_a_refusal_that_comes_too_late_or_for_an_unknown_task_changes_nothing(reason):
    returned, _ = after(collecting(), ResultStored("t-a"))
    closed, _ = after(collecting(), Withdrawn("stop"))
    for round_, task_id in [(returned, "t-a"), (closed, "t-a"), (returned, "t-unknown")]:
        assert step(round_, Refused(task_id, reason, ""), 2.0) == (round_, ())


def test_a_result_of_an_unknown_task_is_a_mistake_of_the_driver():
    for event in (ResultStored("t-x"), ResultFailed("t-x", "")):
        with pytest.raises(ValueError, match="task 't-x' does not belong to round 1"):
            step(collecting(), event, 1.0)


def test_an_evaluation_is_closed_without_aggregation():
    round_, effects = after(collecting(needed=1, kind=TaskKind.EVALUATE), *ALL_BACK)
    assert effects == (Settle("c", "t-c", Verdict.ACCEPTED),)
    assert (round_.phase, round_.succeeded) == (RoundPhase.CLOSED, True)


def test_a_withdrawn_round_is_closed_and_its_open_tasks_cancelled():
    round_, effects = after(collecting(), ResultStored("t-a"), Withdrawn("cancelled by an operator"))
    assert effects == tuple(Cancel(silo, f"t-{silo}", "cancelled by an operator") for silo in "bc")
    assert (round_.phase, round_.succeeded) == (RoundPhase.CLOSED, False)
    assert step(round_, Withdrawn("again"), 2.0) == (round_, ())
    late = Settle("b", "t-b", Verdict.LATE, "cancelled by an operator")
    assert step(round_, ResultStored("t-b"), 2.0) == (round_, (late,))


def test_aggregated_means_nothing_before_or_after_aggregating():
    closed, _ = after(collecting(), *ALL_BACK, Aggregated())
    for round_ in (collecting(), closed):
        assert step(round_, Aggregated(), 1.0) == (round_, ())


def test_only_an_aggregation_is_done_again_after_a_restart():
    aggregating, effects = after(collecting(), *ALL_BACK)
    closed, _ = after(aggregating, Aggregated())
    assert resume(aggregating) == effects[1:]
    assert resume(collecting()) == resume(closed) == ()


def test_time_means_nothing_once_results_are_in():
    aggregating, _ = after(collecting(), *ALL_BACK)
    assert next_tick(aggregating) is None
    assert step(aggregating, Tick(), 1000.0) == (aggregating, ())


def test_absentees_are_listed_by_name_with_those_who_were_not_asked():
    round_ = replace(collecting("b", "c", needed=1), absent=(("a", "not connected"), ("d", "not connected")))
    round_, _ = after(round_, ResultStored("t-c"))
    assert absentees(round_) == (("a", "not connected"), ("b", "no result"), ("d", "not connected"))


asks = st.lists(st.sampled_from(AskState), max_size=6).map(
    lambda states: tuple(Ask(f"s{number}", f"t{number}", state) for number, state in enumerate(states))
)


@given(asks, st.integers(1, 6))
def test_the_standing_is_that_of_trying_every_possible_end(asks, needed):
    """An open ask can still give a result or none: look at all ends."""
    ends = [0]
    for ask in asks:
        gains = {AskState.OFFERED: (0, 1), AskState.RETURNED: (1,), AskState.ABSENT: (0,)}[ask.state]
        ends = [end + gain for end in ends for gain in gains]
    if max(ends) < needed:
        expected = Standing.LOST
    elif any(ask.state is AskState.OFFERED for ask in asks):
        expected = Standing.PENDING
    else:
        expected = Standing.ENOUGH
    assert standing(asks, needed) is expected


@pytest.mark.parametrize("aggregates", [False, True])
def test_a_round_that_has_enough_results_cancels_the_others(aggregates):
    """Also where nothing is shared: a silo would work on, and its next task would wait behind that."""
    round_ = replace(collecting("a", "b", needed=1), enough=1, aggregates=aggregates)
    _, effects = step(round_, ResultStored("t-a"), 1.0)
    assert Cancel("b", "t-b", "the round had enough results without it") in effects


def test_a_silo_that_was_busy_and_then_refuses_is_not_offered_the_task_again():
    """Or it would work at a task that no round waits for, and that nobody cancels."""
    round_, _ = step(collecting("a", "b", needed=1), Refused("t-a", RefusalReason.BUSY, "later"), 0.0)
    refused, _ = step(round_, Refused("t-a", RefusalReason.POLICY, "never"), 1.0)
    assert refused.ask("t-a").reoffer_time is None
    assert step(refused, Tick(), REOFFER_DELAY) == (refused, ())


tasks = st.sampled_from(["t-a", "t-b", "t-c", "t-d"])
events = st.one_of(
    st.builds(ResultStored, tasks),
    st.builds(ResultFailed, tasks, st.just("broken"), st.sampled_from([Verdict.ACCEPTED, Verdict.INVALID])),
    st.builds(Refused, tasks, st.sampled_from(RefusalReason), st.just("no")),
    st.just(Tick()),
    st.just(Aggregated()),
    st.builds(Withdrawn, st.just("stop")),
)
timed_events = st.lists(st.tuples(events, st.integers(0, 20)), max_size=25)
rounds_ = st.builds(
    collecting,
    *map(st.just, "abcd"),
    needed=st.integers(1, 4),
    kind=st.sampled_from(TaskKind),
)


@given(rounds_, timed_events)
def test_whatever_happens_a_round_keeps_its_rules(round_, history):
    now, settled, aggregates = 0.0, [], 0
    for event, seconds in history:
        now += seconds
        before = round_
        round_, effects = step(before, event, now)
        settled += [e.task_id for e in effects if isinstance(e, Settle) and e.verdict is Verdict.ACCEPTED]
        aggregates += sum(isinstance(effect, Aggregate) for effect in effects)
        if before.phase is RoundPhase.CLOSED:
            assert round_ == before
        if isinstance(event, ResultStored | ResultFailed):
            assert sum(isinstance(effect, Settle) for effect in effects) == 1
        for old, new in zip(before.asks, round_.asks, strict=True):
            assert old.state in (AskState.OFFERED, new.state)
        if round_.succeeded:
            assert sum(ask.state is AskState.RETURNED for ask in round_.asks) >= round_.needed
        if round_.phase is RoundPhase.COLLECTING:
            hopeless = standing(round_.asks, round_.needed) is Standing.LOST
            assert hopeless == (round_.lost_time is not None)
            assert standing(round_.asks, round_.needed) is not Standing.ENOUGH
            assert now < round_.deadline or not isinstance(event, Tick)
    assert len(settled) == len(set(settled))
    assert aggregates <= (0 if round_.kind is TaskKind.EVALUATE else 1)


@given(rounds_, timed_events, st.floats(0, 1))
def test_a_tick_before_the_next_one_announced_changes_nothing(round_, history, share):
    now = 0.0
    for event, seconds in history:
        now += seconds
        round_, _ = step(round_, event, now)
    due = next_tick(round_)
    if due is None:
        assert step(round_, Tick(), now + 1e6) == (round_, ())
        return
    before = due - 1e-3 - share * due
    assert step(round_, Tick(), before) == (round_, ())
    assert step(round_, Tick(), due) != (round_, ())
