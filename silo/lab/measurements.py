"""Finished cells as a tidy table: one value a row, and `results.csv`."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from fedrt.errors import DamageError
from fedrt.spec import EvaluationSplit
from fedrt.statefile import storage_error, write_atomic
from fedrt.task import TaskKind
from silo.data.records import Split
from silo.lab.records import CellRecord

TRAINING = Split.TRAIN.value
PERSONAL = EvaluationSplit.PERSONAL.value


@dataclass(frozen=True)
class Measurement:
    """A measure of one silo on one split after one round; `examples` is the number of images it is a mean over.

    Split `train` holds what local training reports, such as its loss; the others are evaluations. A result counts the
    images of training and of the personal split only: beside these, `examples` is None.
    """

    setting: str
    method: str
    seed: int
    round: int
    silo: str
    split: str
    measure: str
    value: float
    examples: int | None


COLUMNS = tuple(field.name for field in fields(Measurement))


def measurements(record: CellRecord) -> Iterator[Measurement]:
    """Every measurement of a cell, by round, silo and name."""
    for part in record.rounds:
        if not part.succeeded:
            continue
        for silo, given in sorted(part.silos.items()):
            for name, value in sorted(given.metrics.items()):
                split, measure = (TRAINING, name) if part.task == TaskKind.TRAIN.value else split_metric(name)
                examples = given.examples if split in (TRAINING, PERSONAL) else None
                yield Measurement(
                    record.setting, record.method, record.seed, part.round, silo, split, measure, value, examples
                )


def split_metric(name: str) -> tuple[str, str]:
    """Split and measure of a metric's name: those of the personal split have no prefix."""
    for split in EvaluationSplit:
        if split is not EvaluationSplit.PERSONAL and name.startswith(f"{split.value}_"):
            return split.value, name.removeprefix(f"{split.value}_")
    return PERSONAL, name


def write_csv(path: Path, rows: Iterable[Measurement]) -> None:
    """Write results.csv, numbers in full precision. Raises `StorageError`."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows(astuple(row) for row in rows)
    write_atomic(path, text.getvalue().encode(), 0o644)


def read_csv(path: Path) -> list[Measurement]:
    """The rows of a results.csv, exactly as they were written. Raises `DamageError` for another file."""
    try:
        reader = csv.reader(io.StringIO(path.read_text("utf-8"), newline=""))
    except OSError as error:
        raise storage_error("read", path, error) from error
    if tuple(next(reader, [])) != COLUMNS:
        raise DamageError(f"'{path}' is not a results.csv; `fedrt-lab report` writes it anew")
    try:
        return [_row(values) for values in reader]
    except ValueError as error:
        raise DamageError(f"'{path}', line {reader.line_num}: {error}; `fedrt-lab report` writes it anew") from None


def _row(values: list[str]) -> Measurement:
    setting, method, seed, number, silo, split, measure, value, examples = values
    counted = int(examples) if examples else None
    return Measurement(setting, method, int(seed), int(number), silo, split, measure, float(value), counted)
