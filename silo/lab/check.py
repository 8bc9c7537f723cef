"""Finds what would stop a lab before anything is started: methods, weights, images and partitions, all at once."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedrt.architectures import clip_dims
from fedrt.errors import ConfigurationError, FedrtError, SpecError
from fedrt.experiment_file import experiment_spec
from silo.config import ModelSection
from silo.embedded import embedded_paths
from silo.lab.grid import (
    Cell,
    Dealt,
    FederationPlan,
    cells_of,
    counted,
    declaration,
    expand,
    experiment_of,
    partition_words,
)
from silo.lab.images import data_of, foreseen_collection
from silo.lab.sections import LabData, LabFile
from silo.partition.collection import Collection
from silo.partition.dealing import deal
from silo.partition.holdings import Partition

_UNKNOWN_WEIGHTS = "0" * 64
_ANY_CLASSES = Dealt(("one class", "another class"), (), {"silo-01": {}}, "")


def checked_plans(lab: LabFile, path: Path) -> tuple[FederationPlan, ...]:
    """The grid of a lab.yaml that lies at `path`, once nothing is found that would stop it.

    Raises `ConfigurationError` with every problem. Images of torchvision that are not exported yet are not looked at.
    """
    problems = [*_methods(lab), *_model(lab.model)]
    if problems:
        raise listed(path, problems)
    plans = expand(lab, path.absolute().parent)
    collections: list[tuple[LabData, Collection | None]] = []
    for data in data_of(lab):
        try:
            collections.append((data, foreseen_collection(data, lab.directory)))
        except FedrtError as error:
            problems.append(str(error))
    if not problems:
        for plan in plans:
            found = next(collection for data, collection in collections if data == plan.data)
            problems += _federation(lab, plan, found)
    if problems:
        raise listed(path, list(dict.fromkeys(problems)))
    return plans


def listed(path: Path, problems: Sequence[str]) -> ConfigurationError:
    """One error with all problems of a file."""
    if len(problems) == 1:
        return ConfigurationError(f"{path}: {problems[0]}")
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigurationError(f"{path}: {len(problems)} problems{lines}")


def dealt_of(partition: Partition) -> Dealt:
    """What the grid needs to know of a partition."""
    holdings = {
        holding.silo: {split.value: len(indices) for split, indices in holding.indices.items()}
        for holding in partition.holdings
    }
    return Dealt(partition.classes, partition.novel_classes, holdings, partition.digest)


def weights_sha256(model: ModelSection) -> str:
    """The digest of the weights, as silos report it. A tag imports torch, and its file is downloaded unless cached.

    Raises `ConfigurationError` if the weights cannot be had.
    """
    path = weights_file(model)
    if path is None:
        from silo.clip.weights import weights_sha256 as digest_of_tag  # noqa: PLC0415  # imports torch
        from silo.sources import ModelSource  # noqa: PLC0415

        return digest_of_tag(ModelSource(model.architecture, model.weights))
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigurationError(
            f"model.weights '{path}' cannot be read ({error.strerror}); copy the weights there or correct the path"
        ) from None


def weights_file(model: ModelSection) -> Path | None:
    """The file with the weights; None for a tag. A path in a YAML file is absolute once it is read, a tag never is."""
    if model.weights == "embedded":
        return embedded_paths().weights_path
    return Path(model.weights) if Path(model.weights).is_absolute() else None


def _methods(lab: LabFile) -> Iterator[str]:
    for label, entry in lab.methods.items():
        try:
            declaration(entry.method)
        except SpecError as error:
            yield f"methods.{label}: {error}"


def _model(model: ModelSection) -> Iterator[str]:
    try:
        clip_dims(model.architecture)
    except SpecError as error:
        yield str(error)
    path = weights_file(model)
    if path is not None and not path.is_file():
        yield f"model.weights: file '{path}' does not exist; copy the weights there or correct the path"
    if model.weights == "embedded" and model.architecture != "fedrt-tiny":
        yield f"model.weights 'embedded' belongs to 'fedrt-tiny', not to {model.architecture!r}; name a weights file"


def _federation(lab: LabFile, plan: FederationPlan, collection: Collection | None) -> Iterator[str]:
    dealt = replace(_ANY_CLASSES, novel_classes=("a new class",) if plan.partition.novel is not None else ())
    if collection is not None:
        try:
            dealt = dealt_of(deal(collection, plan.partition, plan.seed))
        except ConfigurationError as error:
            yield f"settings.{plan.setting} (seed {plan.seed}): {error}"
            return
    for cell in plan.cells:
        yield from _cell(lab, cell, plan, dealt)


def _cell(lab: LabFile, cell: Cell, plan: FederationPlan, dealt: Dealt) -> Iterator[str]:
    try:
        file = experiment_of(cell, plan.partition, dealt, lab.model.architecture, _UNKNOWN_WEIGHTS)
        experiment_spec(file).local.tensors()
    except SpecError as error:
        yield f"settings.{cell.setting} with methods.{cell.label}: {error}"


def grid_text(lab: LabFile, plans: Sequence[FederationPlan], finished: Mapping[str, object]) -> str:
    """The grid for people: how many cells, of what, and how many are finished."""
    cells = list(cells_of(plans))
    lines = [
        f"lab {lab.lab}: {counted(cells, 'cell')} = {counted(lab.settings, 'setting')} x "
        f"{counted(lab.methods, 'method')} x {counted(lab.seeds, 'seed')}; "
        f"{sum(cell.cell_id in finished for cell in cells)} finished",
    ]
    for name in lab.settings:
        partition = next((plan.partition for plan in plans if plan.setting == name), None)
        lines.append(f"  setting {name}" + (f": {partition_words(partition)}" if partition else ""))
        for label in lab.methods:
            of_both = [cell for cell in cells if (cell.setting, cell.label) == (name, label)]
            if of_both:
                done = sum(cell.cell_id in finished for cell in of_both)
                seeds = ", ".join(str(cell.seed) for cell in of_both)
                lines.append(
                    f"    {label}: {of_both[0].method.name}, {of_both[0].rounds.count} rounds, seeds {seeds}; "
                    f"{done} of {len(of_both)} finished"
                )
    return "\n".join(lines)
