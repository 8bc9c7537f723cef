"""What a partition is: who holds which images of a collection."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from silo.data.records import Split
from silo.partition.collection import Collection
from silo.partition.sections import PartitionSection

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Holding:
    """What one silo holds: for each split the positions of its images in the collection's items, in order of path.

    TRAIN and TEST are the silo's own, never empty, and no other silo's. BASE, NOVEL and DOMAIN are there if the section
    asks for them, and the same for every silo: the test images of all classes, those of the novel classes, and those of
    all classes in the held-out domain. `domain` is that of the silo's own images, where silos go by domain;
    `class_counts` says how many images of each label a split has, sorted by label.
    """

    silo: str
    domain: str | None
    indices: Mapping[Split, Indices]
    class_counts: Mapping[Split, Mapping[str, int]]


@dataclass(frozen=True)
class Partition:
    """`classes` and `novel_classes` are sorted and disjoint; `section` holds the seed that was used.

    `copy_count` training images are nobody's: they are copies of test images, or of images that a novel class or the
    held-out domain has.
    """

    classes: tuple[str, ...]
    novel_classes: tuple[str, ...]
    holdings: tuple[Holding, ...]
    section: PartitionSection
    digest: str
    copy_count: int = 0

    @property
    def silos(self) -> tuple[str, ...]:
        """The names of the silos, by domain and number."""
        return tuple(holding.silo for holding in self.holdings)

    @property
    def seed(self) -> int:
        """The seed that it was dealt with."""
        return self.section.seed


def count_labels(collection: Collection, indices: Mapping[Split, Indices]) -> dict[Split, Mapping[str, int]]:
    """Split -> label -> number of items, sorted by label."""
    counts = {split: Counter(collection.items[index].label for index in held) for split, held in indices.items()}
    return {split: dict(sorted(found.items())) for split, found in counts.items()}


def digest_of(collection: Collection, classes: Sequence[Sequence[str]], holdings: Sequence[Holding]) -> str:
    """64 hexadecimal digits that agree exactly when collection, classes and every holding do, however they came about.

    The order of the collection's items and its root are not part of it; contents are, as in `Collection.digest`.
    """
    rank = np.empty(len(collection.items), "<i8")
    rank[list(collection.order)] = np.arange(len(collection.items))
    head = [collection.digest, *map(list, classes)]
    digest = hashlib.sha256(json.dumps(head, separators=(",", ":")).encode())
    for holding in holdings:
        for split, indices in holding.indices.items():
            digest.update(f"\n{holding.silo} {split.value} {len(indices)}\n".encode())
            digest.update(rank[list(indices)].tobytes())
    return digest.hexdigest()
