"""The coordinator's clock goes on evenly whatever is done to the system's."""

import structlog

from coordinator.clock import SteadyClock


class Times:
    def __init__(self):
        self.wall, self.monotonic = 1_000_000.0, 50.0

    def pass_by(self, seconds, jump=0.0):
        self.wall += seconds + jump
        self.monotonic += seconds


def test_it_starts_with_the_system_and_ignores_every_jump():
    times = Times()
    clock = SteadyClock(lambda: times.wall, lambda: times.monotonic)
    assert clock() == 1_000_000.0
    times.pass_by(10.0, jump=86_400.0)
    assert clock() == 1_000_010.0
    times.pass_by(10.0, jump=-2 * 86_400.0)
    assert clock() == 1_000_020.0


def test_the_operator_is_told_once_for_each_jump():
    times = Times()
    clock = SteadyClock(lambda: times.wall, lambda: times.monotonic)
    with structlog.testing.capture_logs() as logs:
        for jump in (0.0, 5.0, 86_400.0, 0.0, 1.0, -86_406.0, 0.0):
            times.pass_by(1.0, jump)
            clock()
    assert [entry["ahead_seconds"] for entry in logs] == [86_405, 0]
    assert "the system's clock was set" in logs[0]["event"]
