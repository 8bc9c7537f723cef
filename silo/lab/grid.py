"""The grid of a lab.yaml: a federation per setting and seed, a cell per method in it, each known by a digest; pure.

The digest covers all that lab.yaml says about a cell's outcome: data, weights, partition, method, training, rounds,
evaluation and seed; of a method that trains nothing neither training nor rounds nor evaluation. Where it runs, on how
many threads, how long at most and with how many retries is no part of it. Paths count relative to lab.yaml, so a lab
can be moved.
"""

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from fedrt.errors import ConfigurationError
from fedrt.experiment_file import (
    EvaluationSection,
    ExperimentFile,
    ExperimentModelSection,
    MethodSection,
    RoundsSection,
    TrainingSection,
)
from fedrt.method import Method, ModelDims, hyperparameters_json, parse_hyperparameters
from fedrt.methods import find_method
from fedrt.spec import EvaluationSplit
from silo.lab.sections import DIGEST_CHARACTERS, LabData, LabFile, LabMethod, SettingSection
from silo.partition.sections import Dealing, PartitionSection

_S = TypeVar("_S", bound=BaseModel)
_ANY_DIMS = ModelDims(context_dim=8, feature_dim=8, class_count=2)
_LATER_ROUNDS = ("over_selection", "set_aside_after", "set_aside_rounds")  # that the first cells had not


@dataclass(frozen=True)
class Cell:
    """One experiment to run: a method in a setting with a seed; the sections have every change applied."""

    setting: str
    label: str
    seed: int
    digest: str
    former_digest: str  # which finished cells of fedrt-lab's first version bear: it covered limits, and all of training
    method: MethodSection
    training: TrainingSection
    rounds: RoundsSection
    every: int

    @property
    def cell_id(self) -> str:
        """Also the experiment's name: `<setting>-<method>-s<seed>-<8 digits of the digest>`."""
        return self._id(self.digest)

    @property
    def former_id(self) -> str:
        """What the name was in fedrt-lab's first version."""
        return self._id(self.former_digest)

    def _id(self, digest: str) -> str:
        return f"{self.setting}-{self.label}-s{self.seed}-{digest[:DIGEST_CHARACTERS]}"

    @property
    def name(self) -> str:
        """As people read it: "label-shift/promptfl, seed 1"."""
        return f"{self.setting}/{self.label}, seed {self.seed}"


@dataclass(frozen=True)
class FederationPlan:
    """A setting with a seed: one division of the images, one coordinator, one host; its cells run in order."""

    setting: str
    seed: int
    data: LabData
    partition: PartitionSection
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """`<setting>-s<seed>`."""
        return f"{self.setting}-s{self.seed}"


@dataclass(frozen=True)
class Dealt:
    """What became of a partition: the class lists, and how many images of each split each silo holds."""

    classes: tuple[str, ...]
    novel_classes: tuple[str, ...]
    holdings: dict[str, dict[str, int]]
    digest: str


def expand(lab: LabFile, origin: Path) -> tuple[FederationPlan, ...]:
    """All federations with their cells, by setting, then seed, then method; `origin` is where lab.yaml lies.

    Raises `SpecError` for a method that is not installed or does not have these hyper-parameters.
    """
    return tuple(
        _federation(lab, origin, name, setting, seed) for name, setting in lab.settings.items() for seed in lab.seeds
    )


def chosen(
    plans: Sequence[FederationPlan], patterns: Sequence[str], option: str = "--only"
) -> tuple[FederationPlan, ...]:
    """The plans with those cells that a pattern `setting/method` or `setting` means (*, ? and [] as in file names).

    All of them without a pattern. Raises `ConfigurationError` for a pattern that means no cell, and names the option.
    """
    if not patterns:
        return tuple(plans)
    kept: list[FederationPlan] = []
    unused = set(patterns)
    for plan in plans:
        cells = []
        for cell in plan.cells:
            matching = {pattern for pattern in patterns if _means(pattern, cell)}
            unused -= matching
            cells += [cell] if matching else []
        if cells:
            kept.append(replace(plan, cells=tuple(cells)))
    if unused:
        known = sorted({f"{cell.setting}/{cell.label}" for plan in plans for cell in plan.cells})
        raise ConfigurationError(f"{option} {min(unused)!r} means no cell; there are {', '.join(known)}")
    return tuple(kept)


def splits_of(partition: Dealing) -> tuple[EvaluationSplit, ...]:
    """What the silos of such a partition are measured on."""
    novel, domain = partition.novel is not None, partition.held_out_domain is not None
    beside = ((EvaluationSplit.BASE, partition.base or novel), (EvaluationSplit.NOVEL, novel))
    wanted = (split for split, is_wanted in (*beside, (EvaluationSplit.DOMAIN, domain)) if is_wanted)
    return (EvaluationSplit.PERSONAL, *wanted)


def experiment_of(cell: Cell, partition: Dealing, dealt: Dealt, architecture: str, weights: str) -> ExperimentFile:
    """The cell as an experiment.yaml; `weights` is their SHA-256. Every silo takes part."""
    return ExperimentFile(
        experiment=cell.cell_id,
        method=cell.method,
        model=ExperimentModelSection(architecture=architecture, weights_sha256=weights),
        classes=dealt.classes,
        training=cell.training,
        rounds=cell.rounds.model_copy(update={"silos": tuple(dealt.holdings)}),
        evaluation=EvaluationSection(every=cell.every, splits=splits_of(partition), novel_classes=dealt.novel_classes),
        seed=cell.seed,
    )


def partition_words(partition: Dealing) -> str:
    """The keys of a partition that are set, for people: "kind dirichlet, silos 10, beta 0.3"."""
    values = partition.model_dump(mode="json", exclude_defaults=True, exclude={"seed"})
    ordered = {"kind": values.pop("kind"), **values}
    return ", ".join(f"{key} {_words(value)}" for key, value in ordered.items())


def counted(things: Sized, word: str) -> str:
    """How many there are, for people: "1 cell", "3 cells"."""
    return f"{len(things)} {word}" + "s" * (len(things) != 1)


def overlaid(section: _S, *changes: BaseModel | None) -> _S:
    """The section with the keys that the changes set, the last one first; a section within it is overlaid in turn."""
    for change in changes:
        if change is None:
            continue
        update: dict[str, Any] = {}
        for key in change.model_fields_set:
            value, present = getattr(change, key), getattr(section, key)
            update[key] = overlaid(present, value) if isinstance(present, BaseModel) else value
        section = section.model_copy(update=update)
    return section


def portable(section: BaseModel, origin: Path) -> Any:
    """A section as JSON values, defaults included and paths relative to `origin` where they lie below it."""
    return _portable(section.model_dump(mode="python"), origin.absolute())


def digest_of(document: Any) -> str:
    """The SHA-256 of JSON values, in hexadecimal."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _federation(lab: LabFile, origin: Path, name: str, setting: SettingSection, seed: int) -> FederationPlan:
    data = setting.data or lab.data
    assert data is not None  # a validator sees to it
    partition: PartitionSection = setting.partition.model_copy(update={"seed": seed})
    common = {
        "format": 1,
        "setting": name,
        "seed": seed,
        "data": portable(data, origin),
        "partition": portable(partition, origin),
        "model": {
            "architecture": lab.model.architecture,
            "weights": _portable(Path(lab.model.weights), origin.absolute()),
        },
    }
    cells = (_cell(lab, setting, label, entry, common) for label, entry in lab.methods.items())
    return FederationPlan(name, seed, data, partition, tuple(cells))


def _cell(lab: LabFile, setting: SettingSection, label: str, entry: LabMethod, common: dict[str, Any]) -> Cell:
    declared = declaration(entry.method)
    training = overlaid(lab.training, setting.training, entry.training)
    rounds = RoundsSection.model_construct(**vars(overlaid(lab.rounds, setting.rounds, entry.rounds)))
    every = overlaid(lab.evaluation, setting.evaluation).every
    trains = bool(declared.tensors(_ANY_DIMS))
    if not trains:
        rounds = rounds.model_copy(update={"count": 0})
    document = common | {
        "label": label,
        "method": {"name": entry.method.name, **json.loads(hyperparameters_json(declared))},
    }
    former = {"training": _training(training), "rounds": _rounds(rounds, set()), "every": every}
    decisive = former | {"rounds": _rounds(rounds, {"time_limit", "retries"})}
    return Cell(
        setting=common["setting"],
        label=label,
        seed=common["seed"],
        digest=digest_of(document | (decisive if trains else {})),
        former_digest=digest_of(document | former),
        method=entry.method,
        training=training,
        rounds=rounds,
        every=every,
    )


def _rounds(rounds: RoundsSection, excluded: set[str]) -> dict[str, Any]:
    """Without later settings at their defaults, so that the first cells keep their digest."""
    fields = RoundsSection.model_fields
    later = {name for name in _LATER_ROUNDS if getattr(rounds, name) == fields[name].default}
    return rounds.model_dump(mode="json", exclude=excluded | later)


def _training(training: TrainingSection) -> Any:
    """As JSON values; without views as before there were any, so that finished cells keep their digests."""
    return training.model_dump(mode="json", exclude=set() if training.views else {"views"})


def declaration(section: MethodSection) -> Method:
    """The method that a section names, with its hyper-parameters. Raises `SpecError`."""
    return parse_hyperparameters(find_method(section.name), section.model_extra or {})


def _means(pattern: str, cell: Cell) -> bool:
    setting, _, label = pattern.partition("/")
    return fnmatch.fnmatchcase(cell.setting, setting) and fnmatch.fnmatchcase(cell.label, label or "*")


def _portable(value: Any, origin: Path) -> Any:
    match value:
        case Path():
            return str(value.relative_to(origin) if value.is_relative_to(origin) else value)
        case dict():
            return {str(key): _portable(item, origin) for key, item in value.items()}
        case list() | tuple():
            return [_portable(item, origin) for item in value]
        case _:
            return value


def _words(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def cells_of(plans: Sequence[FederationPlan]) -> Iterator[Cell]:
    """Every cell, in order."""
    for plan in plans:
        yield from plan.cells
