"""Carries out orders with a loaded CLIP, the silos' data and the installed methods; lives in the worker process."""

import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from fedrt.errors import FailureReason, TensorError, WorkError
from fedrt.spec import EvaluationSplit, LocalSpec, Precision
from fedrt.task import TaskKind
from fedrt.tensors import (
    Array,
    Normal,
    Phrase,
    Scope,
    Tensors,
    TensorSpec,
    all_finite,
    check_tensors,
    initial_tensors,
    of_scope,
)
from silo.checkpoints import checkpoints_of
from silo.clip.model import FrozenClip, memory_bytes
from silo.data import Split
from silo.data.labels import match_classes
from silo.evaluation import evaluate
from silo.examples import Examples
from silo.features import FeatureCache
from silo.loading import load_features
from silo.method import Classifier, LocalMethod, Params, TextTower
from silo.methods import find_local_method, local_method_names
from silo.precision import FEATURE_ERROR, feature_error, is_slow
from silo.training import Plan, RoundPosition, Start, autocast, train
from silo.work import OWN, OnProgress, WorkerReport, WorkOrder, WorkOutcome
from silo.worker_frames import Load

UNKNOWN_IN_LOG = 50
TOWERS = 4  # class lists whose text towers are kept: an experiment and its novel classes, and another one
SPLITS = {
    EvaluationSplit.PERSONAL: Split.TEST,
    EvaluationSplit.BASE: Split.BASE,
    EvaluationSplit.NOVEL: Split.NOVEL,
    EvaluationSplit.DOMAIN: Split.DOMAIN,
}

log = logging.getLogger(__name__)


def open_workbench(load: Load) -> "Workbench":
    """Index the data, load CLIP and open the store of features. Raises `ConfigurationError`."""
    return Workbench(*load_features(load))


class Workbench:
    """One CLIP and one cache of features; serves orders of any experiment and virtual silo, one at a time."""

    def __init__(self, clip: FrozenClip, cache: FeatureCache) -> None:
        self._clip = clip
        self._cache = cache
        self._towers: dict[tuple[str, ...], TextTower] = {}  # of the latest class lists
        self._told_of_slowness = False
        self._report: WorkerReport | None = None  # counting takes long where many silos hold many images

    def report(self) -> WorkerReport:
        """What is held now; the counts shrink when decoding finds a file unreadable."""
        if self._report is None or self._report.unreadable_count != self._cache.unreadable_count:
            self._report = self._look()
        return self._report

    def _look(self) -> WorkerReport:
        counts = self._cache.class_counts
        return WorkerReport(
            architecture=self._clip.architecture,
            weights_sha256=self._clip.weights_sha256,
            context_dim=self._clip.context_dim,
            feature_dim=self._clip.feature_dim,
            device=self._clip.device_name,
            memory_bytes=memory_bytes(self._clip.device),
            class_counts=counts.get(OWN, {}),
            unreadable_count=self._cache.unreadable_count,
            methods=tuple(local_method_names()),
            hosted={silo: held for silo, held in counts.items() if silo != OWN},
        )

    def perform(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        """Do the work. Raises `WorkError`, `SpecError` and `TensorError`, all with messages that may leave the silo.

        While images are decoded, `on_progress` is called with (0, 0): alive, nothing planned yet.
        """
        began = time.monotonic()
        specs = order.local.tensors()
        self._check_model(order.local)
        match order.kind:
            case TaskKind.INITIALIZE:
                shared = self._initial(of_scope(specs, Scope.SHARED), order.local.seed)
                outcome = WorkOutcome(shared, {}, 0, {}, 0.0)
            case TaskKind.TRAIN:
                outcome = self._train(order, specs, on_progress)
            case TaskKind.EVALUATE:
                outcome = self._evaluate(order, specs, on_progress)
        _check_finite(outcome)
        return dataclasses.replace(outcome, duration=time.monotonic() - began)

    def _train(self, order: WorkOrder, specs: tuple[TensorSpec, ...], on_progress: OnProgress) -> WorkOutcome:
        start = Start(*self._params(order, specs))
        local = order.local
        for split in local.evaluation.splits:  # a label that means nothing shows now, not after the last round
            self._indices(order, SPLITS[split], _classes_of(split, local))
        examples = self._examples(order, Split.TRAIN, local.classes, on_progress)
        position = RoundPosition(order.round_number, local.round_count)
        plan = Plan(local.training, position, order.seed)
        measured = self._precision(local, start)
        start = dataclasses.replace(start, checkpoints=checkpoints_of(order, examples, self._clip.device))
        trained = train(self._method(local, local.classes), specs, start, examples, plan, on_progress)
        delta = {
            name: np.asarray((tensor - start.received[name]).cpu(), np.float32)
            for name, tensor in trained.shared.items()
        }
        private = {name: np.asarray(tensor.cpu(), np.float32) for name, tensor in trained.private.items()}
        return WorkOutcome(delta, private, len(examples), trained.metrics | measured, 0.0)

    def _precision(self, local: LocalSpec, start: Start) -> dict[str, float]:
        """The metric `feature_error` of the tensors to start from, unless training is in fp32."""
        precision = local.training.precision
        if precision is Precision.FP32:
            return {}
        if is_slow(precision, self._clip.device) and not self._told_of_slowness:
            log.warning("training.precision is bf16, for which this CPU has no instructions; fp32 would be faster")
            self._told_of_slowness = True
        build, params = find_local_method(local.method_name), {**start.received, **start.private}
        error = feature_error(
            lambda text: build(local.method(), text).classify(params),
            self._tower(local.classes),
            autocast(precision, self._clip.device),
        )
        return {} if error is None else {FEATURE_ERROR: error}

    def _evaluate(self, order: WorkOrder, specs: tuple[TensorSpec, ...], on_progress: OnProgress) -> WorkOutcome:
        """The measures of every split that is asked for and held; those of the personal one under their bare names."""
        shared, private = self._params(order, specs)
        wanted = order.local.evaluation
        held = [split for split in wanted.splits if self._cache.holds(order.silo, SPLITS[split])]
        if not held:
            names = " or ".join(SPLITS[split].value for split in wanted.splits)
            raise WorkError(FailureReason.DATA_UNAVAILABLE, f"this silo has no {names} examples")
        counts: dict[EvaluationSplit, int] = {}
        metrics: dict[str, float] = {}
        classifiers: dict[tuple[str, ...], Classifier] = {}
        for split in held:
            classes = _classes_of(split, order.local)
            examples = self._examples(order, SPLITS[split], classes, on_progress)
            if classes not in classifiers:
                with torch.no_grad():
                    classifiers[classes] = self._method(order.local, classes).classify({**shared, **private})
            measured = evaluate(classifiers[classes], examples)
            prefix = "" if split is EvaluationSplit.PERSONAL else f"{split.value}_"
            metrics |= {prefix + name: value for name, value in measured.items()}
            counts[split] = len(examples)
        return WorkOutcome({}, {}, counts.get(EvaluationSplit.PERSONAL, max(counts.values())), metrics, 0.0)

    def _check_model(self, local: LocalSpec) -> None:
        wanted, clip = local.model, self._clip
        if wanted.weights_sha256 != clip.weights_sha256:
            raise WorkError(
                FailureReason.INTERNAL,
                f"the experiment asks for weights {wanted.weights_sha256}, this silo holds {clip.weights_sha256}",
            )
        if (wanted.context_dim, wanted.feature_dim) != (clip.context_dim, clip.feature_dim):
            raise WorkError(
                FailureReason.INTERNAL,
                f"the experiment names context and feature sizes {wanted.context_dim} and {wanted.feature_dim}, "
                f"the weights have {clip.context_dim} and {clip.feature_dim}",
            )

    def _method(self, local: LocalSpec, classes: tuple[str, ...]) -> LocalMethod:
        return find_local_method(local.method_name)(local.method(), self._tower(classes))

    def _tower(self, classes: tuple[str, ...]) -> TextTower:
        if classes not in self._towers:
            if len(self._towers) == TOWERS:
                self._towers.pop(next(iter(self._towers)))
            self._towers[classes] = self._clip.text_tower(classes)
        return self._towers[classes]

    def _indices(self, order: WorkOrder, split: Split, classes: tuple[str, ...]) -> Mapping[str, int]:
        """The class of each label of a split. Raises `WorkError` if one means no class."""
        known = {split} if split is Split.NOVEL else {Split.TRAIN, Split.VALIDATION, Split.TEST, split}
        match = match_classes(self._cache.labels(order.silo, known), classes)
        for label in match.unknown[:UNKNOWN_IN_LOG]:
            log.error("label %r is no class of the experiment; map it in data.class_names or remove it", label)
        match.check()
        return match.indices

    def _examples(self, order: WorkOrder, split: Split, classes: tuple[str, ...], on_progress: OnProgress) -> Examples:
        indices = self._indices(order, split, classes)
        patches = order.local.method().needs_patches
        views = order.local.training.views if split is Split.TRAIN else 0
        return self._cache.examples(order.silo, split, patches, indices, lambda done, total: on_progress(0, 0), views)

    def _params(self, order: WorkOrder, specs: tuple[TensorSpec, ...]) -> tuple[Params, Params]:
        """The shared tensors as received, and the private ones as held, or their initial values."""
        shared_specs, private_specs = of_scope(specs, Scope.SHARED), of_scope(specs, Scope.PRIVATE)
        check_tensors(shared_specs, order.shared)
        private: Tensors = order.private or self._initial(private_specs, order.local.seed)
        try:
            check_tensors(private_specs, private)
        except TensorError as error:
            raise WorkError(FailureReason.INTERNAL, f"the private tensors that this silo holds: {error}") from error
        return self._on_clip(order.shared), self._on_clip(private)

    def _on_clip(self, tensors: Tensors) -> Params:
        return {name: torch.from_numpy(np.array(array)).to(self._clip.device) for name, array in tensors.items()}

    def _initial(self, specs: Iterable[TensorSpec], seed: int) -> dict[str, Array]:
        """Like `initial_tensors`, and a phrase becomes its token embeddings, the same for every prompt of a tensor."""
        values: dict[str, Array] = {}
        for spec in specs:
            if isinstance(spec.init, Phrase):
                if len(spec.shape) < 2:
                    raise WorkError(FailureReason.INTERNAL, f"tensor {spec.name!r} of shape {spec.shape} is no context")
                embedded = self._clip.embed_phrase(spec.init.text, spec.shape[-2]).detach().cpu().numpy()
                noise = initial_tensors([dataclasses.replace(spec, init=Normal(spec.init.noise))], seed)[spec.name]
                values[spec.name] = np.add(embedded, noise, dtype=np.float32)
            else:
                values |= initial_tensors([spec], seed)
        return values


def _classes_of(split: EvaluationSplit, local: LocalSpec) -> tuple[str, ...]:
    return local.evaluation.novel_classes if split is EvaluationSplit.NOVEL else local.classes


def _check_finite(outcome: WorkOutcome) -> None:
    groups: tuple[Mapping[str, Array], ...] = (outcome.shared, outcome.private)
    for name, array in (item for group in groups for item in group.items()):
        if not all_finite(array):
            raise WorkError(FailureReason.NOT_FINITE, f"tensor {name!r} is not finite after the work")
    for name, value in outcome.metrics.items():
        if not math.isfinite(value):
            raise WorkError(FailureReason.NOT_FINITE, f"the metric {name!r} is not finite")
