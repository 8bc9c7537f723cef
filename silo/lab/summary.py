"""What finished cells add up to: numbers of the last round, means over silos, spreads over seeds; pure.

Rules of the file: a cell's value is the unweighted mean over its silos, after the last round and never the best one. A
spread is the mean over seeds with the sample standard deviation (n - 1), which one seed does not have. The harmonic
mean is taken per seed, before the mean over seeds.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedrt.spec import EvaluationSplit
from fedrt.task import TaskKind
from silo.lab.measurements import PERSONAL, split_metric
from silo.lab.records import CellRecord

HARMONIC = "harmonic"
BASE, NOVEL, DOMAIN = (split.value for split in (EvaluationSplit.BASE, EvaluationSplit.NOVEL, EvaluationSplit.DOMAIN))
LOWER_IS_BETTER = frozenset({"loss", "calibration_error"})


@dataclass(frozen=True)
class Quantity:
    """What a column of a table shows: a measure on a split; the split `harmonic` is over personal, base and novel."""

    split: str
    measure: str


@dataclass(frozen=True)
class CellValue:
    """A quantity of one cell: the mean over those of its silos that have it. `silos` were measured at all."""

    mean: float
    present: int
    silos: int


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; no deviation with one seed only."""

    mean: float
    deviation: float | None
    seeds: int


def harmonic_mean(personal: float, base: float, novel: float) -> float:
    """3 / (1/personal + 1/base + 1/novel); 0 if one of them is 0."""
    return 3 / (1 / personal + 1 / base + 1 / novel) if min(personal, base, novel) > 0 else 0.0


def spread(values: Sequence[float]) -> Spread:
    """Over seeds. Raises `ValueError` without values."""
    if not values:
        raise ValueError("there are no values to take the mean of")
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def last_values(record: CellRecord) -> dict[Quantity, CellValue]:
    """Every quantity of a cell after its last round; empty if it was never measured there."""
    evaluations = record.of_task(TaskKind.EVALUATE.value)
    return values_after(record, evaluations[-1].round) if evaluations else {}


def values_after(record: CellRecord, number: int) -> dict[Quantity, CellValue]:
    """Every quantity of a cell after round `number`."""
    found: dict[Quantity, list[float]] = {}
    silos = 0
    for part in record.of_task(TaskKind.EVALUATE.value):
        if part.round != number:
            continue
        silos = len(part.silos)
        for given in part.silos.values():
            for name, value in given.metrics.items():
                found.setdefault(Quantity(*split_metric(name)), []).append(value)
    values = {
        quantity: CellValue(statistics.fmean(numbers), len(numbers), silos) for quantity, numbers in found.items()
    }
    parts = [values.get(Quantity(split, "accuracy")) for split in (PERSONAL, BASE, NOVEL)]
    if all(part is not None for part in parts):
        personal, base, novel = (part.mean for part in parts if part is not None)
        values[Quantity(HARMONIC, "accuracy")] = CellValue(harmonic_mean(personal, base, novel), silos, silos)
    return values


def over_seeds(cells: Iterable[Mapping[Quantity, CellValue]], quantity: Quantity) -> Spread | None:
    """The spread of a quantity over cells that differ in their seed; None if no cell has it."""
    values = [cell[quantity].mean for cell in cells if quantity in cell]
    return spread(values) if values else None


def leader(column: Mapping[str, Spread | None], seeds: int, lower_is_better: bool = False) -> str | None:
    """The row whose value is ahead of the second best by more than the larger spread of the two, if there is one.

    None where that cannot be said: with one row or one seed, or unless every row has all of the lab's `seeds`, because
    means over different seeds are of different images.
    """
    if any(value is None or value.seeds != seeds for value in column.values()):
        return None
    sign = -1 if lower_is_better else 1
    ranked = sorted(
        ((name, value) for name, value in column.items() if value is not None),
        key=lambda row: sign * row[1].mean,
        reverse=True,
    )
    if len(ranked) < 2:
        return None
    (name, first), (_, second) = ranked[:2]
    if first.deviation is None or second.deviation is None:
        return None
    return name if abs(first.mean - second.mean) > max(first.deviation, second.deviation) else None


def curve(records: Sequence[CellRecord], quantity: Quantity) -> list[tuple[int, Spread]]:
    """(round, spread over seeds) of a quantity, for the rounds that every one of the cells was measured after."""
    numbers = [{part.round for part in record.of_task(TaskKind.EVALUATE.value)} for record in records]
    if not numbers:
        return []
    points = []
    for number in sorted(set.intersection(*numbers)):
        found = over_seeds((values_after(record, number) for record in records), quantity)
        if found is not None:
            points.append((number, found))
    return points
