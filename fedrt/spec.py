"""What an experiment pins, as values: whoever holds an `ExperimentSpec` holds a valid one."""

import enum
import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace

from fedrt.errors import SpecError
from fedrt.method import Method, ModelDims
from fedrt.methods import make_method
from fedrt.tensors import TensorSpec

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
MAX_CLASSES = 100_000
MAX_COUNT = 1_000_000
MAX_VIEWS = 10_000


class Precision(enum.Enum):
    """The arithmetic of local training."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class OptimizerName(enum.Enum):
    """The local optimiser."""

    SGD = "sgd"
    ADAMW = "adamw"


class Schedule(enum.Enum):
    """How the learning rate moves over the whole experiment, not within a task."""

    CONSTANT = "constant"
    COSINE = "cosine"


class EvaluationSplit(enum.Enum):
    """Images that tensors are measured on. A silo measures those that it holds."""

    PERSONAL = "personal"  # the silo's own test images
    BASE = "base"  # test images of all classes, whichever the silo trained on
    NOVEL = "novel"  # images of classes that nobody trained on
    DOMAIN = "domain"  # images of the classes, from a domain that nobody trained on


class OnTooFew(enum.Enum):
    """What happens to a round with fewer results than it needs."""

    FAIL = "fail"
    RETRY = "retry"


@dataclass(frozen=True)
class ModelSpec:
    """The frozen CLIP: every silo must hold weights with this digest (hex)."""

    architecture: str
    weights_sha256: str
    context_dim: int
    feature_dim: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.weights_sha256):
            raise SpecError(
                f"model.weights_sha256 {self.weights_sha256!r} is not 64 hexadecimal digits; "
                "`fedrt-silo model --config silo.yaml` prints the digest of a silo's weights"
            )
        if not (0 < self.context_dim <= MAX_COUNT and 0 < self.feature_dim <= MAX_COUNT):
            raise SpecError(f"model.context_dim and model.feature_dim must be between 1 and {MAX_COUNT}")


@dataclass(frozen=True)
class OptimizerSpec:
    """The defaults of CoOp and of the federated papers' code."""

    name: OptimizerName = OptimizerName.SGD
    learning_rate: float = 0.002
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise SpecError(f"training.optimizer.learning_rate is {self.learning_rate}; it must be positive")
        if not 0 <= self.momentum < 1:
            raise SpecError(f"training.optimizer.momentum is {self.momentum}; it must be in [0, 1)")
        if not 0 <= self.weight_decay < float("inf"):
            raise SpecError(f"training.optimizer.weight_decay is {self.weight_decay}; it must not be negative")


@dataclass(frozen=True)
class TrainingSpec:
    """Local training in one round. The last, smaller batch of an epoch is used, not dropped.

    With `views` k, each image has k augmented views, random crops and flips fixed by its content, and local epoch e of
    the whole experiment trains on view e mod k; 0 trains on the images as evaluation sees them.
    """

    local_epochs: int = 1
    batch_size: int = 32
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: Schedule = Schedule.CONSTANT
    precision: Precision = Precision.FP32
    views: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.views <= MAX_VIEWS:
            raise SpecError(f"training.views is {self.views}; it must be between 0 and {MAX_VIEWS}")
        if not (0 < self.local_epochs <= MAX_COUNT and 0 < self.batch_size <= MAX_COUNT):
            raise SpecError(f"training.local_epochs and training.batch_size must be between 1 and {MAX_COUNT}")


@dataclass(frozen=True)
class RoundsSpec:
    """Who takes part and for how long. Empty `silos` means all; no `min_results` means every asked silo.

    With `over_selection`, so many silos more than `max_silos` train, and a round closes with the first `max_silos`
    results. A silo that fails `set_aside_after` training rounds in a row (0: never) is left out of the next
    `set_aside_rounds`, where they can do without it.
    """

    count: int
    time_limit: float = 1800.0  # seconds
    min_results: int | None = None
    max_silos: int | None = None
    silos: tuple[str, ...] = ()
    on_too_few: OnTooFew = OnTooFew.RETRY
    retries: int = 2
    over_selection: int = 0
    set_aside_after: int = 3
    set_aside_rounds: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.count <= 1_000_000:
            raise SpecError(f"rounds.count is {self.count}; it must be between 0 and 1000000")
        if not 0 < self.time_limit <= 30 * 86400:
            raise SpecError(f"rounds.time_limit is {self.time_limit} seconds; allowed are up to 30 days")
        if self.min_results is not None and self.min_results < 1:
            raise SpecError("rounds.min_results must be at least 1")
        if self.max_silos is not None and self.max_silos < (self.min_results or 1):
            raise SpecError("rounds.max_silos must not be below rounds.min_results")
        if self.silos and (self.min_results or 0) > len(self.silos):
            raise SpecError(f"rounds.min_results is {self.min_results}, but rounds.silos names only {len(self.silos)}")
        for name in self.silos:
            if not NAME.fullmatch(name):
                raise SpecError(f"rounds.silos: {name!r} is not a silo name (1 to 63 of a-z, 0-9 and -)")
        if len(set(self.silos)) != len(self.silos):
            raise SpecError("rounds.silos names a silo twice")
        if self.retries < 0:
            raise SpecError("rounds.retries must not be negative")
        if not 0 <= self.over_selection <= MAX_COUNT:
            raise SpecError(f"rounds.over_selection is {self.over_selection}; it must be between 0 and {MAX_COUNT}")
        if self.over_selection and self.max_silos is None:
            raise SpecError("rounds.over_selection adds to rounds.max_silos, which is not set; set it too")
        if not (0 <= self.set_aside_after <= MAX_COUNT and 0 <= self.set_aside_rounds <= MAX_COUNT):
            raise SpecError(f"rounds.set_aside_after and rounds.set_aside_rounds must be between 0 and {MAX_COUNT}")


@dataclass(frozen=True)
class EvaluationSpec:
    """Evaluate before the first round and after every `every` rounds; 0 means after the last only."""

    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 0:
            raise SpecError("evaluation.every must not be negative")


@dataclass(frozen=True)
class LocalEvaluationSpec:
    """What a silo measures. The novel split is scored against `novel_classes`, all others against `classes`."""

    splits: tuple[EvaluationSplit, ...] = (EvaluationSplit.PERSONAL,)
    novel_classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.splits:
            raise SpecError("evaluation.splits is empty; name at least one of personal, base, novel and domain")
        if len(set(self.splits)) != len(self.splits):
            raise SpecError("evaluation.splits names a split twice")
        if (EvaluationSplit.NOVEL in self.splits) != bool(self.novel_classes):
            raise SpecError(
                "evaluation.splits names novel, but evaluation.novel_classes is empty; add the names of the new classes"
                if EvaluationSplit.NOVEL in self.splits
                else "evaluation.novel_classes is set, but evaluation.splits does not name novel; add it"
            )
        if self.novel_classes:
            check_classes("evaluation.novel_classes", self.novel_classes)


def check_classes(key: str, names: tuple[str, ...]) -> None:
    """Raise `SpecError` unless these are distinct, reasonable class names."""
    if not names or len(names) > MAX_CLASSES:
        raise SpecError(f"{key} holds {len(names)} names; allowed are 1 to {MAX_CLASSES}")
    if len(set(names)) != len(names):
        twice, _ = Counter(names).most_common(1)[0]
        raise SpecError(f"{key} names {twice!r} twice")
    for name in names:
        if not name.strip() or len(name) > 200:
            raise SpecError(f"{key}: {name!r} is empty or longer than 200 characters")


@dataclass(frozen=True)
class LocalSpec:
    """The part of an experiment that a silo needs; the same for every task of the experiment."""

    method_name: str
    hyperparameters_json: str
    model: ModelSpec
    classes: tuple[str, ...]
    training: TrainingSpec
    round_count: int
    evaluation: LocalEvaluationSpec = field(default_factory=LocalEvaluationSpec)
    seed: int = 1  # of the experiment: initial private tensors are drawn from it

    def __post_init__(self) -> None:
        check_classes("classes", self.classes)
        if both := set(self.classes) & set(self.evaluation.novel_classes):
            raise SpecError(f"{min(both)!r} is in classes and in evaluation.novel_classes; keep it in one of the two")
        if not 0 <= self.seed < 2**63:
            raise SpecError("seed must be between 0 and 2**63 - 1")
        try:
            values = json.loads(self.hyperparameters_json)
        except (ValueError, RecursionError):
            raise SpecError("the method's hyper-parameters are not JSON") from None
        if not isinstance(values, dict):
            raise SpecError("the method's hyper-parameters are not a JSON object")

    @property
    def dims(self) -> ModelDims:
        """What the method may know of CLIP."""
        return ModelDims(self.model.context_dim, self.model.feature_dim, len(self.classes))

    def method(self) -> Method:
        """The installed method. Raises `SpecError` if it is not installed or its hyper-parameters are wrong."""
        return make_method(self.method_name, self.hyperparameters_json)

    def tensors(self) -> tuple[TensorSpec, ...]:
        """The declared tensors. Raises `SpecError` like `method`, and if they do not fit the novel classes."""
        method, dims = self.method(), self.dims
        specs = method.tensors(dims)
        if self.evaluation.novel_classes and specs != method.tensors(replace(dims, class_count=dims.class_count + 1)):
            raise SpecError(
                f"method {self.method_name!r} with these hyper-parameters learns something for each class, which novel "
                "classes lack; remove novel from evaluation.splits, or class_specific from the method"
            )
        return specs


@dataclass(frozen=True)
class ExperimentSpec:
    """One federated optimisation run, immutable."""

    local: LocalSpec
    rounds: RoundsSpec
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)

    def __post_init__(self) -> None:
        if self.local.round_count != self.rounds.count:
            raise SpecError("the round count a silo is told differs from rounds.count")

    @property
    def seed(self) -> int:
        """Seeds selection, initial values and local training."""
        return self.local.seed
