"""What an operator of a chaos run sees: experiments and their events, followed over every death of the coordinator."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedrt.admin_client import AdminClient, LocalSocket, connect
from fedrt.errors import FedrtError, SpecError
from fedrt.spec import ExperimentSpec
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import experiment_pb2
from tests.chaos.experiments import Measured

State = experiment_pb2.Experiment
RETRY_DELAY = 0.1  # seconds
ANSWER_LIMIT = 30.0  # seconds until a question is asked again


@dataclass
class History:
    """What is known of one experiment."""

    name: str
    spec_name: str
    spec: ExperimentSpec
    create_time: float
    is_doomed: bool = False  # it will be cancelled
    created: bool = False
    state: int = 0
    message: str = ""
    end_time: float | None = None
    event_times: list[float] = field(default_factory=list)
    rounds: dict[tuple[int, int], dict[str, Measured]] = field(default_factory=dict)
    attempts: int = 0  # rounds that were tried again
    twice: list[str] = field(default_factory=list)  # rounds that succeeded more than once
    lines: list[str] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self.end_time is not None


class Watcher:
    """Follows all events. `news` is rung and replaced with each one; `last_news` is when an experiment moved."""

    def __init__(self, socket: Path) -> None:
        self._target = LocalSocket(socket)
        self.histories: dict[str, History] = {}
        self.connected: set[str] = set()  # silos
        self.last_news = time.monotonic()
        self.news = asyncio.Event()
        self._last_number = 0

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                async with connect(self._target) as client:
                    async for event in client.watch("", after=self._last_number):
                        self._take(event)
            except FedrtError:
                await asyncio.sleep(RETRY_DELAY)

    async def until(self, condition: Callable[[], bool], patience: float) -> bool:
        """Wait until the events say so; false if no experiment has moved for that many seconds meanwhile."""
        self.last_news = time.monotonic()
        while not condition():
            try:
                async with asyncio.timeout(1.0):
                    await self.news.wait()
            except TimeoutError:
                if time.monotonic() - self.last_news > patience:
                    return False
        return True

    async def ask(self, question: Callable[[AdminClient], "asyncio.Future[object]"]) -> object:
        """The answer to a request, asked again until the coordinator gives one. Raises `SpecError`."""
        while True:
            try:
                async with asyncio.timeout(ANSWER_LIMIT), connect(self._target) as client:
                    return await question(client)
            except SpecError:
                raise
            except (FedrtError, TimeoutError):
                await asyncio.sleep(RETRY_DELAY)

    def _take(self, event: pb.Event) -> None:
        self._last_number = event.event_number
        instant = event.event_time.ToMicroseconds() / 1e6
        match event.WhichOneof("kind"):
            case "experiment_changed":
                self._changed(event.experiment_changed.experiment, instant)
            case "round_closed":
                self._closed(event.round_closed, instant)
            case "silo_changed":
                silo = event.silo_changed.silo
                (self.connected.add if silo.connected else self.connected.discard)(silo.silo_id)
        if event.WhichOneof("kind") != "silo_changed":  # a silo that comes and goes for ever is no progress
            self.last_news = time.monotonic()
        self.news.set()
        self.news = asyncio.Event()

    def _changed(self, experiment: State, instant: float) -> None:
        history = self.histories.get(experiment.experiment_id)
        if history is None:
            return
        history.state, history.message = experiment.state, experiment.status_message
        history.event_times.append(instant)
        name = State.State.Name(experiment.state)
        history.lines.append(f"{instant:.3f} {name} round {experiment.round_number} {experiment.status_message}")
        if experiment.state in (State.STATE_SUCCEEDED, State.STATE_FAILED, State.STATE_CANCELLED):
            history.end_time = instant

    def _closed(self, closed: pb.RoundClosed, instant: float) -> None:
        history = self.histories.get(closed.experiment_id)
        if history is None:
            return
        history.event_times.append(instant)
        place = (closed.task_kind, closed.round_number)
        absent = "; ".join(f"{absence.silo_id}: {absence.message}" for absence in closed.absences)
        history.lines.append(f"{instant:.3f} round {place} {'ok' if closed.succeeded else 'failed'} {absent}")
        if not closed.succeeded:
            history.attempts += 1
            return
        if place in history.rounds:
            history.twice.append(str(place))
        history.rounds[place] = {
            one.silo_id: (one.example_count, tuple(sorted(one.metrics.items()))) for one in closed.contributions
        }
