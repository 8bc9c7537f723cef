"""How many frames nobody asked for a peer may send: a bucket of tokens that fills again with time. Pure.

Replies, results and chunks answer something and are bounded by it. Heartbeats, progress, frames of a later version and
chunks far smaller than they could be are not: they cost little each, and a flood of them would starve everyone else.
"""

from dataclasses import dataclass

FRAME_RATE = 100.0  # tokens a second; heartbeats and progress of an honest peer need about two
FRAME_BURST = 10_000.0  # an honest peer that was held back has at most so many frames waiting to be read
SESSION_COST = 20.0  # tokens for opening a session: a handshake, and messages for the orchestrator


@dataclass
class Allowance:
    """Times are seconds of one monotonic clock; `since` is when `left` was true."""

    since: float
    left: float = FRAME_BURST
    rate: float = FRAME_RATE
    burst: float = FRAME_BURST

    def spend(self, now: float, cost: float = 1.0) -> bool:
        """Take the tokens; False, and nothing is taken, if there are too few."""
        self.left = min(self.burst, self.left + self.rate * max(0.0, now - self.since))
        self.since = now
        if self.left < cost:
            return False
        self.left -= cost
        return True
