"""What the service manager is told of the session: ready with the first one, and since when there is none, and why."""

from collections.abc import Callable
from datetime import UTC, datetime

from fedrt.daemon import Lifecycle


def _now() -> datetime:
    return datetime.now(UTC)


class Presence:
    """Turns what becomes of a silo's sessions into the status of its service. The clock is for people to read only."""

    def __init__(self, lifecycle: Lifecycle, address: str, clock: Callable[[], datetime] = _now) -> None:
        self._lifecycle = lifecycle
        self._address = address
        self._clock = clock
        self._was_ready = False
        self._away: datetime | None = clock()

    def connected(self) -> None:
        """A session is open."""
        self._away = None
        if self._was_ready:
            self._lifecycle.status(f"connected to {self._address}")
        else:
            self._was_ready = True
            self._lifecycle.ready(f"connected to {self._address}")

    def disconnected(self, why: str) -> None:
        """A session, or an attempt at one, has ended."""
        if self._away is None:
            self._away = self._clock()
        self._lifecycle.status(f"not connected since {self._away:%Y-%m-%d %H:%M:%S} UTC: {why}")
