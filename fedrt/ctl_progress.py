"""What an experiment's events add up to: a pure fold, from which every display of a running experiment is made.

Rules of the file: no clock, no I/O; `now` is an argument. Repeated events are ignored, so a stream may be read again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fedrt.spec import ExperimentSpec
from fedrt.task import TaskKind
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import experiment_pb2 as experiment_pb
from fedrt.wire_values import KIND, duration_from_pb, time_from_pb

ENDED = frozenset({"succeeded", "failed", "cancelled"})
AVERAGED_ROUNDS = 5  # the latest rounds, from which the time of the coming ones is estimated


@dataclass(frozen=True)
class Plan:
    """What the specification promises. `silos` is empty if all may take part; `every` is 0 for a final evaluation."""

    experiment_id: str
    method: str
    class_count: int
    round_count: int
    every: int
    silos: tuple[str, ...] = ()

    @property
    def evaluations(self) -> frozenset[int]:
        """The rounds after which the silos evaluate; 0 is before the first."""
        step = self.every or max(1, self.round_count)
        due = {*range(step, self.round_count + 1, step), self.round_count}
        return frozenset(due | {0} if self.every else due)


@dataclass(frozen=True)
class Measured:
    """What one silo contributed to one round."""

    example_count: int
    metrics: Mapping[str, float]
    work_duration: float
    byte_count: int


@dataclass(frozen=True)
class ClosedRound:
    """A round that has ended; `absent` says of each silo whose result did not count, why."""

    number: int
    kind: TaskKind
    succeeded: bool
    duration: float
    metrics: Mapping[str, float]
    silos: Mapping[str, Measured]
    absent: Mapping[str, str]


@dataclass(frozen=True)
class SiloStanding:
    """A silo as the coordinator sees it; `tasks` are those that await a result."""

    name: str
    connected: bool
    draining: bool
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class WatchState:
    """An experiment after some of its events. Times are Unix seconds, as the coordinator's clock shows them."""

    plan: Plan
    state: str = "pending"
    message: str = ""
    kind: TaskKind = TaskKind.EVALUATE
    number: int = 0
    stage_time: float | None = None
    first_time: float | None = None
    end_time: float | None = None
    rounds: tuple[ClosedRound, ...] = ()
    event_number: int = 0
    silos: Mapping[str, SiloStanding] = field(default_factory=dict)

    def step(self, event: pb.Event) -> "WatchState":
        """The state after one more event; events of other experiments are passed over."""
        if event.event_number <= self.event_number:
            return self
        time = time_from_pb(event.event_time)
        seen = replace(self, event_number=event.event_number)
        match event.WhichOneof("kind"):
            case "experiment_changed" if event.experiment_changed.experiment.experiment_id == self.plan.experiment_id:
                return seen._changed(event.experiment_changed.experiment, time)
            case "round_closed" if event.round_closed.experiment_id == self.plan.experiment_id:
                return replace(seen, rounds=(*self.rounds, closed_round(event.round_closed)))
            case "silo_changed":
                return seen.with_silos([event.silo_changed.silo])
            case _:
                return seen

    def with_silos(self, silos: Iterable[experiment_pb.Silo]) -> "WatchState":
        """The state with what is now known of these silos."""
        known = dict(self.silos)
        for silo in silos:
            draining = silo.state == experiment_pb.Silo.STATE_DRAINING
            known[silo.silo_id] = SiloStanding(silo.silo_id, silo.connected, draining, tuple(silo.open_task_ids))
        return replace(self, silos=known)

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self.state in ENDED

    @property
    def succeeded(self) -> bool:
        """Whether it ended as planned."""
        return self.state == "succeeded"

    @property
    def members(self) -> tuple[str, ...]:
        """The silos to show: those that the plan names, else all known ones and all that ever contributed, by name."""
        contributed = {name for closed in self.rounds for name in (*closed.silos, *closed.absent)}
        return self.plan.silos or tuple(sorted({*self.silos, *contributed}))

    def finished(self, kind: TaskKind) -> tuple[ClosedRound, ...]:
        """The rounds of this kind that succeeded, oldest first."""
        return tuple(closed for closed in self.rounds if closed.kind is kind and closed.succeeded)

    def series(self, kind: TaskKind, metric: str, silo: str | None = None) -> tuple[tuple[int, float], ...]:
        """(round, value) of a metric in the rounds of this kind: of one silo, or the mean over examples."""
        found = []
        for closed in self.finished(kind):
            metrics = closed.metrics if silo is None else _metrics_of(closed, silo)
            if metric in metrics:
                found.append((closed.number, metrics[metric]))
        return tuple(found)

    def doing(self, silo: str) -> str:
        """What a silo does, in a few words."""
        standing = self.silos.get(silo)
        if standing is None:
            return "not seen"
        if any(not task.startswith(f"{self.plan.experiment_id}/") for task in standing.tasks):
            return "other work"
        if self.has_ended:
            return "idle"
        if standing.tasks:
            return _WORK[self.kind]
        return "stopping" if standing.draining else "waits"

    def time_left(self, now: float) -> float | None:
        """Seconds until the end if the coming rounds take as long as the latest ones; None before one has finished.

        The first round of a kind reads images and warms caches, so it counts only as long as there is no other. An
        evaluation that was never measured is taken to last as long as a training round.
        """
        training = _mean_duration(self.finished(TaskKind.TRAIN))
        evaluating = _mean_duration(self.finished(TaskKind.EVALUATE))
        trained = {closed.number for closed in self.finished(TaskKind.TRAIN)}
        evaluated = {closed.number for closed in self.finished(TaskKind.EVALUATE)}
        left = 0.0
        for count, duration in (
            (self.plan.round_count - len(trained), training),
            (len(self.plan.evaluations - evaluated), evaluating if evaluating is not None else training),
        ):
            if count > 0 and duration is None:
                return None
            left += count * (duration or 0.0)
        current = training if self.kind is TaskKind.TRAIN else evaluating
        if self.stage_time is not None and current is not None and not self.has_ended:
            left -= min(max(0.0, now - self.stage_time), current)
        return max(0.0, left)

    def elapsed(self, now: float) -> float:
        """Seconds since the first event, until the end."""
        return 0.0 if self.first_time is None else max(0.0, (self.end_time or now) - self.first_time)

    def _changed(self, experiment: experiment_pb.Experiment, time: float) -> "WatchState":
        kind = KIND.back(TaskKind, experiment.current_task_kind)
        moved = (kind, experiment.round_number) != (self.kind, self.number) or self.stage_time is None
        return replace(
            self,
            state=state_name(experiment.state),
            message=experiment.status_message,
            kind=kind,
            number=experiment.round_number,
            stage_time=time if moved else self.stage_time,
            first_time=self.first_time if self.first_time is not None else time,
            end_time=time_from_pb(experiment.end_time) if experiment.HasField("end_time") else None,
        )


def plan_of(experiment_id: str, spec: ExperimentSpec) -> Plan:
    """The plan that a specification makes."""
    local, rounds = spec.local, spec.rounds
    every = spec.evaluation.every
    return Plan(experiment_id, local.method_name, len(local.classes), rounds.count, every, rounds.silos)


def closed_round(message: pb.RoundClosed) -> ClosedRound:
    """The value of a message."""
    silos = {
        part.silo_id: Measured(
            part.example_count, dict(part.metrics), duration_from_pb(part.work_duration), part.payload_byte_count
        )
        for part in message.contributions
    }
    return ClosedRound(
        number=message.round_number,
        kind=KIND.back(TaskKind, message.task_kind),
        succeeded=message.succeeded,
        duration=duration_from_pb(message.duration),
        metrics=dict(message.metrics),
        silos=silos,
        absent={absence.silo_id: absence.message for absence in message.absences},
    )


def state_name(number: int) -> str:
    """An experiment's state as operators write it: "running"."""
    return experiment_pb.Experiment.State.Name(number).removeprefix("STATE_").lower()  # type: ignore[arg-type]


def _metrics_of(closed: ClosedRound, silo: str) -> Mapping[str, float]:
    return closed.silos[silo].metrics if silo in closed.silos else {}


def _mean_duration(rounds: tuple[ClosedRound, ...]) -> float | None:
    latest = (rounds[1:] or rounds)[-AVERAGED_ROUNDS:]
    return sum(closed.duration for closed in latest) / len(latest) if latest else None


_WORK = {TaskKind.INITIALIZE: "initializes", TaskKind.TRAIN: "trains", TaskKind.EVALUATE: "evaluates"}
