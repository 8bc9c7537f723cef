"""When to send a heartbeat and when silence ends a session: pure functions of the last frames' times."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Intervals:
    """Seconds: how often to be heard at least, and after how much silence a session ends."""

    heartbeat: float
    silence: float


@dataclass
class Liveness:
    """Times are seconds of one monotonic clock."""

    heartbeat_interval: float
    silence_limit: float
    last_sent: float
    last_heard: float

    def sent(self, now: float) -> None:
        """A frame of ours left."""
        self.last_sent = now

    def heard(self, now: float) -> None:
        """A frame of the peer arrived."""
        self.last_heard = now

    def heartbeat_due(self, now: float) -> bool:
        """Whether we have been silent for the interval."""
        return now >= self.last_sent + self.heartbeat_interval

    def is_silent(self, now: float) -> bool:
        """Whether the peer has been silent for longer than allowed."""
        return now >= self.last_heard + self.silence_limit

    def next_check(self) -> float:
        """When one of the two can next become true."""
        return min(self.last_sent + self.heartbeat_interval, self.last_heard + self.silence_limit)
