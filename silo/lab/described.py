"""Says in words what a lab runs: the data and the deal of a setting, its rounds and training, and the methods; pure."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from fedrt.method import Method, hyperparameters_json
from silo.lab.grid import FederationPlan, counted, declaration, overlaid, partition_words
from silo.lab.records import CellRecord
from silo.lab.sections import LabData, LabFile


def method_sentences(lab: LabFile, plans: Sequence[FederationPlan]) -> Iterator[str]:
    """For each label the method, its hyper-parameters that are no defaults, and what is other than its setting's."""
    untrained = {cell.label for plan in plans for cell in plan.cells if cell.rounds.count == 0}
    for label, entry in lab.methods.items():
        own = _keys(changed_hyperparameters(declaration(entry.method)))
        parts = [", ".join([f"method {entry.method.name}", *own])]
        parts += ["measured once, without training"] if label in untrained else []
        for name, change in (("rounds", entry.rounds), ("training", entry.training)):
            if change is not None and label not in untrained:
                parts.append(f"{name}: {', '.join(_keys(_set_keys(change)))}")
        yield f"`{label}`: {'; '.join(parts)}."


def setting_sentences(lab: LabFile, plans: Sequence[FederationPlan], records: Sequence[CellRecord]) -> Iterator[str]:
    """The data, the partition, who holds how much, and the setting's rounds and training.

    `plans` and `records` are those of one setting; how many classes and images there are is read from the records.
    """
    setting = lab.settings[plans[0].setting]
    rounds = overlaid(lab.rounds, setting.rounds)
    training, optimizer = (whole := overlaid(lab.training, setting.training)), whole.optimizer
    silos = [len(record.holdings) for record in records]
    yield f"Data: {data_words(plans[0].data)}. Partition: {partition_words(plans[0].partition)}."
    if records:
        yield _held(records)
    asked = rounds.max_silos
    some = asked is not None and (not silos or asked < min(silos))
    yield (
        f"{counted(range(rounds.count), 'round')}{f' of {asked} silos' if some else ''}, "
        f"{counted(range(training.local_epochs), 'local epoch')}, batches of {training.batch_size}, "
        f"{optimizer.name.value} with learning rate {optimizer.learning_rate:g}, momentum {optimizer.momentum:g} and "
        f"weight decay {optimizer.weight_decay:g} ({training.schedule.value}), {training.precision.value}"
        f"{view_words(training.views)}, but for what is said of a method above."
    )


def view_words(views: int) -> str:
    """What is to be said of views after the precision: ", 50 augmented views of each image", or nothing."""
    return f", {counted(range(views), 'augmented view')} of each image" if views else ""


def data_words(data: LabData) -> str:
    """The data set, for people; of a folder its name only."""
    if data.torchvision is not None:
        return data.torchvision
    if data.world is not None:
        return f"drawn scenes of the scanners {', '.join(data.world.scanners)}"
    return f"the folder '{data.root.name if data.root else ''}'"


def changed_hyperparameters(method: Method) -> dict[str, Any]:
    """The hyper-parameters that are not the method's defaults, as JSON values."""
    values: Mapping[str, Any] = json.loads(hyperparameters_json(method))
    changed = {}
    for field in dataclasses.fields(method):  # type: ignore[arg-type]  # every declaration is a dataclass
        made = field.default_factory
        default = made() if made is not dataclasses.MISSING else field.default
        if field.name in values and getattr(method, field.name) != default:
            changed[field.name] = values[field.name]
    return changed


def _held(records: Sequence[CellRecord]) -> str:
    """How many silos, classes and images there are, and among how many classes each split is scored."""
    holdings = [record.holdings for record in records]
    silos = _span(len(held) for held in holdings)
    parts = []
    classes, novel = (_span(counts) for counts in zip(*(class_counts(record) for record in records), strict=True))
    is_novel = novel != "0"
    if classes != "0":
        parts.append(f"{classes} {'base ' * is_novel}classes{f' and {novel} novel ones' if is_novel else ''}")
    for split, words in (("train", "training images"), ("test", "test images of their own")):
        parts.append(f"{_span(sum(one.get(split, 0) for one in held.values()) for held in holdings)} {words}")
    sentence = f"Dealt to {silos} silos: {', '.join(parts)}"
    same = {split: _span(max((one.get(split, 0) for one in held.values()), default=0) for held in holdings)
            for split in ("base", "novel", "domain")}  # fmt: skip
    beside = [f"{count} of the split {split}" for split, count in same.items() if count != "0"]
    sentence += f"; every silo has the same {' and '.join(beside)}." if beside else "."
    if is_novel:
        sentence += (
            f" Personal and base are scored among the {classes} base classes, novel among the {novel} novel ones."
        )
    return sentence


def class_counts(record: CellRecord) -> tuple[int, int]:
    """How many classes, and how many novel ones, the experiment of a cell has; 0 where the record does not say."""
    classes, evaluation = record.experiment.get("classes"), record.experiment.get("evaluation")
    novel = evaluation.get("novel_classes") if isinstance(evaluation, Mapping) else None
    return _length(classes), _length(novel)


def _length(value: object) -> int:
    return len(value) if isinstance(value, list | tuple) else 0


def _span(counts: Iterable[int]) -> str:
    """One number, or the least and the greatest: seeds deal differently."""
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _set_keys(change: BaseModel) -> dict[str, Any]:
    values: dict[str, Any] = change.model_dump(mode="json", exclude_unset=True)
    return values


def _keys(values: Mapping[str, Any], place: str = "") -> list[str]:
    """Each key with its value, those of a mapping within by their dotted names."""
    found: list[str] = []
    for key, value in values.items():
        within = isinstance(value, Mapping)
        found += _keys(value, f"{place}{key}.") if within else [f"{place}{key} {_text(value)}"]
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
