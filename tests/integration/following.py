"""Waiting for what the federation does, by its stream of events; nothing is polled."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import experiment_pb2
from fedrt.v1 import task_pb2 as task_pb
from tests.fakes.federation import Federation

TRAIN, EVALUATE, INITIALIZE = task_pb.TASK_KIND_TRAIN, task_pb.TASK_KIND_EVALUATE, task_pb.TASK_KIND_INITIALIZE
State = experiment_pb2.Experiment
Predicate = Callable[[pb.Event], bool]


@dataclass
class Watch:
    """Reads the events from where it stands; survives a restart of the coordinator."""

    federation: Federation
    number: int = 0

    async def until(self, wanted: Predicate, limit: float = 45) -> pb.Event:
        """The next event that is wanted."""
        async with asyncio.timeout(limit), contextlib.aclosing(self.federation.events(after=self.number)) as events:
            async for event in events:
                self.number = event.event_number
                if wanted(event):
                    return event
        raise AssertionError("the stream of events ended")


def connected(name: str) -> Predicate:
    return lambda event: (
        event.HasField("silo_changed")
        and event.silo_changed.silo.silo_id == name
        and event.silo_changed.silo.connected
        and event.silo_changed.silo.state == experiment_pb2.Silo.STATE_ACTIVE
    )


def gone(name: str) -> Predicate:
    return lambda event: (
        event.HasField("silo_changed")
        and event.silo_changed.silo.silo_id == name
        and not event.silo_changed.silo.connected
    )


def draining(name: str) -> Predicate:
    return lambda event: (
        event.HasField("silo_changed")
        and event.silo_changed.silo.silo_id == name
        and event.silo_changed.silo.state == experiment_pb2.Silo.STATE_DRAINING
    )


def closed(number: int, kind: int = TRAIN) -> Predicate:
    return lambda event: (
        event.HasField("round_closed")
        and event.round_closed.round_number == number
        and event.round_closed.task_kind == kind
    )


def waiting(text: str) -> Predicate:
    return lambda event: (
        event.HasField("experiment_changed") and text in event.experiment_changed.experiment.status_message
    )


def contributors(round_closed: pb.RoundClosed) -> list[str]:
    return [part.silo_id for part in round_closed.contributions]


def absences(round_closed: pb.RoundClosed) -> dict[str, str]:
    return {absence.silo_id: absence.message for absence in round_closed.absences}
