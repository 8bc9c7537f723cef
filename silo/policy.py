"""What a site allows: a pure function of the offered task, the site's rules and what the silo holds."""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fedrt.errors import SpecError
from fedrt.methods import method_names
from fedrt.spec import EvaluationSplit
from fedrt.task import RefusalReason, Task, TaskKind
from fedrt.tensors import Scope, TensorSpec, of_scope, schema_sha256
from silo.work import WorkerReport


@dataclass(frozen=True)
class Policy:
    """The rules of the site. `methods` and `experiments` are names or patterns such as "skin-*".

    `min_examples`: the fewest images that a result may rest on, those trained on or those of each split measured.
    """

    methods: tuple[str, ...] = ("*",)
    experiments: tuple[str, ...] = ("*",)
    min_examples: int = 1


@dataclass(frozen=True)
class Refusal:
    """Why a task is not taken; the message reaches the operators on both sides."""

    reason: RefusalReason
    message: str


def judge(task: Task, policy: Policy, report: WorkerReport) -> Refusal | None:
    """None if the silo takes the task. The site's own rules come first."""
    return _judge_policy(task, policy, report) or _judge_method(task, report) or _judge_model(task, report)


def judge_announcement(announced_bytes: int, specs: tuple[TensorSpec, ...]) -> Refusal | None:
    """None if the tensors that are to follow the offer are no larger than those the method declares.

    They are collected in memory; whether they are the declared ones is checked once they are here.
    """
    declared = sum(4 * math.prod(spec.shape) for spec in of_scope(specs, Scope.SHARED))
    if announced_bytes <= declared:
        return None
    return _mismatch(f"the offer announces {announced_bytes} bytes of tensors; the method declares {declared}")


def _judge_policy(task: Task, policy: Policy, report: WorkerReport) -> Refusal | None:
    method = task.local.method_name
    if not _matches(method, policy.methods):
        return Refusal(RefusalReason.POLICY, f"policy.methods of this silo does not allow {method!r}")
    if not _matches(task.experiment_id, policy.experiments):
        return Refusal(RefusalReason.POLICY, f"policy.experiments of this silo does not allow {task.experiment_id!r}")
    for name, count in _examples_behind(task, report).items():
        if count < policy.min_examples:
            return Refusal(
                RefusalReason.POLICY,
                f"this silo has {count} {name} examples; its policy.min_examples asks for {policy.min_examples}",
            )
    return None


def _examples_behind(task: Task, report: WorkerReport) -> dict[str, int]:
    """How many images what leaves would rest on: for an evaluation, those of each split that is asked for and held."""
    if task.kind is not TaskKind.EVALUATE:
        return {"training": report.example_count}
    splits = ["test" if split is EvaluationSplit.PERSONAL else split.value for split in task.local.evaluation.splits]
    counts = {split: sum(report.class_counts.get(split, {}).values()) for split in splits}
    return {split: count for split, count in counts.items() if count}  # of one that it lacks, nothing leaves


def _judge_method(task: Task, report: WorkerReport) -> Refusal | None:
    name = task.local.method_name
    if name not in method_names():
        return _mismatch(f"method {name!r} is not installed at this silo; installed are {', '.join(method_names())}")
    if name not in report.methods:
        return _mismatch(f"the local half of method {name!r} is not installed at this silo; install its whole package")
    try:
        specs = task.local.tensors()
    except SpecError as error:
        return _mismatch(str(error))
    except Exception as error:  # a third-party method is a plugin: its bug refuses one task, nothing else
        return _mismatch(f"method {name!r} cannot be built at this silo: {type(error).__name__}")
    if schema_sha256(specs) != task.schema_sha256:
        return _mismatch(f"this silo's {name!r} declares other tensors than the coordinator's; install equal versions")
    return None


def _judge_model(task: Task, report: WorkerReport) -> Refusal | None:
    wanted = task.local.model
    if wanted.weights_sha256 != report.weights_sha256:
        return _mismatch(
            f"the experiment names {wanted.architecture} weights {wanted.weights_sha256[:16]}...; this silo holds "
            f"{report.architecture} weights {report.weights_sha256[:16]}...; install the named weights file"
        )
    if (wanted.context_dim, wanted.feature_dim) != (report.context_dim, report.feature_dim):
        return _mismatch(
            f"the experiment says context_dim {wanted.context_dim} and feature_dim {wanted.feature_dim}; this silo's "
            f"model has {report.context_dim} and {report.feature_dim}"
        )
    return None


def _mismatch(message: str) -> Refusal:
    return Refusal(RefusalReason.METHOD_MISMATCH, message)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
