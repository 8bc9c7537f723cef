"""Who is to blame for a round without their result, when a silo is set aside, and what the end says of absentees."""

from dataclasses import replace

import pytest

from coordinator.conduct import Conduct, SetAside, aside, judge, summary
from coordinator.rounds import ENOUGH, LATE, LOST, Ask, AskState, Round, RoundPhase
from fedrt.spec import RoundsSpec
from fedrt.task import TaskKind

RULES = RoundsSpec(9, min_results=1, set_aside_after=2, set_aside_rounds=3)


def closed(number=1, succeeded=True, message="", absent=(), **asks):
    """A closed round; an ask is None if it returned, or why it did not."""
    parts = tuple(
        Ask(silo, f"t-{silo}", AskState.RETURNED if why is None else AskState.ABSENT, why or "")
        for silo, why in asks.items()
    )
    return Round(
        number,
        TaskKind.TRAIN,
        0,
        parts,
        1,
        0.0,
        9.0,
        absent=absent,
        phase=RoundPhase.CLOSED,
        succeeded=succeeded,
        message=message,
    )


def after(*rounds, rules=RULES):
    conducts, told = (), []
    for round_ in rounds:
        conducts, told = judge(conducts, round_, rules)
    return conducts, told


def test_silos_that_always_deliver_leave_no_trace():
    assert after(closed(1, a=None, b=None), closed(2, a=None, b=None)) == ((), [])


def test_failures_in_a_row_set_a_silo_aside_and_say_until_when():
    conducts, told = after(closed(1, a=None, b="failed (internal): x"), closed(2, a=None, b=LATE))
    assert told == [SetAside("b", 6, f"it failed 2 times in a row, last: {LATE}")]
    assert [number for number in range(1, 9) if aside(conducts, number)] == [1, 2, 3, 4, 5]
    assert aside(conducts, 3) == {"b": f"set aside until round 6 after repeated failures, last: {LATE}"}


def test_after_its_rest_one_more_failure_sets_it_aside_again_and_a_result_clears_it():
    first = (closed(1, b="x"), closed(2, b="x"))
    assert after(*first, closed(6, b="y"))[1] == [SetAside("b", 10, "it failed 2 times in a row, last: y")]
    assert after(*first, closed(6, b=None), closed(7, b="y"))[1] == []


def test_a_result_between_two_failures_ends_the_row():
    assert after(closed(1, b="x"), closed(2, b=None), closed(3, b="x"))[1] == []


@pytest.mark.parametrize("excuse", [LOST, ENOUGH])
def test_nobody_is_blamed_for_a_round_that_others_ended(excuse):
    conducts, told = after(*[closed(number, succeeded=False, a=None, b=excuse) for number in (1, 2, 3)])
    assert (conducts, told) == ((), [])


def test_nobody_is_blamed_for_a_lost_connection_or_an_order():
    away = closed(1, succeeded=False, b=LATE)
    away = replace(away, asks=tuple(replace(ask, away=True) for ask in away.asks))
    assert after(away, away, away) == ((), [])
    withdrawn = closed(1, succeeded=False, message="cancelled by an operator", b="cancelled by an operator")
    assert after(withdrawn, withdrawn, withdrawn) == ((), [])


@pytest.mark.parametrize(
    "rules",
    [
        RoundsSpec(9, set_aside_after=2),  # every silo is needed
        RoundsSpec(9, min_results=1, set_aside_after=0),
        RoundsSpec(9, min_results=1, set_aside_after=2, set_aside_rounds=0),
    ],
)
def test_nobody_is_set_aside_where_that_cannot_be_or_is_not_wanted(rules):
    conducts, told = after(*[closed(number, b="x") for number in range(1, 6)], rules=rules)
    assert told == []
    assert aside(conducts, 6) == {}


def test_a_silo_is_set_aside_where_a_round_takes_only_some_of_all():
    rules = RoundsSpec(9, max_silos=1, set_aside_after=1)
    assert [one.silo_id for one in after(closed(1, b="x"), rules=rules)[1]] == ["b"]


def test_the_end_names_who_was_missing_in_rounds_that_counted():
    conducts, _ = after(
        closed(1, a=None, b=None, absent=(("c", "not connected"),)),
        closed(2, succeeded=False, a="x", b="x"),  # was tried again: nobody is missing in what counts
        closed(2, a=None, b=LATE, absent=(("c", "not connected"),)),
    )
    assert summary(conducts, 2) == (
        f"missing in training rounds: b in 1 of 2 (last: {LATE}); c in 2 of 2 (last: not connected)"
    )
    assert summary((Conduct("a", failures=1),), 2) == ""
