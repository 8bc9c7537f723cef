"""How silos that are cut off together return: soon, and not together."""

import random
from collections import Counter

from silo.backoff import Backoff
from silo.config import ReconnectSection


def test_the_ceiling_doubles_up_to_the_maximum_and_a_session_resets_it() -> None:
    class Highest(random.Random):
        def uniform(self, a: float, b: float) -> float:
            assert a == 0.0
            return b

    backoff = Backoff(1.0, 10.0, Highest())
    assert [backoff.next_wait() for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    backoff.reset()
    assert backoff.next_wait() == 1


def test_a_silo_is_back_within_seconds_of_an_outage_by_default() -> None:
    assert ReconnectSection().max == 10
    assert ReconnectSection().initial == 1


def test_a_thousand_silos_do_not_return_at_once() -> None:
    """All are cut off at once, for an hour; none dials in step with another, so the dials are spread evenly."""
    source = random.Random(5)
    times = []
    for _ in range(1000):
        backoff, now = Backoff(1.0, 10.0, source), 0.0
        while now < 3600:  # dialling itself takes no time here, the least favourable case
            now += backoff.next_wait()
        times.append(now - 3600)
    assert min(times) >= 0
    assert max(times) <= 10
    seconds = Counter(int(time) for time in times)
    assert max(seconds.values()) < 260  # the time to the end of a uniform wait: 200 in the first second are expected
    assert len({round(time, 3) for time in times}) > 900


def test_the_first_wait_is_spread_over_the_whole_second() -> None:
    source = random.Random(5)
    tenths = Counter(int(10 * Backoff(1.0, 10.0, source).next_wait()) for _ in range(1000))
    assert len(tenths) == 10
    assert all(60 < count < 140 for count in tenths.values())
