"""A silo's examples as frozen CLIP features: decoded and encoded once for the life of the worker process.

Features are kept by (split, patches), not by experiment: they do not depend on the classes. Pooled features of a run
with patches do not serve one without, because they may differ in the last bit, and a result must not depend on what a
process did before.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from silo.clip.model import FrozenClip
from silo.data import DataIndex, Record, Split
from silo.data.images import UnreadableImage, check_header, read_image
from silo.data.records import count_classes
from silo.method import ImageFeatures
from silo.training import Examples

OnImages = Callable[[int, int], None]  # (images done, images in all)

BATCH = 64  # images at a time through the image tower
DECODERS = 4  # threads
NAMED_IN_LOG = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """The readable images of a split in the order of the index: labels of length N, features of N images."""

    labels: tuple[str, ...]
    images: ImageFeatures


class FeatureCache:
    """Encodes a split when first asked for it, and remembers; owns what is known of unreadable files."""

    def __init__(self, clip: FrozenClip, index: DataIndex, max_unreadable_share: float) -> None:
        self._clip = clip
        self._index = index
        self._max_unreadable_share = max_unreadable_share
        self._encoded: dict[tuple[Split, bool], Encoded] = {}
        self._unreadable: dict[Split, frozenset[Record]] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label of the index, sorted."""
        return self._index.labels

    @property
    def unreadable_count(self) -> int:
        """Files found unreadable so far."""
        return sum(map(len, self._unreadable.values()))

    @property
    def class_counts(self) -> dict[str, dict[str, int]]:
        """Split -> label -> files not found unreadable so far."""
        return count_classes(
            record for record in self._index.records if record not in self._unreadable.get(record.split, ())
        )

    def survey(self) -> None:
        """Open every file, without decoding pixels: finds missing files and wrong types before any work starts.

        Raises `WorkError` if more are unreadable than the silo allows.
        """
        with ThreadPoolExecutor(DECODERS) as pool:
            reasons = list(pool.map(_header_problem, self._index.records))
        problems = {
            record: reason for record, reason in zip(self._index.records, reasons, strict=True) if reason is not None
        }
        for split in Split:
            self._note(split, {record: reason for record, reason in problems.items() if record.split is split})

    def encode(self, split: Split, patches: bool, on_images: OnImages) -> Encoded:
        """Raises `WorkError` if the split is empty or more is unreadable than the silo allows."""
        key = (split, patches)
        if key not in self._encoded:
            self._encoded[key] = self._encode(split, patches, on_images)
        return self._encoded[key]

    def _encode(self, split: Split, patches: bool, on_images: OnImages) -> Encoded:
        records = self._index.of_split(split)
        if not records:
            raise WorkError(FailureReason.DATA_UNAVAILABLE, f"this silo has no {split.value} examples")
        labels: list[str] = []
        parts: list[ImageFeatures] = []
        problems: dict[Record, str] = {}
        done = 0
        for batch, prepared in _prepared(records, self._clip.preprocess):
            readable: list[Tensor] = []
            for record, pixels in zip(batch, prepared, strict=True):
                if isinstance(pixels, Tensor):
                    labels.append(record.label)
                    readable.append(pixels)
                else:
                    problems[record] = pixels
            if readable:
                parts.append(self._clip.encode_images(torch.stack(readable), patches))
            done += len(batch)
            on_images(done, len(records))
        self._note(split, problems)
        if not parts:
            raise WorkError(FailureReason.DATA_UNAVAILABLE, f"this silo has no readable {split.value} examples")
        return Encoded(tuple(labels), _concatenated(parts))

    def _note(self, split: Split, problems: Mapping[Record, str]) -> None:
        self._unreadable[split] = frozenset(problems)
        if not problems:
            return
        for record, reason in list(problems.items())[:NAMED_IN_LOG]:
            log.warning("unreadable image %r: %s", record.name, reason)
        if len(problems) > NAMED_IN_LOG:
            log.warning("%d more unreadable images are not listed", len(problems) - NAMED_IN_LOG)
        total = len(self._index.of_split(split))
        if len(problems) > self._max_unreadable_share * total:
            raise WorkError(
                FailureReason.DATA_UNAVAILABLE,
                f"{len(problems)} of {total} {split.value} images are unreadable; "
                f"this silo skips up to {self._max_unreadable_share:.2%} (data.max_unreadable_share)",
            )


class ExperimentData:
    """A silo's examples with labels as one experiment counts them."""

    def __init__(self, cache: FeatureCache, indices: Mapping[str, int], on_images: OnImages) -> None:
        self._cache = cache
        self._indices = indices
        self._on_images = on_images

    def features(self, split: Split, patches: bool) -> Examples:
        """The readable examples of a split on CLIP's device; labels [N] index the experiment's classes.

        Raises `WorkError` if there are none, or if more is unreadable than the silo allows.
        """
        encoded = self._cache.encode(split, patches, self._on_images)
        labels = torch.tensor([self._indices[label] for label in encoded.labels])
        return Examples(encoded.images, labels.to(encoded.images.pooled.device))


Prepared = Tensor | str  # pixels [3, H, W], or why there are none


def _prepared(
    records: Sequence[Record], preprocess: Callable[..., Tensor]
) -> Iterator[tuple[Sequence[Record], list[Prepared]]]:
    """Batches with their pixels; while one is being encoded, threads decode the next."""

    def prepare(record: Record) -> Prepared:
        try:
            return preprocess(read_image(record.path))
        except UnreadableImage as problem:
            return str(problem)

    with ThreadPoolExecutor(DECODERS) as pool:
        waiting: tuple[Sequence[Record], list[Future[Prepared]]] | None = None
        for at in range(0, len(records), BATCH):
            batch = records[at : at + BATCH]
            following = (batch, [pool.submit(prepare, record) for record in batch])
            if waiting is not None:
                yield waiting[0], [future.result() for future in waiting[1]]
            waiting = following
        if waiting is not None:
            yield waiting[0], [future.result() for future in waiting[1]]


def _concatenated(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    patches = [part.patches for part in parts if part.patches is not None]
    return ImageFeatures(torch.cat([part.pooled for part in parts]), torch.cat(patches) if patches else None)


def _header_problem(record: Record) -> str | None:
    try:
        check_header(record.path)
    except UnreadableImage as problem:
        return str(problem)
    return None
