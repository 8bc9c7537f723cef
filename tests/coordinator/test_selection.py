"""Selection: everybody who may and is there, or a draw that every run repeats."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.selection import Occasion, Population, Selection, Waiting, select
from fedrt.spec import RoundsSpec
from fedrt.task import TaskKind

TRAIN, EVALUATE, INITIALIZE = TaskKind.TRAIN, TaskKind.EVALUATE, TaskKind.INITIALIZE


def people(known, available=None):
    return Population(frozenset(known), frozenset(known if available is None else available))


def chosen(population, kind=TRAIN, draw=(1, 1, 0), overdue=False, aside=(), **limits):
    reasons = {name: f"{name} failed" for name in aside}
    return select(RoundsSpec(1, **limits), population, Occasion(kind, draw, overdue, reasons))


def test_everybody_known_is_asked_and_needed():
    assert chosen(people("cab")) == Selection(("a", "b", "c"), needed=3)


def test_the_round_waits_for_everybody_unless_fewer_are_enough():
    waiting = chosen(people("abc", "b"))
    advice = "; name rounds.silos in the experiment to do without silos that are gone"
    assert waiting == Waiting(f"waiting for silos: 1 of 3 needed are connected; not connected: a, c{advice}")
    named = chosen(people("abc", "b"), silos=("a", "b"))
    assert named == Waiting("waiting for silos: 1 of 2 needed are connected; not connected: a")
    enough = chosen(people("abc", "b"), min_results=1)
    assert enough == Selection(("b",), 1, (("a", "not connected"), ("c", "not connected")))


def test_more_than_the_needed_are_asked():
    assert chosen(people("abc"), min_results=1) == Selection(("a", "b", "c"), needed=1)


def test_nobody_has_ever_connected():
    assert chosen(people("")) == Waiting("waiting for silos: none has ever connected")


def test_named_silos_are_waited_for_before_they_are_known():
    assert chosen(people("ax"), silos=("a", "b")) == Waiting(
        "waiting for silos: 1 of 2 needed are connected; not connected: b"
    )
    assert chosen(people("abx"), silos=("a", "b")) == Selection(("a", "b"), 2)


def test_more_results_than_silos_exist_is_waited_for():
    waiting = chosen(people("ab"), min_results=3)
    assert waiting.message.startswith("waiting for silos: 2 of 3 needed are connected")


@pytest.mark.parametrize("available", ["b", "abc"])
def test_one_silo_is_asked_to_initialize(available):
    selection = chosen(people("abc", available), INITIALIZE, min_results=3)
    assert len(selection.asked) == selection.needed == 1
    assert set(selection.asked) <= set(available)


def test_nobody_is_there_to_initialize():
    assert chosen(people("ab", ""), INITIALIZE).message.startswith("waiting for silos: 0 of 1 needed are connected")


def test_an_evaluation_needs_one_result_of_those_it_asks():
    assert chosen(people("abc"), EVALUATE, min_results=2) == Selection(("a", "b", "c"), needed=1)


def test_an_evaluation_waits_as_long_as_a_round_then_takes_who_is_there():
    there = people("abc", "b")
    assert chosen(there, EVALUATE).message.startswith("waiting for silos: 1 of 3 needed are connected")
    absent = (("a", "not connected"), ("c", "not connected"))
    assert chosen(there, EVALUATE, overdue=True) == Selection(("b",), needed=1, absent=absent)
    assert isinstance(chosen(people("abc", ""), EVALUATE, overdue=True), Waiting)
    assert isinstance(chosen(there, TRAIN, overdue=True), Waiting)


def test_everyone_evaluates_however_few_train():
    assert chosen(people("abcdef"), EVALUATE, max_silos=2) == Selection(tuple("abcdef"), needed=1)
    there = people("abcdef", "cd")
    absent = tuple((name, "not connected") for name in "abef")
    assert chosen(there, EVALUATE, max_silos=2) == Selection(("c", "d"), needed=1, absent=absent)


def test_at_most_max_silos_are_asked_and_all_of_them_needed():
    selection = chosen(people("abcdef"), max_silos=3)
    assert len(selection.asked) == selection.needed == 3
    assert list(selection.asked) == sorted(selection.asked)


def test_the_draw_is_that_of_seed_round_and_attempt():
    population = people("abcdefgh")
    draws = {
        (seed, number, attempt): chosen(population, draw=(seed, number, attempt), max_silos=3).asked
        for seed in range(5)
        for number in range(10)
        for attempt in range(2)
    }
    again = {key: chosen(population, draw=key, max_silos=3).asked for key in draws}
    assert draws == again
    assert len(set(draws.values())) > 30


def test_the_draw_never_changes_between_versions():
    assert chosen(people("abcdefgh"), draw=(7, 3, 0), max_silos=3).asked == ("a", "g", "h")


def test_everybody_is_drawn_about_equally_often():
    counts = dict.fromkeys("abcde", 0)
    for number in range(1000):
        for name in chosen(people("abcde"), draw=(1, number, 0), max_silos=2).asked:
            counts[name] += 1
    assert all(340 < count < 460 for count in counts.values())


def test_more_silos_are_asked_than_results_are_waited_for():
    assert chosen(people("abcdef"), max_silos=5, over_selection=3) == Selection(tuple("abcdef"), 5, enough=5)
    selection = chosen(people("abcdef"), max_silos=3, over_selection=1, min_results=2)
    assert (len(selection.asked), selection.needed, selection.enough) == (4, 2, 3)
    assert set(chosen(people("abcdef"), max_silos=3).asked) < set(selection.asked)
    assert chosen(people("abc"), max_silos=3, over_selection=2).enough == 3


def test_only_training_asks_more_silos_than_it_waits_for():
    assert chosen(people("abcd"), EVALUATE, max_silos=2, over_selection=1) == Selection(tuple("abcd"), 1)
    assert len(chosen(people("abcd"), INITIALIZE, max_silos=2, over_selection=1).asked) == 1


def test_silos_that_are_set_aside_are_left_out_and_named():
    assert chosen(people("abc"), aside="b", min_results=2) == Selection(("a", "c"), 2, (("b", "b failed"),))
    there = people("abcd", "abc")
    assert chosen(there, aside="b", min_results=2).absent == (("b", "b failed"), ("d", "not connected"))
    assert chosen(people("abc"), EVALUATE, aside="b", min_results=2).asked == ("a", "b", "c")


def test_silos_that_are_set_aside_are_asked_all_the_same_where_they_are_needed():
    assert chosen(people("abc"), aside="b", min_results=3) == Selection(("a", "b", "c"), 3)
    assert chosen(people("abc"), aside="ab", min_results=2) == Selection(("a", "b", "c"), 2)
    assert chosen(people("abc"), aside="b") == Selection(("a", "b", "c"), 3)


names = st.frozensets(st.sampled_from("abcdefg"), max_size=7)


@given(
    names,
    names,
    st.frozensets(st.sampled_from("abcdefg")),
    st.none() | st.integers(1, 3),
    st.none() | st.integers(3, 5),
    st.sampled_from(TaskKind),
)
def test_only_those_who_may_and_are_there_are_asked(known, available, named, needed, capacity, kind):
    silos = tuple(sorted(named)) if len(named) >= (needed or 0) else ()
    rounds = RoundsSpec(1, min_results=needed, max_silos=capacity, silos=silos)
    population = Population(known | available, available)
    wanted = set(silos) or set(population.known)
    selection = select(rounds, population, Occasion(kind, (1, 1, 0)))
    if isinstance(selection, Waiting):
        assert selection.message
        return
    assert set(selection.asked) <= wanted & available
    assert list(selection.asked) == sorted(set(selection.asked))
    most = {INITIALIZE: 1, TRAIN: capacity or 7, EVALUATE: 7}[kind]
    assert 1 <= selection.needed <= len(selection.asked) <= most
    assert dict(selection.absent) == dict.fromkeys(wanted - available, "not connected")
