"""Finds the features of images by their content, and encodes those that are neither in memory nor on disk."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedrt.errors import FailureReason, WorkError
from silo.clip.model import FrozenClip
from silo.data import Record
from silo.encoding import BATCH, VIEWS_AT_ONCE, Decoded, Encoder, Wanted, decode_all
from silo.feature_store import (
    PLAIN,
    Contents,
    FeatureKind,
    FeatureStore,
    KeptRows,
    Row,
    RowKey,
    row_key,
)
from silo.sources import ElementType

OnImages = Callable[[int, int], None]  # (images encoded, images to encode)

ATTEMPTS = 2  # at encoding what is missing: files may change meanwhile, and a disk may lose what it was given
LOOK_INTERVAL = 256  # files that are looked at between two calls of `on_images`

log = logging.getLogger(__name__)


@dataclass
class Extracted:
    """The rows of each readable image, one for each view; why others cannot be read; how many images were encoded.

    `contents`: the SHA-256 of each readable image file.
    """

    rows: dict[Path, list[Row]] = field(default_factory=dict)
    contents: dict[Path, bytes] = field(default_factory=dict)
    problems: dict[Path, str] = field(default_factory=dict)
    encoded_count: int = 0


class Extraction:
    """One CLIP's features, with patches or without; without a store they live in the memory of the process."""

    def __init__(self, clip: FrozenClip, patches: bool, store: FeatureStore | None, element_type: ElementType) -> None:
        self._clip = clip
        self._patches = patches
        self._element_type: ElementType = element_type
        self._contents = Contents(None) if store is None else store.contents
        self._kept = KeptRows(None if store is None else lambda: store.shelf(self._kind()))

    @property
    def in_memory_count(self) -> int:
        """Rows that will be lost with the process."""
        return self._kept.in_memory_count

    @property
    def storage_problem(self) -> str | None:
        """Why the disk refused rows when it was tried last, if it did."""
        return self._kept.problem

    def rows(self, records: Sequence[Record], views: int, on_images: OnImages) -> Extracted:
        """The features of the plain view, or of that many augmented views, numbered from 1.

        `on_images` is called again and again. Raises `WorkError`.
        """
        numbers = tuple(range(1, views + 1)) if views else (PLAIN,)
        result = Extracted()
        by_path = {record.path: record for record in records}
        contents = self._digests(by_path, result, on_images)
        for attempt in range(ATTEMPTS + 1):
            found = self._find(contents, numbers, on_images)
            wanted = _missing(by_path, contents, numbers, found)
            if not wanted:
                result.rows = {
                    path: [found[row_key(content, view)] for view in numbers] for path, content in contents.items()
                }
                result.contents = contents
                return result
            if attempt < ATTEMPTS:
                self._encode(wanted, contents, result, on_images, in_memory=attempt == ATTEMPTS - 1)
        raise WorkError(FailureReason.DATA_UNAVAILABLE, "images of this silo change while they are read")

    def settle(self) -> None:
        """Have on disk what was encoded so far, also when the work was cut short."""
        self._kept.settle()

    def _kind(self) -> FeatureKind:
        clip = self._clip
        return FeatureKind(
            architecture=clip.architecture,
            quick_gelu=any(type(module).__name__ == "QuickGELU" for module in clip.model.visual.modules()),
            weights_sha256=clip.weights_sha256,
            preprocessing=clip.preprocessing_digest,
            device=clip.device.type,
            patches=self._patches,
            element_type=self._element_type,
        )

    def _digests(self, records: Mapping[Path, Record], result: Extracted, on_images: OnImages) -> dict[Path, bytes]:
        """The content of each file; the problems of those that cannot be read go to `result`."""
        looked = 0

        def on_file() -> None:
            nonlocal looked
            looked += 1
            if looked % LOOK_INTERVAL == 0:
                on_images(0, len(records))

        contents, result.problems = self._contents.digests(records, on_file)
        return contents

    def _find(self, contents: Mapping[Path, bytes], views: tuple[int, ...], on_images: OnImages) -> dict[RowKey, Row]:
        keys = {row_key(content, view) for content in contents.values() for view in views}
        return self._kept.find(keys, lambda: on_images(0, len(contents)))

    def _encode(
        self,
        wanted: Sequence[Wanted],
        contents: dict[Path, bytes],
        result: Extracted,
        on_images: OnImages,
        in_memory: bool,
    ) -> None:
        """Encode images and keep their rows; `contents` and `result` learn what became of the files."""
        encoder = Encoder(self._clip, self._patches, self._element_type)
        done, total = 0, sum(one.is_last for one in wanted)

        def keep(ready: Sequence[tuple[RowKey, Row]]) -> None:
            for key, row in ready:
                self._kept.add(key, row, in_memory)

        try:
            for one in decode_all(wanted, self._clip):
                if one.problem is not None:
                    _set_aside(one, one.problem, contents, result)
                else:
                    contents[one.wanted.record.path] = one.content
                for view, pixels in zip(one.wanted.views, one.pixels, strict=False):  # no pixels if unreadable
                    keep(encoder.add(row_key(one.content, view), pixels))
                done += one.wanted.is_last
                result.encoded_count += one.wanted.is_last and one.problem is None
                if done % BATCH == 0 or done == total:
                    on_images(done, total)
            keep(encoder.rest())
        except KeyboardInterrupt:
            keep(encoder.fetch())
            raise
        finally:
            self._kept.settle()
        self._report_rounding(encoder.rounding)

    def _report_rounding(self, rounding: float) -> None:
        if rounding:
            scale = float(self._clip.model.logit_scale.exp())
            log.info(
                "features.element_type float16 changes a feature by at most %.1e (L2 norm, of 1), and so a logit by at "
                "most %.1e",
                rounding,
                rounding * scale,
            )


def _missing(
    records: Mapping[Path, Record], contents: Mapping[Path, bytes], views: tuple[int, ...], found: Mapping[RowKey, Row]
) -> list[Wanted]:
    """What has to be encoded; of files with the same content, the first."""
    first: dict[bytes, Path] = {}
    wanted = []
    for path, content in contents.items():
        first.setdefault(content, path)
        absent = tuple(view for view in views if row_key(content, view) not in found)
        if first[content] == path:
            parts = [absent[at : at + VIEWS_AT_ONCE] for at in range(0, len(absent), VIEWS_AT_ONCE)]
            wanted += [Wanted(records[path], part, part is parts[-1]) for part in parts]
    return wanted


def _set_aside(one: Decoded, problem: str, contents: dict[Path, bytes], result: Extracted) -> None:
    """A file that cannot be read, and all others of its content if that is why."""
    for path in [path for path, content in contents.items() if content == one.content] or [one.wanted.record.path]:
        contents.pop(path, None)  # another part of its views may have told already
        result.problems[path] = problem
