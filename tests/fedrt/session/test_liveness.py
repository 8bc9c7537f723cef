"""Heartbeats and silence as functions of the last frames' times."""

from hypothesis import given
from hypothesis import strategies as st

from fedrt.session.liveness import Liveness


def quiet_since(last_sent, last_heard):
    return Liveness(heartbeat_interval=5.0, silence_limit=15.0, last_sent=last_sent, last_heard=last_heard)


def test_a_heartbeat_is_due_after_an_interval_without_frames_of_ours():
    liveness = quiet_since(100.0, 100.0)
    assert not liveness.heartbeat_due(104.9)
    assert liveness.heartbeat_due(105.0)
    liveness.sent(105.0)
    assert not liveness.heartbeat_due(109.9)


def test_silence_ends_a_session_when_nothing_was_heard_for_the_limit():
    liveness = quiet_since(100.0, 100.0)
    assert not liveness.is_silent(114.9)
    assert liveness.is_silent(115.0)
    liveness.heard(114.9)
    assert not liveness.is_silent(115.0)


def test_sending_is_no_sign_of_the_peer_and_hearing_no_frame_of_ours():
    liveness = quiet_since(100.0, 100.0)
    liveness.sent(114.0)
    assert liveness.is_silent(115.0)
    liveness.heard(119.0)
    assert liveness.heartbeat_due(119.0)


times = st.floats(0, 1000)


@given(times, times, times)
def test_nothing_changes_before_the_next_check_and_something_does_then(last_sent, last_heard, now):
    liveness = quiet_since(last_sent, last_heard)
    check = liveness.next_check()
    assert (liveness.heartbeat_due(now) or liveness.is_silent(now)) == (now >= check)
