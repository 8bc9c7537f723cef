"""The coordinator's clock: it starts with the system's time and then runs evenly, whatever is done to that.

Deadlines are decided by it, so setting the system's clock forward or back by a day neither ends a round nor holds it
open. What is compared across a restart is told anew at the start: see `experiments.resume`.
"""

import time
from collections.abc import Callable

import structlog

JUMP = 60.0  # seconds by which the system's clock may differ before the operator is told


class SteadyClock:
    """Unix seconds that never jump. Logs a warning when the system's clock has been set."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._offset = wall() - monotonic()
        self._told = 0.0
        self._log = structlog.get_logger("coordinator")

    def __call__(self) -> float:
        """Seconds since 1970, as they were at the start, and the time that has passed since."""
        now = self._monotonic() + self._offset
        jump = self._wall() - now
        if abs(jump - self._told) >= JUMP:
            self._told = jump
            self._log.warning("the system's clock was set; deadlines go by elapsed time", ahead_seconds=round(jump))
        return now
