"""What the service manager hears of a silo's sessions, and what the log hears of a trouble that goes on."""

from datetime import UTC, datetime, timedelta

from fedrt.complaint import REPEAT_INTERVAL, Complaint
from fedrt.daemon import Lifecycle
from silo.presence import Presence


class Told(Lifecycle):
    """Notes what the service manager is told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def ready(self, status: str) -> None:
        self.said.append(f"ready: {status}")

    def status(self, text: str) -> None:
        self.said.append(text)


def test_it_is_ready_with_the_first_session_only_and_says_since_when_there_is_none() -> None:
    told, now = Told(), datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
    presence = Presence(told, "fed:7443", lambda: now)
    now += timedelta(seconds=5)
    presence.disconnected("nothing listens there")
    assert told.said == ["not connected since 2026-11-20 12:00:00 UTC: nothing listens there"]
    presence.connected()
    now += timedelta(hours=1)
    presence.disconnected("nothing was heard for 5 seconds")
    now += timedelta(hours=1)
    presence.disconnected("the coordinator does not answer")
    presence.connected()
    assert told.said[1:] == [
        "ready: connected to fed:7443",
        "not connected since 2026-11-20 13:00:05 UTC: nothing was heard for 5 seconds",
        "not connected since 2026-11-20 13:00:05 UTC: the coordinator does not answer",
        "connected to fed:7443",
    ]


def test_a_trouble_is_told_when_it_begins_when_it_changes_and_every_five_minutes() -> None:
    now = 0.0
    complaint = Complaint(lambda: now)
    assert not complaint.end()
    assert complaint.is_due("full")
    assert not complaint.is_due("full")
    assert complaint.is_due("read-only")
    now = REPEAT_INTERVAL - 1
    assert not complaint.is_due("read-only")
    now = REPEAT_INTERVAL
    assert complaint.is_due("read-only")
    assert not complaint.is_due("read-only")
    assert complaint.end()
    assert not complaint.end()
    assert complaint.is_due("read-only")
