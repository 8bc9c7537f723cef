"""Finds what would stop a lab before anything is started: methods, weights, images and partitions, all at once."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedrt.architectures import ARCHITECTURES, clip_dims
from fedrt.errors import ConfigurationError, FedrtError, SpecError
from fedrt.experiment_file import experiment_spec
from fedrt.method import ModelDims
from silo.config import ModelSection
from silo.data.labels import normalise
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
from silo.partition.naming import numbered
from silo.partition.sections import PartitionSection

_UNKNOWN_WEIGHTS = "0" * 64
_START_STOP_END = 3  # tokens of a prompt beside context and class name
CLIP_POSITIONS = 77
POSITIONS = {"fedrt-tiny": 40}  # of a text tower, where they are not CLIP's


def checked_plans(lab: LabFile, path: Path) -> tuple[FederationPlan, ...]:
    """The grid of a lab.yaml that lies at `path`, once nothing is found that would stop it.

    Raises `ConfigurationError` with every problem. Images of torchvision that are not exported yet are not looked at.
    """
    unusable = dict(_methods(lab))
    problems = [*unusable.values(), *_model(lab.model)]
    usable = {label: entry for label, entry in lab.methods.items() if label not in unusable}
    plans = expand(lab.model_copy(update={"methods": usable}), path.absolute().parent)
    collections: list[tuple[LabData, Collection | None]] = []
    for data in data_of(lab):
        try:
            collections.append((data, foreseen_collection(data, lab.directory)))
        except FedrtError as error:
            problems.append(str(error))
    for plan in plans:
        found = [collection for data, collection in collections if data == plan.data]
        problems += _federation(lab, plan, found[0]) if found else []
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


def _methods(lab: LabFile) -> Iterator[tuple[str, str]]:
    """The labels whose method cannot be used, each with what is wrong."""
    for label, entry in lab.methods.items():
        try:
            declaration(entry.method)
        except SpecError as error:
            yield label, f"methods.{label}: {error}"


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
    dealt = _assumed(plan.partition)
    if collection is not None:
        try:
            dealt = dealt_of(deal(collection, plan.partition, plan.seed))
        except ConfigurationError as error:
            yield f"settings.{plan.setting} (seed {plan.seed}): {error}"
            return
        yield from (f"settings.{plan.setting}: {problem}" for problem in _same_prompts(dealt))
    if lab.model.architecture in ARCHITECTURES:
        for cell in plan.cells:
            yield from _cell(lab, cell, plan.partition, dealt)


def _assumed(partition: PartitionSection) -> Dealt:
    """What is known of a partition without the images; of silos by domain, of which there are none, one."""
    silos = getattr(partition, "silos", 1)
    novel = ("a new class",) if partition.novel is not None else ()
    return Dealt(("one class", "another class"), novel, {name: {} for name in numbered("silo", silos)}, "")


def _same_prompts(dealt: Dealt) -> Iterator[str]:
    """Classes that CLIP cannot tell apart: a prompt has neither underscores nor capitals."""
    for names in (dealt.classes, dealt.novel_classes):
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(normalise(name), []).append(name)
        for same in alike.values():
            if len(same) > 1:
                yield (
                    f"the classes {' and '.join(map(repr, same))} become the same prompt; give each a name of its own, "
                    "or both the same, with data.class_names"
                )


def _cell(lab: LabFile, cell: Cell, partition: PartitionSection, dealt: Dealt) -> Iterator[str]:
    """What stops one cell, in words of lab.yaml."""
    where = f"settings.{cell.setting} with methods.{cell.label}"
    found = list(_rounds(lab, cell, len(dealt.holdings)))
    try:
        found += [f"{where}: {problem}" for problem in (*_prompts(lab, cell, dealt), *_novel(lab, cell, partition))]
        if not found:
            file = experiment_of(cell, partition, dealt, lab.model.architecture, _UNKNOWN_WEIGHTS)
            experiment_spec(file).local.tensors()
    except SpecError as error:
        found.append(f"{where}: {error}")
    yield from found


def _rounds(lab: LabFile, cell: Cell, silos: int) -> Iterator[str]:
    """More silos than there are; told of the method only if that is where the key is set."""
    own = lab.methods[cell.label].rounds
    for key in ("max_silos", "min_results"):
        wanted = getattr(cell.rounds, key)
        if wanted is not None and wanted > silos:
            place = f" with methods.{cell.label}" if own is not None and key in own.model_fields_set else ""
            yield (
                f"settings.{cell.setting}{place}: rounds.{key} is {wanted}, but the partition has "
                f"{counted(range(silos), 'silo')}; lower it, or leave it out for all"
            )


def _prompts(lab: LabFile, cell: Cell, dealt: Dealt) -> Iterator[str]:
    """A context that leaves no room for the longest class name, counted as one token for each word at least."""
    length = getattr(declaration(cell.method), "context_length", None)
    names = (*dealt.classes, *dealt.novel_classes)
    longest = max(names, key=lambda name: len(normalise(name).split()))
    words, limit = len(normalise(longest).split()), POSITIONS.get(lab.model.architecture, CLIP_POSITIONS)
    needed = _START_STOP_END + words
    if isinstance(length, int) and length + needed > limit:
        yield (
            f"context_length is {length}, but the text tower of {lab.model.architecture} has {limit} positions, and "
            f"class {longest!r} takes {needed} of them or more; use {max(1, limit - needed)} at most"
        )


def _novel(lab: LabFile, cell: Cell, partition: PartitionSection) -> Iterator[str]:
    """A method that learns something for each class has nothing for new ones. Raises `SpecError` like the method."""
    if partition.novel is None:
        return
    method, dims = declaration(cell.method), clip_dims(lab.model.architecture)
    few, more = (method.tensors(ModelDims(*dims, class_count=count)) for count in (2, 3))
    if few != more:
        yield (
            f"method {cell.method.name!r} with these hyper-parameters learns something for each class, which novel "
            "classes lack; remove novel from the setting's partition, or class_specific from the method"
        )


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
