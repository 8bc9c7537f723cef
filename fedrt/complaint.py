"""A trouble that goes on, told often enough to be seen and seldom enough to be read."""

import time
from collections.abc import Callable

REPEAT_INTERVAL = 300.0  # seconds


class Complaint:
    """Whether the log should hear of a trouble: when it begins, when its reason changes, and every five minutes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reason: str | None = None
        self._told = 0.0

    def is_due(self, reason: str) -> bool:
        """Whether to tell of it now; it counts as told then."""
        now = self._clock()
        if reason == self._reason and now - self._told < REPEAT_INTERVAL:
            return False
        self._reason, self._told = reason, now
        return True

    def end(self) -> bool:
        """The trouble is over; returns whether there was one."""
        was = self._reason is not None
        self._reason = None
        return was
