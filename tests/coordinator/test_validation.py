"""A result whose announcement is wrong is refused before its bytes arrive."""

import numpy as np
import pytest

from coordinator.validation import check_announcement
from fedrt.errors import FailureReason, PayloadError, TensorError
from fedrt.payload import describe
from fedrt.task import Failure, Result, Success, TaskKind
from fedrt.tensors import Scope, TensorSpec

SPECS = (
    TensorSpec("context", (2, 3), Scope.SHARED),
    TensorSpec("scale", (), Scope.SHARED),
    TensorSpec("own", (4,), Scope.PRIVATE),
)
SHARED = {"context": np.ones((2, 3), np.float32), "scale": np.ones((), np.float32)}
TRAIN, EVALUATE, INITIALIZE = TaskKind.TRAIN, TaskKind.EVALUATE, TaskKind.INITIALIZE


def announced(tensors=None, example_count=3, metrics=None, received=""):
    manifest = describe("p", tensors)[0] if tensors else None
    return Result("t1", Success(example_count, metrics or {}, 1.0, received), manifest)


@pytest.mark.parametrize("kind", [TRAIN, INITIALIZE])
def test_exactly_the_shared_tensors_are_accepted(kind):
    check_announcement(announced(SHARED), kind, SPECS)


def test_an_evaluation_announces_no_tensors():
    check_announcement(announced(), EVALUATE, SPECS)
    with pytest.raises(TensorError, match=r"'context' is not a shared tensor of this task; expected are \[\]"):
        check_announcement(announced(SHARED), EVALUATE, SPECS)


def test_a_method_without_shared_tensors_announces_none():
    check_announcement(announced(), TRAIN, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"own": np.ones(4, np.float32)},
            "'own' is not a shared tensor of this task; expected are .'context', 'scale'.",
        ),
        ({"extra": np.ones(1, np.float32)}, "'extra' is not a shared tensor"),
        ({"scale": None}, "'scale' is missing"),
        ({"context": np.ones((3, 2), np.float32)}, r"'context' has shape \(3, 2\); declared is \(2, 3\)"),
        ({"context": np.ones((2, 3), np.float16)}, "'context' has type FLOAT16; declared is FLOAT32"),
        ({"scale": np.ones(1, np.float32)}, r"'scale' has shape \(1,\); declared is \(\)"),
    ],
)
def test_a_wrong_announcement_is_refused_and_named(changes, message):
    tensors = {name: array for name, array in {**SHARED, **changes}.items() if array is not None}
    with pytest.raises(TensorError, match=message):
        check_announcement(announced(tensors), TRAIN, SPECS)


def test_no_announcement_where_one_is_due_is_refused():
    with pytest.raises(TensorError, match="'context' is missing"):
        check_announcement(announced(), TRAIN, SPECS)


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
@pytest.mark.parametrize("count", [0, -1])
def test_a_result_without_examples_is_refused(kind, count):
    with pytest.raises(PayloadError, match="counts no examples"):
        check_announcement(announced(SHARED if kind is TRAIN else None, count), kind, SPECS)


def test_initial_tensors_need_no_examples():
    check_announcement(announced(SHARED, example_count=0), INITIALIZE, SPECS)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": float("nan")}, "metric 'loss' is not finite"),
        ({"fine": 1.0, "loss": float("-inf")}, "metric 'loss' is not finite"),
        ({"": 1.0}, "a metric name has 0 characters; allowed are 1 to 100"),
        ({"m" * 101: 1.0}, "a metric name has 101 characters"),
    ],
)
def test_unusable_metrics_are_refused(metrics, message):
    with pytest.raises(PayloadError, match=message):
        check_announcement(announced(metrics=metrics), EVALUATE, SPECS)


def test_a_failure_has_nothing_to_check():
    check_announcement(Result("t1", Failure(FailureReason.INTERNAL, "broken"), None), TRAIN, SPECS)


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_work_that_began_from_other_tensors_does_not_count(kind):
    tensors = SHARED if kind is TRAIN else None
    check_announcement(announced(tensors, received="ab" * 32), kind, SPECS, "ab" * 32)
    check_announcement(announced(tensors), kind, SPECS, "ab" * 32)  # a silo of protocol 1.0 does not say
    with pytest.raises(PayloadError, match="from other shared tensors than those of this round"):
        check_announcement(announced(tensors, received="cd" * 32), kind, SPECS, "ab" * 32)
