"""The experiment that an operator writes as YAML, and its translation to an `ExperimentSpec` and back."""

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, WithJsonSchema, model_validator

from fedrt.architectures import clip_dims
from fedrt.config import LocalPath, PartyName, Section, duration, json_schema, load_yaml
from fedrt.errors import SpecError
from fedrt.method import hyperparameters_json, parse_hyperparameters
from fedrt.methods import BUILT_IN, find_method
from fedrt.notation import Duration
from fedrt.spec import (
    EvaluationSpec,
    EvaluationSplit,
    ExperimentSpec,
    LocalEvaluationSpec,
    LocalSpec,
    ModelSpec,
    OnTooFew,
    OptimizerName,
    OptimizerSpec,
    Precision,
    RoundsSpec,
    Schedule,
    TrainingSpec,
)


class MethodSection(Section):
    """The method by name; all other keys are its hyper-parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(description="Name of an installed method, such as promptfl")


class ExperimentModelSection(Section):
    """The frozen CLIP that every silo must hold."""

    architecture: str = Field(description="open_clip architecture, such as ViT-B-16, or fedrt-tiny")
    weights_sha256: str = Field(description="SHA-256 of the weights file; fedrt-silo model prints it")
    context_dim: int | None = Field(default=None, description="Width of the text tower, for an uncommon architecture")
    feature_dim: int | None = Field(default=None, description="Width of the joint space, for an uncommon architecture")


class OptimizerSection(Section):
    """The local optimiser."""

    name: OptimizerName = Field(default=OptimizerSpec.name, description="sgd or adamw")
    learning_rate: float = Field(default=OptimizerSpec.learning_rate, description="Learning rate")
    momentum: float = Field(default=OptimizerSpec.momentum, description="Momentum of sgd, or beta 1 of adamw")
    weight_decay: float = Field(default=OptimizerSpec.weight_decay, description="Weight decay")


class TrainingSection(Section):
    """Local training in one round."""

    local_epochs: int = Field(default=TrainingSpec.local_epochs, description="Passes over a silo's data per round")
    batch_size: int = Field(default=TrainingSpec.batch_size, description="Examples per step")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="The local optimiser")
    schedule: Schedule = Field(
        default=TrainingSpec.schedule, description="How the learning rate moves over the whole experiment"
    )
    precision: Precision = Field(default=TrainingSpec.precision, description="Arithmetic of training")
    views: int = Field(
        default=TrainingSpec.views,
        description="Random crops and flips of each image that local epochs cycle through; 0: the images as evaluated",
    )


def _silos(value: Any) -> Any:
    if value == "all":
        return ()
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("must be all or a list of silo names such as [north, south]")
    return tuple(value)


def _silos_notation(silos: tuple[str, ...]) -> str | list[str]:
    return list(silos) if silos else "all"


Silos = Annotated[
    tuple[str, ...],
    BeforeValidator(_silos),
    PlainSerializer(_silos_notation, when_used="json"),
    WithJsonSchema({"anyOf": [{"const": "all"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


class RoundsSection(Section):
    """How many rounds, with whom and for how long."""

    count: int = Field(description="Rounds of training; 0 only evaluates")
    time_limit: Duration = duration("30m", "Time after which a round closes")
    min_results: int | None = Field(
        default=RoundsSpec.min_results, description="Results that a round needs; of every asked silo if not set"
    )
    max_silos: int | None = Field(
        default=RoundsSpec.max_silos, description="Silos that train in a round; all if not set"
    )
    silos: Silos = Field(
        default=RoundsSpec.silos,
        description="all, or the names of those that take part",
        json_schema_extra={"default": "all"},
    )
    on_too_few: OnTooFew = Field(default=RoundsSpec.on_too_few, description="What a round with too few results does")
    retries: int = Field(default=RoundsSpec.retries, description="How often a round is retried before it fails")
    over_selection: int = Field(
        default=RoundsSpec.over_selection,
        description="Silos that train beyond max_silos; the round closes with the first max_silos results",
    )
    set_aside_after: int = Field(
        default=RoundsSpec.set_aside_after,
        description="Failed rounds in a row after which a silo is left out for a while; 0: never",
    )
    set_aside_rounds: int = Field(
        default=RoundsSpec.set_aside_rounds, description="Rounds that it is left out of, where they can do without it"
    )


class EvaluationSection(Section):
    """When the silos evaluate, and on what."""

    every: int = Field(default=EvaluationSpec.every, description="Rounds between evaluations; 0: after the last only")
    splits: tuple[EvaluationSplit, ...] = Field(
        default=LocalEvaluationSpec.splits,
        description="personal: a silo's own test images; base, novel, domain: what it holds beside them",
    )
    novel_classes: tuple[str, ...] = Field(
        default=(), description="Class names of the split novel, in the order of its outputs"
    )


class ExperimentFile(Section):
    """The keys of experiment.yaml."""

    experiment: PartyName = Field(description="Name of the experiment, unique in the federation")
    method: MethodSection = Field(description="The method and its hyper-parameters")
    model: ExperimentModelSection = Field(description="The frozen CLIP that every silo must hold")
    classes: tuple[str, ...] | None = Field(default=None, description="Class names in the order of the outputs")
    classes_file: LocalPath | None = Field(
        default=None, description="Instead of classes: a text file with one class name per line"
    )
    training: TrainingSection = Field(default_factory=TrainingSection, description="Local training in one round")
    rounds: RoundsSection = Field(description="How many rounds, with whom and for how long")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="When the silos evaluate")
    seed: int = Field(default=LocalSpec.seed, description="Seed of every random choice")

    @model_validator(mode="after")
    def _names_the_classes_once(self) -> Self:
        if (self.classes is None) == (self.classes_file is None):
            given = "neither" if self.classes is None else "both"
            raise ValueError(f"{given} of classes and classes_file is given; give exactly one of them")
        return self


def load_experiment(path: Path) -> tuple[str, ExperimentSpec]:
    """Experiment id and specification of an experiment file. Raises `ConfigurationError` that names file and key."""
    file = load_yaml(path, ExperimentFile)
    try:
        return file.experiment, experiment_spec(file)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def experiment_spec(file: ExperimentFile) -> ExperimentSpec:
    """The specification that a file describes; reads `classes_file`. Raises `SpecError`."""
    method = parse_hyperparameters(find_method(file.method.name), file.method.model_extra or {})
    dims = clip_dims(file.model.architecture, file.model.context_dim, file.model.feature_dim)
    training, rounds = file.training, file.rounds
    local = LocalSpec(
        method_name=file.method.name,
        hyperparameters_json=hyperparameters_json(method),
        model=ModelSpec(file.model.architecture, file.model.weights_sha256, *dims),
        classes=_read_classes(file.classes_file) if file.classes_file else file.classes or (),
        training=TrainingSpec(
            training.local_epochs,
            training.batch_size,
            OptimizerSpec(**dict(training.optimizer)),
            training.schedule,
            training.precision,
            training.views,
        ),
        round_count=rounds.count,
        evaluation=LocalEvaluationSpec(file.evaluation.splits, file.evaluation.novel_classes),
        seed=file.seed,
    )
    specs = local.tensors()
    if rounds.count > 0 and not specs:
        raise SpecError(
            f"method {file.method.name!r} trains nothing, but rounds.count is {rounds.count}; "
            "set rounds.count to 0 to evaluate only, or choose a method that trains, such as 'promptfl'"
        )
    return ExperimentSpec(local, RoundsSpec(**dict(rounds)), EvaluationSpec(file.evaluation.every))


def experiment_file(experiment_id: str, spec: ExperimentSpec) -> ExperimentFile:
    """The file that describes a specification in full, defaults included: the inverse of `experiment_spec`."""
    local, model, training = spec.local, spec.local.model, spec.local.training
    return ExperimentFile(
        experiment=experiment_id,
        method=MethodSection(name=local.method_name, **json.loads(local.hyperparameters_json)),
        model=ExperimentModelSection(**vars(model)),
        classes=local.classes,
        training=TrainingSection(**vars(training) | {"optimizer": OptimizerSection(**vars(training.optimizer))}),
        rounds=RoundsSection.model_construct(**vars(spec.rounds)),
        evaluation=EvaluationSection(every=spec.evaluation.every, **vars(local.evaluation)),
        seed=spec.seed,
    )


def experiment_schema() -> dict[str, Any]:
    """The JSON Schema of an experiment file, with the hyper-parameters of every built-in method."""
    schema = json_schema(ExperimentFile)
    definitions: dict[str, Any] = schema["$defs"]
    variants = []
    for name, method in sorted(BUILT_IN.items()):
        variant = TypeAdapter(method).json_schema()
        definitions.update(variant.pop("$defs", {}))
        properties = {"name": {"const": name}, **variant.get("properties", {})}
        required = ["name", *variant.get("required", [])]
        variants.append({**variant, "properties": properties, "required": required, "additionalProperties": False})
    others = {"properties": {"name": {"type": "string", "not": {"enum": sorted(BUILT_IN)}}}, "required": ["name"]}
    description = definitions["MethodSection"]["description"]
    definitions["MethodSection"] = {"type": "object", "description": description, "oneOf": [*variants, others]}
    return schema


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SpecError(f"classes_file '{path}' cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise SpecError(f"classes_file '{path}' is not UTF-8 text; save it as UTF-8") from None
    return tuple(line.strip() for line in lines if line.strip())
