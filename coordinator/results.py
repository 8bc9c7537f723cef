"""What a result means for its task and its round: pure functions of what was offered and what came back."""

from dataclasses import replace

from coordinator.records import TaskRecord, TensorsRef
from coordinator.rounds import ResultFailed, ResultStored, Settle
from fedrt.task import Failure, Outcome, Success, Verdict


def recorded(
    task: TaskRecord, outcome: Outcome, tensors: TensorsRef | None
) -> tuple[TaskRecord, ResultStored | ResultFailed]:
    """The task with its outcome, and what the round is told. A reported failure is accepted too: it is settled."""
    match outcome:
        case Success(example_count, metrics, work_duration, _):
            done = replace(
                task,
                verdict=Verdict.ACCEPTED,
                example_count=example_count,
                metrics=metrics,
                work_duration=work_duration,
                tensors=tensors,
            )
            return done, ResultStored(task.task_id)
        case Failure(reason, text):
            message = f"failed ({reason.value}): {text}"
            return replace(task, verdict=Verdict.ACCEPTED, message=message), ResultFailed(task.task_id, message)


def settlement(task: TaskRecord | None, silo_id: str, task_id: str) -> Settle:
    """The answer to a result that no round waits for: what was decided about its task before."""
    if task is None or task.silo_id != silo_id:
        return Settle(silo_id, task_id, Verdict.UNKNOWN_TASK, "no such task was offered to this silo")
    match task.verdict:
        case Verdict.ACCEPTED:
            return Settle(silo_id, task_id, Verdict.DUPLICATE)
        case Verdict.INVALID:
            return Settle(silo_id, task_id, Verdict.INVALID, task.message)
        case _:
            return Settle(silo_id, task_id, Verdict.LATE, task.message or "the round is closed")
