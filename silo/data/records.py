"""The vocabulary of a data index: splits, records, and the index itself."""

import enum
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


class Split(enum.Enum):
    """What an image is for. `BASE`, `NOVEL` and `DOMAIN` are for evaluation too; see `fedrt.spec.EvaluationSplit`."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    BASE = "base"
    NOVEL = "novel"
    DOMAIN = "domain"


SPLIT_NAMES: Mapping[str, Split] = {
    "train": Split.TRAIN,
    "training": Split.TRAIN,
    "val": Split.VALIDATION,
    "valid": Split.VALIDATION,
    "validation": Split.VALIDATION,
    "test": Split.TEST,
    "testing": Split.TEST,
    "base": Split.BASE,
    "novel": Split.NOVEL,
    "domain": Split.DOMAIN,
}
EVALUATED: frozenset[Split] = frozenset({Split.TEST, Split.BASE, Split.NOVEL, Split.DOMAIN})


def find_split(name: str) -> Split | None:
    """The split that a directory or a manifest means, or None; case does not matter."""
    return SPLIT_NAMES.get(name.strip().casefold())


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file as it was found; `name` is its path relative to the root.

    `split` and `domain` are None where none is declared. A silo takes no notice of domains, a partition does.
    """

    path: Path
    name: str
    label: str
    split: Split | None
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One image file. `label` is the silo's own, or what `class_names` makes of it."""

    path: Path
    name: str
    label: str
    split: Split


@dataclass(frozen=True)
class DataIndex:
    """Every image file a silo points at, sorted by split and name. `ignored_count`: files that are no images."""

    records: tuple[Record, ...]
    ignored_count: int = 0

    @cached_property
    def class_counts(self) -> dict[str, dict[str, int]]:
        """Split -> label -> number of files, readable or not."""
        return count_classes(self.records)

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits that agree exactly when names, labels and splits do; contents are not read."""
        rows = [[os.fsencode(record.name).hex(), record.label, record.split.value] for record in self.records]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""
        return tuple(sorted({record.label for record in self.records}))

    def of_split(self, split: Split) -> tuple[Record, ...]:
        """The records of one split, in order."""
        return tuple(record for record in self.records if record.split is split)


def count_classes(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """Split -> label -> number of records; splits and labels without a record are absent."""
    counts = Counter((record.split, record.label) for record in records)
    table: dict[str, dict[str, int]] = {}
    for split in Split:
        labels = {
            label: count
            for (where, label), count in sorted(counts.items(), key=lambda item: item[0][1])
            if where is split
        }
        if labels:
            table[split.value] = labels
    return table
