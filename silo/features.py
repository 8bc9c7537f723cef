"""Frozen CLIP features of images, encoded once for each image and view; owns what is known of unreadable files.

They are found by the content of the image file, in memory or on disk (`silo.feature_store`), whichever splits and
virtual silos an image serves. Whether they were found or just computed makes no difference to their bits. Pooled
features of a run with patches do not serve one without, because they may differ in the last bit.
"""

import logging
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from fedrt.errors import FailureReason, WorkError
from silo.clip.model import FrozenClip
from silo.data import DataIndex, Record, Split
from silo.data.images import UnreadableImage, check_header
from silo.data.records import count_classes
from silo.encoding import decoder_count
from silo.examples import Examples, FeatureTable
from silo.extraction import Extracted, Extraction, OnImages
from silo.feature_store import FeatureStore, map_in_parts
from silo.feature_tables import rows_device, table_of
from silo.sources import ElementType

NAMED_IN_LOG = 20
MOST_CHOSEN = 4096  # lists of rows that are remembered, one for each silo, split and list of classes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """What is asked for of all images of a split, in all virtual silos: with `views` > 0 that many augmented views."""

    split: Split
    patches: bool
    views: int = 0


@dataclass(frozen=True)
class Built:
    """What became of `FeatureCache.build`: images with all their views, those encoded just now, rows not on disk."""

    image_count: int
    encoded_count: int
    in_memory_count: int


class FeatureCache:
    """Encodes images when first asked for them, unless the store has them.

    `indices`: what each virtual silo of this process holds, or the daemon itself under ""; `max_unreadable_share` of
    each of them. Without a store features live as long as the process.
    """

    def __init__(
        self,
        clip: FrozenClip,
        indices: Mapping[str, DataIndex],
        max_unreadable_share: Mapping[str, float],
        store: FeatureStore | None = None,
        element_type: ElementType = "float32",
    ) -> None:
        self._clip = clip
        self._records = {(silo, split): index.of_split(split) for silo, index in indices.items() for split in Split}
        self._silos = tuple(indices)
        self._labels = {key: frozenset(one.label for one in records) for key, records in self._records.items()}
        self._max_unreadable_share = max_unreadable_share
        self._element_type = element_type
        self._extractions = {patches: Extraction(clip, patches, store, element_type) for patches in (False, True)}
        self._tables: dict[Features, _Table] = {}
        self._chosen: dict[tuple[str, Features, tuple[tuple[str, int], ...]], Examples] = {}
        self._unreadable: dict[Path, str] = {}

    def labels(self, silo: str, splits: Collection[Split]) -> tuple[str, ...]:
        """The distinct labels of some splits, sorted."""
        return tuple(sorted({label for split in splits for label in self._labels[silo, split]}))

    def holds(self, silo: str, split: Split) -> bool:
        """Whether the silo has images of a split, readable or not."""
        return bool(self._records[silo, split])

    def is_held(self, split: Split) -> bool:
        """Whether any silo has images of a split."""
        return any(self._records[silo, split] for silo in self._silos)

    @property
    def unreadable_count(self) -> int:
        """Files found unreadable so far."""
        return len(self._unreadable)

    @property
    def class_counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Silo -> split -> label -> files not found unreadable so far."""
        return {
            silo: count_classes(
                record
                for split in Split
                for record in self._records[silo, split]
                if record.path not in self._unreadable
            )
            for silo in self._silos
        }

    def survey(self) -> None:
        """Open every file, without decoding pixels: finds missing files and wrong types before any work starts.

        Raises `WorkError` if more of a split are unreadable than a silo allows.
        """
        records = {record.path: record for records in self._records.values() for record in records}
        with ThreadPoolExecutor(decoder_count()) as pool:
            reasons = list(map_in_parts(pool, _header_problem, list(records.values())))
        self._note({record: why for record, why in zip(records.values(), reasons, strict=True) if why is not None})
        for silo, split in self._records:
            self._check(silo, split)

    def examples(
        self,
        silo: str,
        split: Split,
        patches: bool,
        indices: Mapping[str, int],
        on_images: OnImages,
        views: int = 0,
    ) -> Examples:
        """The readable examples of a split, in the order of the index; `indices` gives the class of each label.

        With `views`, that many augmented views of each, counted from 0 in `Examples`; else the plain view. Raises
        `WorkError` if there are none, or if more is unreadable than the silo allows.
        """
        if not self._records[silo, split]:
            raise WorkError(FailureReason.DATA_UNAVAILABLE, f"this silo has no {split.value} examples")
        wanted = Features(split, patches, views)
        key = (silo, wanted, tuple(sorted(indices.items())))
        if key not in self._chosen:
            if wanted not in self._tables:
                self._tables[wanted] = self._table(wanted, on_images)
            self._check(silo, split)
            if len(self._chosen) >= MOST_CHOSEN:
                self._chosen.clear()
            self._chosen[key] = self._choose(silo, wanted, indices)
        return self._chosen[key]

    @property
    def storage_problem(self) -> str | None:
        """Why features were not kept on disk when that was tried last, if they were not."""
        problems = (one.storage_problem for one in self._extractions.values())
        return next((problem for problem in problems if problem is not None), None)

    def build(self, wanted: Features, on_images: OnImages) -> Built:
        """See that all features of a split exist, on disk if there is a store. Raises `WorkError`."""
        extracted = self._extract(wanted, on_images)
        for silo in self._silos:
            self._check(silo, wanted.split)
        in_memory_count = self._extractions[wanted.patches].in_memory_count
        return Built(len(extracted.rows), extracted.encoded_count, in_memory_count)

    def _choose(self, silo: str, wanted: Features, indices: Mapping[str, int]) -> Examples:
        """The readable examples of a split; rows are [V, N] with augmented views."""
        table, device = self._tables[wanted], self._clip.device
        readable = [record for record in self._records[silo, wanted.split] if record.path in table.numbers]
        if not readable or table.features is None:
            raise WorkError(FailureReason.DATA_UNAVAILABLE, f"this silo has no readable {wanted.split.value} examples")
        rows = torch.tensor([table.numbers[record.path] for record in readable])
        if wanted.views:
            rows = rows + len(table.numbers) * torch.arange(wanted.views)[:, None]
        labels = torch.tensor([indices[record.label] for record in readable], device=device)
        digest = sha256(f"{self._element_type} {wanted}".encode())
        for record in readable:
            digest.update(table.contents[record.path])
        return Examples(table.features, rows.to(rows_device(table.features, device)), labels, digest.hexdigest())

    def _table(self, wanted: Features, on_images: OnImages) -> "_Table":
        extracted = self._extract(wanted, on_images)
        listed = [rows[view] for view in range(max(1, wanted.views)) for rows in extracted.rows.values()]
        numbers = {path: number for number, path in enumerate(extracted.rows)}
        return _Table(numbers, table_of(listed, self._clip.device) if listed else None, extracted.contents)

    def _extract(self, wanted: Features, on_images: OnImages) -> Extracted:
        """The rows of all silos' images of a split."""
        records = {record.path: record for silo in self._silos for record in self._records[silo, wanted.split]}
        known = [record for path, record in records.items() if path not in self._unreadable]
        extracted = self._extractions[wanted.patches].rows(known, wanted.views, on_images)
        self._note({records[path]: problem for path, problem in extracted.problems.items()})
        return extracted

    def _note(self, problems: Mapping[Record, str]) -> None:
        self._unreadable |= {record.path: reason for record, reason in problems.items()}
        for record, reason in list(problems.items())[:NAMED_IN_LOG]:
            log.warning("unreadable image %r: %s", record.name, reason)
        if len(problems) > NAMED_IN_LOG:
            log.warning("%d more unreadable images are not listed", len(problems) - NAMED_IN_LOG)

    def _check(self, silo: str, split: Split) -> None:
        records = self._records[silo, split]
        unreadable = sum(record.path in self._unreadable for record in records)
        share = self._max_unreadable_share[silo]
        if unreadable > share * len(records):
            raise WorkError(
                FailureReason.DATA_UNAVAILABLE,
                f"{unreadable} of {len(records)} {split.value} images are unreadable; "
                f"this silo skips up to {share:.2%} (data.max_unreadable_share)",
            )


@dataclass(frozen=True)
class _Table:
    """Features of images by their number, those of view v by the number plus v times the images; none of no image."""

    numbers: Mapping[Path, int]
    features: FeatureTable | None
    contents: Mapping[Path, bytes]


def _header_problem(record: Record) -> str | None:
    try:
        check_header(record.path)
    except UnreadableImage as problem:
        return str(problem)
    return None
