"""An experiment as a pure machine: a sequence of stages, each one round, until it succeeds, fails or is cancelled.

Rules of the file:
* `step` decides; the driver stores the returned experiment in one transaction, then performs the effects, in order.
* Stages: INITIALIZE (only if a silo must compute the initial tensors), EVALUATE before the first round, then per round
  TRAIN and, when due, EVALUATE. A stage waits in `round is None` until enough silos are connected; an EVALUATE no
  longer than a round's time limit, if at least one is there.

    PENDING --first stage begins--> RUNNING --last stage closed--> SUCCEEDED
       |                              |---- a round failed, no retries left --> FAILED
       +------------ order -----------+---- order --> CANCELLED
"""

import enum
import hashlib
from dataclasses import dataclass, replace

from coordinator import rounds
from coordinator.rounds import Ask, AskState, Effects, Offer, Round, RoundEvent, RoundPhase, Withdrawn
from coordinator.selection import Population, Selection, Waiting, select
from fedrt.spec import ExperimentSpec, OnTooFew
from fedrt.task import TaskKind
from fedrt.tensors import Scope, needs_clip, of_scope


class ExperimentState(enum.Enum):
    """How an experiment stands."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self in (ExperimentState.SUCCEEDED, ExperimentState.FAILED, ExperimentState.CANCELLED)


@dataclass(frozen=True)
class Stage:
    """What comes next: a round of this kind and number. `attempt` counts from 0.

    `kept` are the results that an earlier attempt got: they count, and their silos are not asked again. So each silo
    contributes once to a round, and its private tensors advance once.
    """

    kind: TaskKind
    number: int
    attempt: int = 0
    kept: tuple[Ask, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """Everything the federation has decided about one run. `round` is None between stages, since `stage_time`."""

    experiment_id: str
    spec: ExperimentSpec
    schema_sha256: str  # hex
    create_time: float
    stage: Stage
    stage_time: float
    shares: bool = True  # whether the method has shared tensors
    state: ExperimentState = ExperimentState.PENDING
    message: str = ""
    round: Round | None = None
    end_time: float | None = None


@dataclass(frozen=True)
class CancelOrdered:
    """An operator wants the experiment to end."""


@dataclass(frozen=True)
class SilosChanged:
    """Silos came or went; a stage that waited may begin."""


ExperimentEvent = RoundEvent | CancelOrdered | SilosChanged


@dataclass(frozen=True)
class CloseRound:
    """Record what became of a round."""

    round: Round


ExperimentEffects = tuple[rounds.RoundEffect | CloseRound, ...]


def create(experiment_id: str, spec: ExperimentSpec, schema_sha256: str, now: float) -> Experiment:
    """A new experiment, before its first stage. Raises `SpecError` if its method cannot be built."""
    specs = spec.local.tensors()
    if needs_clip(of_scope(specs, Scope.SHARED)):
        first = Stage(TaskKind.INITIALIZE, 0)
    elif spec.evaluation.every or not spec.rounds.count:
        first = Stage(TaskKind.EVALUATE, 0)
    else:
        first = Stage(TaskKind.TRAIN, 1)
    return Experiment(experiment_id, spec, schema_sha256, now, first, now, bool(of_scope(specs, Scope.SHARED)))


def next_stage(spec: ExperimentSpec, stage: Stage) -> Stage | None:
    """What follows a stage that succeeded; None after the last."""
    every, count = spec.evaluation.every, spec.rounds.count
    if stage.kind is TaskKind.INITIALIZE and (every or not count):
        return Stage(TaskKind.EVALUATE, 0)
    evaluation_due = stage.number == count or (every and stage.number % every == 0)
    if stage.kind is TaskKind.TRAIN and evaluation_due:
        return Stage(TaskKind.EVALUATE, stage.number)
    return Stage(TaskKind.TRAIN, stage.number + 1) if stage.number < count else None


def step(
    experiment: Experiment, event: ExperimentEvent, population: Population, now: float
) -> tuple[Experiment, ExperimentEffects]:
    """The next experiment and what is to be done, after it is durable."""
    if experiment.state.has_ended:
        return experiment, ()
    match event:
        case CancelOrdered():
            return _end(experiment, ExperimentState.CANCELLED, "cancelled by an operator", now)
        case SilosChanged():
            return _begin_stage(experiment, population, now)
        case rounds.Tick() if experiment.round is None:
            return _begin_stage(experiment, population, now)
        case _:
            if experiment.round is None:
                return experiment, ()
            round_, effects = rounds.step(experiment.round, event, now)
            moved, more = _after_round(replace(experiment, round=round_), population, now)
            return moved, (*effects, *more)


def next_tick(experiment: Experiment) -> float | None:
    """When `Tick` can next change anything."""
    if experiment.round is not None:
        return rounds.next_tick(experiment.round)
    return experiment.stage_time + experiment.spec.rounds.time_limit


def offers_on_connect(experiment: Experiment, silo_id: str, held: frozenset[str]) -> Effects:
    """What to offer a silo that has just connected: its open asks, less what it already holds."""
    if experiment.round is None or experiment.round.phase is not RoundPhase.COLLECTING:
        return ()
    return tuple(
        Offer(silo_id, ask.task_id)
        for ask in experiment.round.asks
        if ask.silo_id == silo_id and ask.state is AskState.OFFERED and ask.task_id not in held
    )


def task_seed(experiment: Experiment, round_: Round, silo_id: str) -> int:
    """63 bits that depend on the experiment's seed, the round, the silo and the kind of work only.

    Initial tensors do not depend on the silo that computes them.
    """
    where = "" if round_.kind is TaskKind.INITIALIZE else silo_id
    text = f"{experiment.spec.seed}/{round_.number}/{where}/{round_.kind.value}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def task_id_of(experiment_id: str, stage: Stage, silo_id: str) -> str:
    """Unique in the federation: experiment ids are never used twice."""
    retry = f"-{stage.attempt}" if stage.attempt else ""
    return f"{experiment_id}/{stage.number}/{stage.kind.value}{retry}/{silo_id}"


def _begin_stage(experiment: Experiment, population: Population, now: float) -> tuple[Experiment, ExperimentEffects]:
    if experiment.round is not None:
        return experiment, ()
    spec, stage = experiment.spec, experiment.stage
    kept = frozenset(ask.silo_id for ask in stage.kept)
    there = Population(population.known, population.available | kept)  # a result that is here needs no connection
    draw = (spec.seed, stage.number, stage.attempt)
    match select(spec.rounds, there, stage.kind, draw, now >= experiment.stage_time + spec.rounds.time_limit):
        case Waiting(message):
            return replace(experiment, message=message), ()
        case Selection(asked, needed, absent):
            new = [name for name in asked if name not in kept][: len(asked) - len(kept)]
            asks = tuple(Ask(name, task_id_of(experiment.experiment_id, stage, name)) for name in new)
            round_ = Round(
                number=stage.number,
                kind=stage.kind,
                attempt=stage.attempt,
                asks=(*stage.kept, *asks),
                needed=needed,
                begin_time=now,
                deadline=now + spec.rounds.time_limit,
                aggregates=stage.kind is not TaskKind.EVALUATE and experiment.shares,
                absent=absent,
            )
            begun = replace(experiment, state=ExperimentState.RUNNING, message="", round=round_)
            return begun, tuple(Offer(ask.silo_id, ask.task_id) for ask in asks)


def _after_round(experiment: Experiment, population: Population, now: float) -> tuple[Experiment, ExperimentEffects]:
    round_ = experiment.round
    if round_ is None or round_.phase is not RoundPhase.CLOSED:
        return experiment, ()
    closed = CloseRound(round_)
    if not round_.succeeded:
        stage, message = _stage_after_failure(experiment, round_)
        if stage is None:
            failed, effects = _end(replace(experiment, round=None), ExperimentState.FAILED, message, now)
            return failed, (closed, *effects)
    else:
        stage = next_stage(experiment.spec, experiment.stage)
        if stage is None:
            done, effects = _end(replace(experiment, round=None), ExperimentState.SUCCEEDED, "", now)
            return done, (closed, *effects)
    begun, effects = _begin_stage(replace(experiment, round=None, stage=stage, stage_time=now), population, now)
    return begun, (closed, *effects)


def _stage_after_failure(experiment: Experiment, round_: Round) -> tuple[Stage | None, str]:
    what = f"round {round_.number} ({round_.kind.value})"
    if round_.message:  # not for want of results: another attempt would end in the same way
        return None, f"{what}: {round_.message}"
    policy = experiment.spec.rounds
    if policy.on_too_few is OnTooFew.RETRY and round_.attempt < policy.retries:
        kept = tuple(ask for ask in round_.asks if ask.state is AskState.RETURNED)
        return replace(experiment.stage, attempt=round_.attempt + 1, kept=kept), ""
    returned = sum(ask.state is AskState.RETURNED for ask in round_.asks)
    reasons = "; ".join(f"{silo}: {why}" for silo, why in rounds.absentees(round_))
    return None, f"{what} got {returned} of the {round_.needed} results it needs: {reasons}"


def _end(
    experiment: Experiment, state: ExperimentState, message: str, now: float
) -> tuple[Experiment, ExperimentEffects]:
    effects: ExperimentEffects = ()
    if experiment.round is not None:
        round_, cancels = rounds.step(experiment.round, Withdrawn(message), now)
        effects = (*cancels, CloseRound(round_))
    return replace(experiment, state=state, message=message, round=None, end_time=now), effects
