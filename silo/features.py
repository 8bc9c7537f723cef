"""Frozen CLIP features of images, decoded and encoded once for the life of the worker process.

An image is encoded once, whichever splits and virtual silos it serves, in batches of a fixed size, the last one filled
up: so its features depend neither on the images beside it nor on what the process did before. Pooled features of a run
with patches do not serve one without, because they may differ in the last bit.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from silo.clip.model import FrozenClip
from silo.data import DataIndex, Record, Split
from silo.data.images import UnreadableImage, check_header, read_image
from silo.data.records import count_classes
from silo.examples import Examples
from silo.method import ImageFeatures

OnImages = Callable[[int, int], None]  # (images done, images in all)

BATCH = 32  # images at a time through the image tower, always
DECODERS = 4  # threads
NAMED_IN_LOG = 20
MOST_CHOSEN = 4096  # lists of rows that are remembered, one for each silo, split and list of classes

log = logging.getLogger(__name__)


class FeatureCache:
    """Encodes images when first asked for them, and remembers; owns what is known of unreadable files.

    `indices`: what each virtual silo of this process holds, or the daemon itself under ""; `max_unreadable_share` of
    each of them.
    """

    def __init__(
        self, clip: FrozenClip, indices: Mapping[str, DataIndex], max_unreadable_share: Mapping[str, float]
    ) -> None:
        self._clip = clip
        self._records = {(silo, split): index.of_split(split) for silo, index in indices.items() for split in Split}
        self._silos = tuple(indices)
        self._labels = {key: frozenset(one.label for one in records) for key, records in self._records.items()}
        self._max_unreadable_share = max_unreadable_share
        self._tables: dict[bool, _Table] = {}
        self._chosen: dict[tuple[str, Split, bool, tuple[tuple[str, int], ...]], tuple[Tensor, Tensor]] = {}
        self._unreadable: dict[Path, str] = {}

    def labels(self, silo: str, splits: Collection[Split]) -> tuple[str, ...]:
        """The distinct labels of some splits, sorted."""
        return tuple(sorted({label for split in splits for label in self._labels[silo, split]}))

    def holds(self, silo: str, split: Split) -> bool:
        """Whether the silo has images of a split, readable or not."""
        return bool(self._records[silo, split])

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
        with ThreadPoolExecutor(DECODERS) as pool:
            reasons = list(pool.map(_header_problem, records.values()))
        self._note({record: why for record, why in zip(records.values(), reasons, strict=True) if why is not None})
        for silo, split in self._records:
            self._check(silo, split)

    def examples(
        self, silo: str, split: Split, patches: bool, indices: Mapping[str, int], on_images: OnImages
    ) -> Examples:
        """The readable examples of a split, in the order of the index; `indices` gives the class of each label.

        Raises `WorkError` if there are none, or if more is unreadable than the silo allows.
        """
        if not self._records[silo, split]:
            raise WorkError(FailureReason.DATA_UNAVAILABLE, f"this silo has no {split.value} examples")
        key = (silo, split, patches, tuple(sorted(indices.items())))
        if key not in self._chosen:
            if len(self._chosen) >= MOST_CHOSEN:
                self._chosen.clear()
            self._chosen[key] = self._choose(silo, split, patches, indices, on_images)
        return Examples(self._tables[patches].features, *self._chosen[key])

    def _choose(
        self, silo: str, split: Split, patches: bool, indices: Mapping[str, int], on_images: OnImages
    ) -> tuple[Tensor, Tensor]:
        """Rows and labels of the readable examples of a split. Rows stay what they are: a table only grows."""
        records = self._records[silo, split]
        table = self._tables.get(patches)
        if table is None or any(r.path not in table.rows and r.path not in self._unreadable for r in records):
            table = self._encode(split, patches, on_images)
        self._check(silo, split)
        readable = [record for record in records if record.path in table.rows]
        if not readable:
            raise WorkError(FailureReason.DATA_UNAVAILABLE, f"this silo has no readable {split.value} examples")
        device = table.features.pooled.device
        rows = torch.tensor([table.rows[record.path] for record in readable], device=device)
        return rows, torch.tensor([indices[record.label] for record in readable], device=device)

    def _encode(self, split: Split, patches: bool, on_images: OnImages) -> "_Table":
        """Add what is missing of a split, of all silos at once, to the table of features with or without patches."""
        table = self._tables.get(patches, _Table({}, None))
        wanted = {record.path: record for silo in self._silos for record in self._records[silo, split]}
        missing = [record for path, record in wanted.items() if path not in table.rows]
        missing = [record for record in missing if record.path not in self._unreadable]
        rows, parts = dict(table.rows), [] if table.content is None else [table.content]
        problems: dict[Record, str] = {}
        encoder = _Encoder(self._clip, patches)
        for record, prepared in _prepared(missing, self._clip.preprocess):
            if isinstance(prepared, Tensor):
                rows[record.path] = len(rows)
                parts += encoder.add(prepared)
            else:
                problems[record] = prepared
            encoder.done += 1
            if encoder.done % BATCH == 0 or encoder.done == len(missing):
                on_images(encoder.done, len(missing))
        parts += encoder.rest()
        self._note(problems)
        self._tables[patches] = _Table(rows, _concatenated(parts) if parts else None)
        return self._tables[patches]

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
    """Features of images by row; no content before the first image."""

    rows: Mapping[Path, int]
    content: ImageFeatures | None

    @property
    def features(self) -> ImageFeatures:
        if self.content is None:
            raise WorkError(FailureReason.DATA_UNAVAILABLE, "none of this silo's images is readable")
        return self.content


class _Encoder:
    """Collects prepared images into batches of `BATCH` for the image tower."""

    def __init__(self, clip: FrozenClip, patches: bool) -> None:
        self._clip = clip
        self._patches = patches
        self._waiting: list[Tensor] = []
        self.done = 0

    def add(self, pixels: Tensor) -> list[ImageFeatures]:
        """The features of a batch, when this image completes one."""
        self._waiting.append(pixels)
        return self.rest() if len(self._waiting) == BATCH else []

    def rest(self) -> list[ImageFeatures]:
        """The features of what waits; the batch is filled up with its first image. Raises `WorkError`."""
        count = len(self._waiting)
        if not count:
            return []
        batch = torch.stack([*self._waiting, *[self._waiting[0]] * (BATCH - count)])
        self._waiting = []
        pooled, patches = self._clip.encode_images(batch, self._patches)
        features = ImageFeatures(pooled[:count], None if patches is None else patches[:count])
        if not all(bool(torch.isfinite(part).all()) for part in features if part is not None):
            raise WorkError(
                FailureReason.NOT_FINITE, "CLIP's features of some images are not finite; check the model's weights"
            )
        return [features]


Prepared = Tensor | str  # pixels [3, H, W], or why there are none


def _prepared(records: Sequence[Record], preprocess: Callable[..., Tensor]) -> Iterator[tuple[Record, Prepared]]:
    """The images with their pixels, in order; while a batch is being encoded, threads decode the next two."""

    def prepare(record: Record) -> Prepared:
        try:
            return preprocess(read_image(record.path))
        except UnreadableImage as problem:
            return str(problem)

    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: list[tuple[Record, Future[Prepared]]] = []
        for record in records:
            waiting.append((record, pool.submit(prepare, record)))
            if len(waiting) > 2 * BATCH:
                first, future = waiting.pop(0)
                yield first, future.result()
        for record, future in waiting:
            yield record, future.result()


def _concatenated(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    patches = [part.patches for part in parts if part.patches is not None]
    return ImageFeatures(torch.cat([part.pooled for part in parts]), torch.cat(patches) if patches else None)


def _header_problem(record: Record) -> str | None:
    try:
        check_header(record.path)
    except UnreadableImage as problem:
        return str(problem)
    return None
