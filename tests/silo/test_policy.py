import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrt.spec import EvaluationSplit, LocalEvaluationSpec, ModelSpec
from fedrt.task import RefusalReason, Task, TaskKind
from fedrt.tensors import Scope, of_scope, schema_sha256
from silo.policy import Policy, judge, judge_announcement
from silo.work import WorkerReport
from tests.samples import MODEL, local_spec, task

REPORT = WorkerReport(
    MODEL.architecture,
    MODEL.weights_sha256,
    MODEL.context_dim,
    MODEL.feature_dim,
    "cpu",
    0,
    {"train": {"cat": 10}},
    0,
    ("promptfl", "zeroshot"),
)


def offered(**changes: object) -> Task:
    sample = task()
    right = dataclasses.replace(sample, schema_sha256=schema_sha256(sample.local.tensors()))
    return dataclasses.replace(right, **changes)


def test_a_task_that_breaks_no_rule_is_taken():
    assert judge(offered(), Policy(), REPORT) is None


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [
        (("*",), True),
        (("promptfl",), True),
        (("fedotp", "prompt*"), True),
        (("PromptFL",), False),
        (("prompt",), False),
    ],
)
def test_methods_are_allowed_by_name_or_pattern(patterns: tuple[str, ...], allowed: bool):
    refusal = judge(offered(), Policy(methods=patterns), REPORT)
    assert (refusal is None) == allowed
    if refusal is not None:
        assert refusal.reason is RefusalReason.POLICY
        assert refusal.message == "policy.methods of this silo does not allow 'promptfl'"


@pytest.mark.parametrize(
    ("patterns", "allowed"), [(("e1",), True), (("e?",), True), (("skin-*",), False), (("e",), False)]
)
def test_experiments_are_allowed_by_name_or_pattern(patterns: tuple[str, ...], allowed: bool):
    refusal = judge(offered(), Policy(experiments=patterns), REPORT)
    assert (refusal is None) == allowed
    if refusal is not None:
        assert refusal.reason is RefusalReason.POLICY
        assert refusal.message == "policy.experiments of this silo does not allow 'e1'"


@given(st.integers(1, 100), st.integers(0, 100))
def test_a_silo_takes_part_from_its_minimum_of_examples_on(minimum: int, present: int):
    report = dataclasses.replace(REPORT, class_counts={"train": {"cat": present}, "test": {"cat": 1000}})
    refusal = judge(offered(), Policy(min_examples=minimum), report)
    assert (refusal is None) == (present >= minimum)
    if refusal is not None:
        assert refusal.reason is RefusalReason.POLICY
        assert f"has {present} training examples; its policy.min_examples asks for {minimum}" in refusal.message


def test_an_evaluation_is_judged_by_the_images_of_each_split_that_is_measured():
    everything = LocalEvaluationSpec(tuple(EvaluationSplit), ("bird",))
    task = dataclasses.replace(
        offered(), kind=TaskKind.EVALUATE, local=dataclasses.replace(offered().local, evaluation=everything)
    )

    def refusal(**counts: int) -> str:
        report = dataclasses.replace(REPORT, class_counts={split: {"cat": count} for split, count in counts.items()})
        found = judge(task, Policy(min_examples=50), report)
        return "" if found is None else found.message

    assert refusal(domain=50) == ""  # a hospital that only evaluates has no training images
    assert refusal(train=500) == ""  # nothing is measured, so nothing leaves
    assert "has 1 test examples; its policy.min_examples asks for 50" in refusal(train=500, test=1, domain=60)
    assert "has 3 novel examples" in refusal(train=500, test=60, novel=3)


def test_examples_of_all_classes_count_and_a_silo_without_training_data_has_none():
    spread = dataclasses.replace(REPORT, class_counts={"train": {"cat": 5, "dog": 5}})
    assert judge(offered(), Policy(min_examples=10), spread) is None
    assert judge(offered(), Policy(), dataclasses.replace(REPORT, class_counts={"test": {"cat": 5}})) is not None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"local": local_spec(method="fedotq")},
            "method 'fedotq' is not installed at this silo; installed are coop",
        ),
        ({"local": local_spec(hyperparameters='{"context_length":0}')}, "context_length must be at least 1"),
        ({"schema_sha256": b"\1" * 32}, "this silo's 'promptfl' declares other tensors than the coordinator's"),
    ],
)
def test_a_method_that_differs_is_a_mismatch(changes: dict[str, object], complaint: str):
    refusal = judge(offered(**changes), Policy(), REPORT)
    assert refusal is not None
    assert refusal.reason is RefusalReason.METHOD_MISMATCH
    assert complaint in refusal.message


@pytest.mark.parametrize(
    ("held", "complaint"),
    [
        ({"weights_sha256": "cd" * 32}, "this silo holds fedrt-tiny weights cdcdcdcdcdcdcdcd...; install the named"),
        ({"context_dim": 9}, "says context_dim 8 and feature_dim 4; this silo's model has 9 and 4"),
        ({"feature_dim": 5}, "says context_dim 8 and feature_dim 4; this silo's model has 8 and 5"),
    ],
)
def test_a_model_that_differs_is_a_mismatch(held: dict[str, object], complaint: str):
    refusal = judge(offered(), Policy(), dataclasses.replace(REPORT, **held))
    assert refusal is not None
    assert refusal.reason is RefusalReason.METHOD_MISMATCH
    assert complaint in refusal.message


def test_the_sites_own_rules_come_first():
    foreign = offered(local=dataclasses.replace(local_spec(method="fedotq"), model=ModelSpec("x", "ee" * 32, 1, 1)))
    refusal = judge(foreign, Policy(methods=("promptfl",)), REPORT)
    assert refusal is not None
    assert refusal.reason is RefusalReason.POLICY
    assert judge(foreign, Policy(), REPORT).reason is RefusalReason.METHOD_MISMATCH


@pytest.mark.parametrize("hyperparameters", ["[4]", "4", '"context_length"', "null"])
def test_hyperparameters_that_are_no_mapping_are_refused_and_do_not_end_the_daemon(hyperparameters: str):
    # However they are caught: where the specification is made, or where it is judged.
    from fedrt.errors import SpecError

    try:
        spec = local_spec(hyperparameters=hyperparameters)
    except SpecError:
        return
    refusal = judge(offered(local=spec), Policy(), REPORT)
    assert refusal is not None
    assert refusal.reason is RefusalReason.METHOD_MISMATCH


def test_an_offer_announces_no_more_bytes_than_the_method_declares():
    specs = offered().local.tensors()
    declared = sum(4 * math.prod(spec.shape) for spec in of_scope(specs, Scope.SHARED))
    assert judge_announcement(declared, specs) is None
    refusal = judge_announcement(declared + 1, specs)
    assert refusal.reason is RefusalReason.METHOD_MISMATCH
    assert refusal.message == f"the offer announces {declared + 1} bytes of tensors; the method declares {declared}"
