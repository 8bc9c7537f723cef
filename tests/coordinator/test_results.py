import pytest

from coordinator.records import TaskRecord, TensorsRef
from coordinator.results import recorded, settlement
from coordinator.rounds import ResultFailed, ResultStored, Settle
from fedrt.errors import FailureReason
from fedrt.payload import ElementType, TensorHeader
from fedrt.task import Failure, Success, TaskKind, Verdict

TASK = TaskRecord("e/1/train/north", "e", "north", 1, TaskKind.TRAIN, 0)
REF = TensorsRef((TensorHeader("context", ElementType.FLOAT32, (2, 3)),), "ab" * 32)


def test_a_success_is_recorded_with_its_numbers_and_counts_in_the_round():
    task, event = recorded(TASK, Success(12, {"loss": 0.5}, 3.0), REF)
    assert event == ResultStored(TASK.task_id)
    assert (task.verdict, task.example_count, task.metrics, task.work_duration, task.tensors) == (
        Verdict.ACCEPTED,
        12,
        {"loss": 0.5},
        3.0,
        REF,
    )


def test_a_failure_is_settled_and_makes_an_absentee_with_its_reason():
    task, event = recorded(TASK, Failure(FailureReason.OUT_OF_MEMORY, "8 GiB are not enough"), None)
    assert event == ResultFailed(TASK.task_id, "failed (out_of_memory): 8 GiB are not enough")
    assert (task.verdict, task.message, task.tensors) == (Verdict.ACCEPTED, event.message, None)


@pytest.mark.parametrize(
    ("verdict", "message", "answer"),
    [
        (None, "", Settle("north", TASK.task_id, Verdict.LATE, "the round is closed")),
        (Verdict.LATE, "cancelled", Settle("north", TASK.task_id, Verdict.LATE, "cancelled")),
        (Verdict.ACCEPTED, "", Settle("north", TASK.task_id, Verdict.DUPLICATE)),
        (Verdict.INVALID, "wrong shape", Settle("north", TASK.task_id, Verdict.INVALID, "wrong shape")),
    ],
)
def test_a_result_that_no_round_waits_for_gets_what_was_decided_before(verdict, message, answer):
    task = TaskRecord(*list(vars(TASK).values())[:6], verdict=verdict, message=message)
    assert settlement(task, "north", TASK.task_id) == answer


def test_a_task_that_was_never_offered_to_the_silo_is_unknown():
    for task, silo in ((None, "north"), (TASK, "south")):
        assert settlement(task, silo, TASK.task_id).verdict is Verdict.UNKNOWN_TASK
