"""Random histories of one experiment with silos that hold tasks and results, lose connections, and die as daemons do.

The coordinator may die as well: after any commit and before its effects, as only the committed state survives.
"""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from coordinator import rounds
from coordinator.conduct import SetAside
from coordinator.experiments import (
    CancelOrdered,
    CloseRound,
    Experiment,
    ExperimentState,
    SilosChanged,
    create,
    offers_on_connect,
    resume,
    step,
)
from coordinator.rounds import (
    Aggregate,
    Aggregated,
    AskState,
    Cancel,
    Offer,
    Refused,
    ResultFailed,
    ResultStored,
    RoundPhase,
    Settle,
    Tick,
)
from coordinator.selection import Population
from fedrt.spec import OnTooFew
from fedrt.task import RefusalReason, TaskKind, Verdict
from tests.samples import FROM_NOISE, FROM_WORDS, experiment_spec

EXPERIMENT: TypeAdapter[Experiment] = TypeAdapter(Experiment)
SILOS = ("a", "b", "c", "d")
GOOD = (Verdict.ACCEPTED, Verdict.DUPLICATE)


@dataclass
class Silo:
    """What survives at a silo: tasks at work (until it dies) and results without a verdict (always)."""

    connected: bool = False
    running: list[str] = field(default_factory=list)
    finished: dict[str, bool] = field(default_factory=dict)  # task -> whether it is a success
    promoted: list[str] = field(default_factory=list)


class Federation:
    """A driver that persists, then acts, and may die in between."""

    def __init__(self, spec):
        self.now, self.known, self.verdicts, self.closed = 0.0, set(), {}, []
        self.silos = {name: Silo() for name in SILOS}
        self.document = EXPERIMENT.dump_json(create("e1", spec, "ab" * 32, 0.0))
        self.aggregating = self.crash_next = False

    @property
    def experiment(self):
        return EXPERIMENT.validate_json(self.document)

    @property
    def population(self):
        return Population(frozenset(self.known), frozenset(n for n, silo in self.silos.items() if silo.connected))

    def waits_for(self, task_id):
        round_ = self.experiment.round
        return round_ is not None and round_.phase is RoundPhase.COLLECTING and task_id in rounds.open_tasks(round_)

    def step(self, event):
        before = self.experiment
        after, effects = step(before, event, self.population, self.now)
        self.document = EXPERIMENT.dump_json(after)
        for effect in effects:
            match effect:
                case CloseRound(round_):
                    self.closed.append(round_)
                    for ask in round_.asks:
                        self.verdicts.setdefault(ask.task_id, Verdict.LATE)
                case Settle(_, task_id, verdict):
                    self.verdicts[task_id] = verdict
        if after.round is not None and (before.round is None or not after.round.same_as(before.round)):
            for task_id in rounds.open_tasks(after.round):
                self.verdicts.pop(task_id, None)
        if self.crash_next:
            self.crash_next = False
            self.crash()
        else:
            self.perform(effects)

    def perform(self, effects):
        for effect in effects:
            match effect:
                case Offer(name, task_id):
                    self.offered(name, task_id)
                case Cancel(name, task_id):
                    self.cancelled(name, task_id)
                case Settle(name, task_id, verdict):
                    self.settled(name, task_id, verdict)
                case Aggregate():
                    self.aggregating = True
                case CloseRound() | SetAside():
                    pass

    def offered(self, name, task_id):
        silo = self.silos[name]
        assert self.waits_for(task_id)
        if silo.connected and task_id not in silo.running and task_id not in silo.finished:
            silo.running.append(task_id)

    def cancelled(self, name, task_id):
        silo = self.silos[name]
        assert not self.waits_for(task_id)
        if silo.connected and task_id in silo.running:
            silo.running.remove(task_id)

    def settled(self, name, task_id, verdict):
        silo = self.silos[name]
        if silo.connected and task_id in silo.finished and silo.finished.pop(task_id) and verdict in GOOD:
            silo.promoted.append(task_id)

    def deliver(self, name, task_id):
        if self.waits_for(task_id):
            success = self.silos[name].finished[task_id]
            self.step(ResultStored(task_id) if success else ResultFailed(task_id, "broken"))
            return
        known = self.verdicts.get(task_id)
        assert known is not None
        self.settled(name, task_id, Verdict.DUPLICATE if known is Verdict.ACCEPTED else known)

    def connect(self, name):
        silo = self.silos[name]
        silo.running = [task_id for task_id in silo.running if self.waits_for(task_id)]  # others are obsolete
        silo.connected = True
        self.known.add(name)
        held = frozenset([*silo.running, *silo.finished])
        self.perform(offers_on_connect(self.experiment, name, held))
        self.step(SilosChanged())
        for task_id in list(silo.finished):
            if silo.connected and task_id in silo.finished:
                self.deliver(name, task_id)

    def crash(self):
        """The coordinator dies and starts again: the state is as it was committed, and nobody is connected."""
        for silo in self.silos.values():
            silo.connected = False
        resumed = resume(self.experiment, self.now)
        self.document = EXPERIMENT.dump_json(resumed)
        self.aggregating = False
        if resumed.round is not None:
            self.perform(rounds.resume(resumed.round))

    def act(self, action, name, seconds):
        self.now += seconds
        silo = self.silos[name]
        match action:
            case "connect" if not silo.connected:
                self.connect(name)
            case "disconnect" if silo.connected:
                silo.connected = False
                self.step(SilosChanged())
            case "die":
                silo.running = []
                silo.connected = False
                self.step(SilosChanged())
            case "work" | "fail" if silo.running:
                task_id = silo.running.pop(0)
                silo.finished[task_id] = action == "work"
                if silo.connected:
                    self.deliver(name, task_id)
            case "busy" | "policy" if silo.connected and silo.running:
                task_id = silo.running.pop(0)
                if self.waits_for(task_id):
                    self.step(Refused(task_id, RefusalReason(action), "no"))
            case "tick" | "late":
                self.now += 100.0 if action == "late" else 0.0
                self.step(Tick())
            case "aggregated" if self.aggregating:
                self.aggregating = False
                self.step(Aggregated())
            case "crash":
                self.crash()
            case "crash-next":
                self.crash_next = True
            case "cancel" if seconds == 0:
                self.step(CancelOrdered())
        self.check()

    def check(self):
        experiment = self.experiment
        round_ = experiment.round
        if round_ is not None and round_.phase is RoundPhase.AGGREGATING:
            assert self.aggregating
        for name, silo in self.silos.items():
            assert not silo.connected or all(self.waits_for(task_id) for task_id in silo.running)
            trained = [task_id.split("/")[1] for task_id in silo.promoted if "/train" in task_id]
            assert len(trained) == len(set(trained))  # private tensors advance once in a round
            for ask in round_.asks if round_ is not None and round_.phase is RoundPhase.COLLECTING else ():
                if silo.connected and ask.silo_id == name and ask.state is AskState.OFFERED:
                    assert ask.task_id in [*silo.running, *silo.finished] or ask.reoffer_time is not None

    def finish(self):
        """Everybody is honest from now on. Ends within as many steps as stages and retries allow."""
        self.crash_next = False
        for _ in range(300):
            if self.experiment.state.has_ended and not any(silo.finished for silo in self.silos.values()):
                return
            for name in SILOS:
                for action in ("connect", "work"):
                    self.act(action, name, 1)
            self.act("tick", "a", 1)
            self.act("aggregated", "a", 1)
        raise AssertionError("the experiment never ended, or a result was never answered")

    def check_private(self):
        """Exactly those whose results counted have advanced."""
        for round_ in self.closed:
            if round_.kind is TaskKind.TRAIN and round_.succeeded:
                counted = {ask.silo_id for ask in round_.asks if ask.state is AskState.RETURNED}
                advanced = {
                    name
                    for name, silo in self.silos.items()
                    if any(task_id.startswith(f"e1/{round_.number}/train") for task_id in silo.promoted)
                }
                assert advanced == counted


ACTIONS = ("fail", "die", "disconnect", "tick", "late", "busy", "policy", "crash", "crash-next", "cancel")
histories = st.lists(
    st.tuples(
        st.sampled_from((*ACTIONS, *["work"] * 6, *["connect"] * 5, *["aggregated"] * 3)),
        st.sampled_from(SILOS),
        st.integers(0, 30),
    ),
    max_size=100,
)
specs = st.builds(
    experiment_spec,
    count=st.integers(1, 3),
    every=st.integers(0, 2),
    hyperparameters=st.sampled_from([FROM_NOISE, FROM_NOISE, FROM_WORDS]),
    min_results=st.none() | st.integers(1, 2),
    max_silos=st.integers(2, 4),
    silos=st.sampled_from([(), ("a", "b"), SILOS]),
    on_too_few=st.sampled_from([OnTooFew.RETRY, OnTooFew.RETRY, OnTooFew.FAIL]),
    retries=st.integers(0, 4),
    over_selection=st.integers(0, 1),
    set_aside_after=st.integers(0, 2),
    set_aside_rounds=st.integers(0, 2),
)


@settings(max_examples=300, deadline=None)
@given(specs, histories)
def test_no_result_is_lost_or_counted_twice_whoever_dies_when(spec, history):
    federation = Federation(spec)
    for action, name, seconds in history:
        federation.act(action, name, seconds)
    federation.finish()
    federation.check_private()
    if federation.experiment.state is ExperimentState.SUCCEEDED:
        trained = [r.number for r in federation.closed if r.kind is TaskKind.TRAIN and r.succeeded]
        assert trained == list(range(1, spec.rounds.count + 1))
