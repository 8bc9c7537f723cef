"""How long to wait before dialling again, so that many silos that were cut off together do not return together."""

import random


class Backoff:
    """Waits with full jitter: anywhere from 0 to a ceiling, which doubles from `initial` to `maximum` seconds."""

    def __init__(self, initial: float, maximum: float, source: random.Random) -> None:
        self._initial = initial
        self._maximum = maximum
        self._random = source
        self._ceiling = initial

    def next_wait(self) -> float:
        """Seconds to wait now; the next wait may be twice as long."""
        wait = self._random.uniform(0.0, self._ceiling)
        self._ceiling = min(2 * self._ceiling, self._maximum)
        return wait

    def reset(self) -> None:
        """A session was open: begin with `initial` again."""
        self._ceiling = self._initial
