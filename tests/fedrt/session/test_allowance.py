"""The allowance of frames that nobody asked for: a burst, then a rate, and nothing saved up beyond the burst."""

import pytest

from fedrt.session.allowance import FRAME_BURST, FRAME_RATE, SESSION_COST, Allowance


def spent_at_once(allowance, now):
    count = 0
    while allowance.spend(now):
        count += 1
    return count


def test_a_burst_is_allowed_and_no_more():
    assert spent_at_once(Allowance(0.0), 0.0) == FRAME_BURST


def test_tokens_come_back_with_time_up_to_the_burst():
    allowance = Allowance(0.0)
    spent_at_once(allowance, 0.0)
    assert spent_at_once(allowance, 2.0) == 2 * FRAME_RATE
    assert spent_at_once(allowance, 1e9) == FRAME_BURST


def test_a_refused_cost_takes_nothing():
    allowance = Allowance(0.0, left=5.0)
    assert not allowance.spend(0.0, SESSION_COST)
    assert allowance.left == 5.0


def test_a_clock_that_stands_still_gives_nothing_and_one_set_back_takes_nothing():
    allowance = Allowance(10.0, left=3.0)
    assert allowance.spend(10.0)
    assert allowance.spend(9.0)
    assert allowance.left == 1.0


@pytest.mark.parametrize("heartbeats_per_second", [10])  # the shortest interval that may be set is 100 ms
def test_an_honest_silo_never_runs_out(heartbeats_per_second):
    progress_of_all_it_may_hold = 16
    assert heartbeats_per_second + progress_of_all_it_may_hold < FRAME_RATE
