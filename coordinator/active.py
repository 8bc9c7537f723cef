"""The experiments that have not ended, with what is needed to judge and to act on them. Plain values, no I/O."""

from dataclasses import dataclass, field, replace

from coordinator import rounds
from coordinator.experiments import Experiment
from coordinator.records import (
    Checkpoint,
    Contribution,
    ExperimentChanged,
    RoundClosed,
    TaskRecord,
    mean_metrics,
)
from fedrt.session.frames import HeldState, HeldTask
from fedrt.task import TaskKind
from fedrt.tensors import TensorSpec


@dataclass(frozen=True)
class Expectation:
    """What the coordinator asked a silo for: enough to judge an announcement before its bytes arrive."""

    kind: TaskKind
    specs: tuple[TensorSpec, ...]
    sent_sha256: str = ""  # of the shared tensors to begin from; empty if there are none


@dataclass
class Active:
    """One experiment. `tensors` are the packed shared tensors of the checkpoint, `tasks` those of the current round."""

    experiment: Experiment
    specs: tuple[TensorSpec, ...]
    checkpoint: Checkpoint | None = None
    tensors: memoryview | None = None
    tasks: dict[str, TaskRecord] = field(default_factory=dict)


@dataclass
class ActiveExperiments:
    """All of them, by name and by task."""

    by_name: dict[str, Active] = field(default_factory=dict)
    _name_by_task: dict[str, str] = field(default_factory=dict)

    def adopt(self, active: Active) -> None:
        """Add an experiment together with its tasks."""
        self.by_name[active.experiment.experiment_id] = active
        for task_id in active.tasks:
            self._name_by_task[task_id] = active.experiment.experiment_id

    def begin_tasks(self, active: Active, tasks: list[TaskRecord]) -> None:
        """Let these be the tasks of the current round."""
        for task_id in active.tasks:
            self._name_by_task.pop(task_id, None)
        active.tasks = {task.task_id: task for task in tasks}
        self.adopt(active)

    def drop_ended(self) -> list[str]:
        """Forget the experiments that have ended; returns their names."""
        ended = [name for name, active in self.by_name.items() if active.experiment.state.has_ended]
        for name in ended:
            for task_id in self.by_name.pop(name).tasks:
                self._name_by_task.pop(task_id, None)
        return ended

    def copy(self) -> "ActiveExperiments":
        """An independent copy, to return to if a batch cannot be made durable."""
        copies = {name: replace(active, tasks=dict(active.tasks)) for name, active in self.by_name.items()}
        return ActiveExperiments(copies, dict(self._name_by_task))

    def waiting_for(self, silo_id: str, task_id: str) -> Active | None:
        """The experiment whose current round still waits for this task of this silo; None if no round does."""
        active = self.by_name.get(self._name_by_task.get(task_id, ""))
        round_ = active.experiment.round if active else None
        if active is None or round_ is None or round_.phase is not rounds.RoundPhase.COLLECTING:
            return None
        ask = round_.ask(task_id)
        open_ask = ask is not None and ask.state is rounds.AskState.OFFERED and ask.silo_id == silo_id
        return active if open_ask else None

    def expectation(self, silo_id: str, task_id: str) -> Expectation | None:
        """What is expected of a task, if a round waits for it."""
        active = self.waiting_for(silo_id, task_id)
        if active is None:
            return None
        kind = active.tasks[task_id].kind
        sent = None if kind is TaskKind.INITIALIZE else active.checkpoint
        return Expectation(kind, active.specs, sent.shared.sha256 if sent else "")

    def obsolete(self, silo_id: str, held: tuple[HeldTask, ...]) -> tuple[str, ...]:
        """Running tasks the silo may drop. A finished one is never obsolete: its result gets a verdict."""
        running = [task.task_id for task in held if task.state is HeldState.RUNNING]
        return tuple(task_id for task_id in running if self.waiting_for(silo_id, task_id) is None)

    def open_tasks(self, silo_id: str) -> list[str]:
        """The tasks of a silo that rounds wait for."""
        tasks = [task for active in self.by_name.values() for task in active.tasks.values()]
        return sorted(t.task_id for t in tasks if t.silo_id == silo_id and self.waiting_for(silo_id, t.task_id))


def changed(experiment: Experiment) -> ExperimentChanged:
    """What the event log says of an experiment."""
    return ExperimentChanged(
        experiment.experiment_id,
        experiment.state.value,
        experiment.stage.number,
        experiment.stage.kind,
        experiment.message,
        experiment.end_time,
    )


def closed(active: Active, round_: rounds.Round, now: float) -> RoundClosed:
    """What the event log says of a round that has ended."""
    counted = [active.tasks[ask.task_id] for ask in round_.asks if ask.state is rounds.AskState.RETURNED]
    contributions = tuple(
        Contribution(
            task.silo_id,
            task.example_count,
            task.metrics,
            task.work_duration,
            task.tensors.byte_count if task.tensors else 0,
        )
        for task in sorted(counted, key=lambda task: task.silo_id)
    )
    return RoundClosed(
        experiment_id=active.experiment.experiment_id,
        round_number=round_.number,
        kind=round_.kind,
        attempt=round_.attempt,
        contributions=contributions,
        absences=rounds.absentees(round_),
        metrics=mean_metrics(contributions, round_.kind),
        succeeded=round_.succeeded,
        duration=max(0.0, now - round_.begin_time),  # the clock may have been set back before a restart
    )
