"""From image files to rows of features: threads read and decode while the image tower works on batches of one size.

The last batch is filled up. So the features of an image depend neither on the images beside it nor on what the process
did before.
"""

import hashlib
import io
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from silo.data import Record
from silo.data.images import UnreadableImage, read_image
from silo.feature_store import PLAIN, Row, RowKey
from silo.method import ImageFeatures
from silo.sources import ElementType

BATCH = 32  # images at a time through the image tower, always
AHEAD = 4 * BATCH  # views that may wait for the tower
VIEWS_AT_ONCE = 32  # of one image, which is decoded again for more: their pixels are held all together
MOST_DECODERS = 16


class ImageTower(Protocol):
    """What is needed of `silo.clip.model.FrozenClip`."""

    def preprocess(self, image: Image) -> Tensor:
        """Pixels [3, H, W] of an image as evaluation sees it."""

    def augment(self, image: Image, content_digest: str, view: int) -> Tensor:
        """Pixels [3, H, W] of an augmented view."""

    def encode_images(self, images: Tensor, patches: bool) -> ImageFeatures:
        """Unit-norm features of pixels [B, 3, H, W]."""


@dataclass(frozen=True)
class Wanted:
    """An image file and views of it that are to be encoded, at most `VIEWS_AT_ONCE`; more follow unless `is_last`."""

    record: Record
    views: tuple[int, ...]
    is_last: bool = True


@dataclass(frozen=True)
class Decoded:
    """The file's SHA-256 and the pixels of each view wanted; or without pixels, why the file cannot be read."""

    wanted: Wanted
    content: bytes
    pixels: tuple[Tensor, ...]
    problem: str | None = None


def decoder_count() -> int:
    """Threads that decode: as many as there are cores, from 4 to 16."""
    return min(max(len(os.sched_getaffinity(0)), 4), MOST_DECODERS)


def decode_all(wanted: Sequence[Wanted], tower: ImageTower) -> Iterator[Decoded]:
    """The images in order; threads are ahead of the caller by some batches."""
    pool = ThreadPoolExecutor(decoder_count(), thread_name_prefix="decoder")
    try:
        waiting: deque[tuple[int, Future[Decoded]]] = deque()
        count = 0
        for one in wanted:
            waiting.append((len(one.views), pool.submit(decode, one, tower)))
            count += len(one.views)
            while count > AHEAD and len(waiting) > 1:
                size, first = waiting.popleft()
                count -= size
                yield first.result()
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def decode(wanted: Wanted, tower: ImageTower) -> Decoded:
    """Read a file once, whatever is wanted of it: the digest is that of the very bytes that were decoded."""
    try:
        file = wanted.record.path.read_bytes()
    except OSError as error:
        return Decoded(wanted, b"", (), error.strerror or type(error).__name__)
    content = hashlib.sha256(file).digest()
    try:
        image = read_image(io.BytesIO(file))
    except UnreadableImage as problem:
        return Decoded(wanted, content, (), str(problem))
    pixels = (
        tower.preprocess(image) if view == PLAIN else tower.augment(image, content.hex(), view) for view in wanted.views
    )
    return Decoded(wanted, content, tuple(pixels))


class _Launched(NamedTuple):
    """A batch whose rows [B, 1 + M, D] are being computed, or on their way to the host; `rounding` is a scalar."""

    keys: list[RowKey]
    rows: Tensor
    rounding: Tensor | None
    is_there: "torch.cuda.Event | None"


class Encoder:
    """Collects pixels into batches of `BATCH`, and gives the rows of a batch while the next one is computed."""

    def __init__(self, tower: ImageTower, patches: bool, element_type: ElementType) -> None:
        self._tower = tower
        self._patches = patches
        self._element_type = element_type
        self._waiting: list[tuple[RowKey, Tensor]] = []
        self._launched: _Launched | None = None
        self._device = torch.device("cpu")  # of the features, as soon as there are some
        self.rounding = 0.0  # largest L2 norm of what float16 has changed of a unit vector

    def add(self, key: RowKey, pixels: Tensor) -> list[tuple[RowKey, Row]]:
        """Rows that are ready, if any. Raises `WorkError` if features are not finite."""
        self._waiting.append((key, pixels))
        return self._launch() if len(self._waiting) == BATCH else []

    def rest(self) -> list[tuple[RowKey, Row]]:
        """The rows of all that is left; the batch is filled up with its first image. Raises `WorkError`."""
        ready = self._launch() if self._waiting else []
        return ready + self.fetch()

    def _launch(self) -> list[tuple[RowKey, Row]]:
        """Begin with the batch that waits; the rows of the one before."""
        keys, pixels = [key for key, _ in self._waiting], [one for _, one in self._waiting]
        self._waiting = []
        batch = torch.stack([*pixels, *[pixels[0]] * (BATCH - len(pixels))])
        if self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        pooled, patches = self._tower.encode_images(batch, self._patches)
        self._device = pooled.device
        rows = pooled[:, None] if patches is None else torch.cat([pooled[:, None], patches], dim=1)
        rows = rows[: len(keys)].contiguous()
        rounding = None
        if self._element_type == "float16":
            exact, rows = rows, rows.half()
            rounding = _to_host((exact - rows.float()).norm(dim=-1).max())
        host = _to_host(rows)
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        ready = self.fetch()
        self._launched = _Launched(keys, host, rounding, event)
        return ready

    def fetch(self) -> list[tuple[RowKey, Row]]:
        """The rows of the batch that the tower is at, or has done; not of what waits. Raises `WorkError`."""
        if self._launched is None:
            return []
        (keys, tensor, rounding, is_there), self._launched = self._launched, None
        if is_there is not None:
            is_there.synchronize()
        if not bool(torch.isfinite(tensor).all()):
            raise WorkError(
                FailureReason.NOT_FINITE, "CLIP's features of some images are not finite; check the model's weights"
            )
        if rounding is not None:
            self.rounding = max(self.rounding, float(rounding))
        # pinned memory is scarce, and rows may be kept for long
        rows = tensor.numpy() if is_there is None else np.array(tensor.numpy())
        return list(zip(keys, rows, strict=True))


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it on its way into pinned memory."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
