"""An experiment as a pure machine: a sequence of stages, each one round, until it succeeds, fails or is cancelled.

Rules of the file:
* `step` decides; the driver stores the returned experiment in one transaction, then performs the effects, in order.
* Stages: INITIALIZE (only if a silo must compute the initial tensors), EVALUATE before the first round, then per round
  TRAIN and, when due, EVALUATE. A stage waits in `round is None` until enough silos are connected; an EVALUATE no
  longer than a round's time limit, if at least one is there.
* A round with too few results is tried again. The next attempt keeps the results that are here and the tasks that are
  still open, and asks anew only those who failed: at once, and after further failures with ever longer pauses. An
  attempt that lacked silos because they were not connected uses up no retry, however long they stay away.

    PENDING --first stage begins--> RUNNING --last stage closed--> SUCCEEDED
       |                              |---- a round failed, no retries left --> FAILED
       +------------ order -----------+---- order --> CANCELLED
"""

import enum
import hashlib
from dataclasses import dataclass, replace

from coordinator import conduct, rounds
from coordinator.conduct import Conducts, SetAside
from coordinator.rounds import Ask, AskState, Cancel, Effects, Offer, Round, RoundEvent, RoundPhase, Withdrawn
from coordinator.selection import Occasion, Population, Selection, Waiting, select
from fedrt.spec import ExperimentSpec, OnTooFew
from fedrt.task import TaskKind
from fedrt.tensors import Scope, needs_clip, of_scope

RETRY_PAUSES = (0.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds before failed silos are asked again; then the last


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
    """What comes next: a round of this kind and number. `attempt` counts from 0, `retries` those that were used up.

    `kept` are the asks of an earlier attempt that returned or are still open: they count, and their silos are not asked
    again. So each silo contributes once to a round, and its private tensors advance once. `failed` are the others.
    `late` are those kept whose lateness has used up a retry: if they fail at last, that uses up no other.
    """

    kind: TaskKind
    number: int
    attempt: int = 0
    kept: tuple[Ask, ...] = ()
    retries: int = 0
    failed: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()


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
    conducts: Conducts = ()  # of silos that failed or were missing, by name


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


ExperimentEffects = tuple[rounds.RoundEffect | CloseRound | SetAside, ...]


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
            stepped, effects = rounds.step(experiment.round, event, now)
            round_ = rounds.note_away(experiment.round, stepped, population.available)
            moved, more = _after_round(replace(experiment, round=round_), population, now)
            kept = rounds.open_tasks(moved.round) if moved.round else frozenset()
            due = (effect for effect in effects if not (isinstance(effect, Cancel) and effect.task_id in kept))
            return moved, (*due, *more)


def next_tick(experiment: Experiment) -> float | None:
    """When `Tick` can next change anything."""
    if experiment.round is not None:
        return rounds.next_tick(experiment.round)
    return experiment.stage_time + experiment.spec.rounds.time_limit


def resume(experiment: Experiment, now: float) -> Experiment:
    """The experiment as it goes on after a restart: what it waits for, it waits for anew."""
    round_ = experiment.round and rounds.renew(experiment.round, now, experiment.spec.rounds.time_limit)
    return replace(experiment, stage_time=now, round=round_)


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
    match _selected(experiment, population, now):
        case Waiting(message):
            return replace(experiment, message=message), ()
        case Selection(asked, needed, absent, enough):
            kept = frozenset(ask.silo_id for ask in stage.kept)
            new = [name for name in asked if name not in kept][: len(asked) - len(kept)]
            asks = tuple(_new_ask(experiment, name, now) for name in new)
            round_ = Round(
                number=stage.number,
                kind=stage.kind,
                attempt=stage.attempt,
                asks=(*stage.kept, *asks),
                needed=needed,
                begin_time=now,
                deadline=max(ask.reoffer_time or now for ask in (*stage.kept, *asks)) + spec.rounds.time_limit,
                aggregates=stage.kind is not TaskKind.EVALUATE and experiment.shares,
                absent=absent,
                enough=enough,
            )
            begun = replace(experiment, state=ExperimentState.RUNNING, message="", round=round_)
            return begun, rounds.open_offers(round_)


def _selected(experiment: Experiment, population: Population, now: float) -> Selection | Waiting:
    spec, stage = experiment.spec, experiment.stage
    kept = frozenset(ask.silo_id for ask in stage.kept)
    again = stage.failed if stage.kind is TaskKind.TRAIN else frozenset()
    there = Population(population.known, population.available | kept | again)  # a retry waits for nobody to connect
    overdue = bool(kept) or now >= experiment.stage_time + spec.rounds.time_limit
    aside = {name: why for name, why in conduct.aside(experiment.conducts, stage.number).items() if name not in kept}
    if stage.kind is TaskKind.INITIALIZE:
        aside = dict.fromkeys(stage.failed, "failed to initialize")
    occasion = Occasion(stage.kind, (spec.seed, stage.number, stage.attempt), overdue, aside)
    selected = select(spec.rounds, there, occasion)
    if isinstance(selected, Selection) or not (kept or again):
        return selected
    # Silos that came and left while the round was under way would make it wait, and let go of the work it keeps.
    selected = select(spec.rounds, Population(there.available, there.available), occasion)
    if isinstance(selected, Waiting) or spec.rounds.silos:
        return selected
    gone = tuple((name, "not connected") for name in population.known - there.available)
    return replace(selected, absent=tuple(sorted((*selected.absent, *gone))))


def _new_ask(experiment: Experiment, silo_id: str, now: float) -> Ask:
    stage = experiment.stage
    pause = RETRY_PAUSES[min(stage.retries, len(RETRY_PAUSES)) - 1] if silo_id in stage.failed else 0.0
    reoffer_time = now + pause if pause else None
    return Ask(silo_id, task_id_of(experiment.experiment_id, stage, silo_id), reoffer_time=reoffer_time)


def _after_round(experiment: Experiment, population: Population, now: float) -> tuple[Experiment, ExperimentEffects]:
    round_ = experiment.round
    if round_ is None or round_.phase is not RoundPhase.CLOSED:
        return experiment, ()
    told: list[SetAside] = []
    if round_.kind is TaskKind.TRAIN:
        conducts, told = conduct.judge(experiment.conducts, round_, experiment.spec.rounds)
        experiment = replace(experiment, conducts=conducts)
    closed: ExperimentEffects = (CloseRound(round_), *told)
    experiment = replace(experiment, round=None)
    if round_.succeeded:
        stage = next_stage(experiment.spec, experiment.stage)
        if stage is None:
            missing = conduct.summary(experiment.conducts, experiment.spec.rounds.count)
            done, effects = _end(experiment, ExperimentState.SUCCEEDED, missing, now)
            return done, (*closed, *effects)
    else:
        stage = _next_attempt(experiment, round_)
        if stage is None:
            failed, effects = _end(experiment, ExperimentState.FAILED, _why_failed(round_), now)
            return failed, (*closed, *effects)
    begun, effects = _begin_stage(replace(experiment, stage=stage, stage_time=now), population, now)
    return begun, (*closed, *effects)


def _next_attempt(experiment: Experiment, round_: Round) -> Stage | None:
    """What follows a round with too few results; None if it may not be tried again."""
    stage, policy = experiment.stage, experiment.spec.rounds
    failed = frozenset(ask.silo_id for ask in round_.asks if ask.state is AskState.ABSENT and not rounds.given_up(ask))
    late = frozenset(ask.silo_id for ask in round_.asks if rounds.is_late(ask))
    excused = failed <= stage.late if failed else any(ask.away for ask in round_.asks)
    retries = stage.retries if excused else stage.retries + 1
    if round_.message or policy.on_too_few is not OnTooFew.RETRY or retries > policy.retries:
        return None  # one that was withdrawn would end in the same way again
    kept = tuple(rounds.reopened(ask) for ask in round_.asks if ask.silo_id not in failed)
    if stage.kind is TaskKind.INITIALIZE:
        kept, late = (), frozenset()  # any silo computes the same tensors
    charged = late if retries > stage.retries else frozenset[str]()
    return Stage(stage.kind, stage.number, round_.attempt + 1, kept, retries, failed, charged)


def _why_failed(round_: Round) -> str:
    what = f"round {round_.number} ({round_.kind.value})"
    if round_.message:
        return f"{what}: {round_.message}"
    returned = sum(ask.state is AskState.RETURNED for ask in round_.asks)
    reasons = "; ".join(f"{silo}: {why}" for silo, why in rounds.absentees(round_))
    return f"{what} got {returned} of the {round_.needed} results it needs: {reasons}"


def _end(
    experiment: Experiment, state: ExperimentState, message: str, now: float
) -> tuple[Experiment, ExperimentEffects]:
    effects: ExperimentEffects = ()
    if experiment.round is not None:
        round_, cancels = rounds.step(experiment.round, Withdrawn(message), now)
        effects = (*cancels, CloseRound(round_))
    return replace(experiment, state=state, message=message, round=None, end_time=now), effects
