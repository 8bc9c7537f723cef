from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fedrt.metrics import SiloMetrics
from fedrt.session.connection import Role
from fedrt.session.frames import MAX_TEXT_LENGTH, Hello, UnreadableOffer, Welcome
from fedrt.task import RefusalReason
from fedrt.tls import IdentityFiles, explain_handshake_failure
from fedrt.transport import Transport
from silo.dialling import ANSWER_LIMIT, DIAL_OPTIONS
from silo.link import CoordinatorSession, explain_lost_session


class Silent:
    """A stream on which nothing ever happens."""

    async def read(self) -> Any:
        raise AssertionError

    async def write(self, message: Any, /) -> None:
        raise AssertionError


class Deaf:
    """An agent that ignores what it is told."""

    def submit(self, message: object) -> None:
        pass


def test_an_offer_that_cannot_be_read_is_refused_however_long_its_fault_is():
    transport = Transport(Role.SILO, Silent())
    session = CoordinatorSession(transport, Deaf(), SiloMetrics(CollectorRegistry()))
    transport.post(Hello("1"))
    transport.connection.receive(Welcome("s", 1.0, 2.0))
    for task_id, fault in (("t1", "short"), ("t2", "x" * MAX_TEXT_LENGTH)):
        offer = UnreadableOffer(task_id, fault)
        transport.connection.receive(offer)
        session.on_frame(offer)
    refusals = list(transport._frames)[1:]
    assert [(reply.task_id, reply.refusal) for reply in refusals] == [
        ("t1", RefusalReason.METHOD_MISMATCH),
        ("t2", RefusalReason.METHOD_MISMATCH),
    ]
    assert refusals[0].message == "this silo's fedrt cannot read the offer: short"


def test_an_attempt_to_connect_does_not_outlive_the_dial_that_made_it():
    """gRPC does not end it when its channel is closed, so many would pile up during an outage."""
    assert 0 < dict(DIAL_OPTIONS)["grpc.min_reconnect_backoff_ms"] < 1000 * ANSWER_LIMIT


@pytest.mark.parametrize("details", ["tcp handshaker shutdown", "Handshake read failed (Endpoint closing)"])
def test_an_attempt_that_grpc_gives_up_is_a_coordinator_that_does_not_answer(tmp_path: Path, details: str):
    said = explain_handshake_failure(IdentityFiles(tmp_path), f"last error: UNKNOWN: {details}", datetime.now(UTC))
    assert said.startswith("the coordinator does not answer; check the network")


@pytest.mark.parametrize("details", ["Stream removed (Socket closed)", "recvmsg:Connection reset by peer"])
def test_a_connection_that_broke_is_told_in_words(details: str):
    why = explain_lost_session(details)
    assert why.startswith(f"the connection broke ({details}): the coordinator has stopped or the network failed")


def test_what_the_coordinator_says_is_passed_on_as_it_is():
    assert explain_lost_session("the coordinator is full; dial later") == "the coordinator is full; dial later"
