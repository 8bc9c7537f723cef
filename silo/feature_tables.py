"""Rows of features as tables for training and evaluation: on the model's device where they fit, else on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from silo.examples import FeatureTable
from silo.feature_store import Row
from silo.method import ImageFeatures

DEVICE_SHARE = 1 / 3  # of a GPU's free memory, for one table; the text tower needs the rest
COPIED_AT_ONCE = 256  # rows on their way to a GPU


def table_of(rows: Sequence[Row], device: torch.device) -> FeatureTable:
    """A table of at least one row.

    A GPU with room for them gets them all. Otherwise patches stay where they are, mapped from disk as a rule, and so do
    pooled features for which a GPU has no room (many views of many images); a CPU reads pooled features into memory.
    """
    if _fits(rows, device):
        return _resident(rows, device)
    return HostTable(rows, device)


def rows_device(table: FeatureTable, device: torch.device) -> torch.device:
    """Where indices of its rows belong: tables on the host gather by indices on the host."""
    return torch.device("cpu") if isinstance(table, HostTable) else device


@dataclass(frozen=True)
class HostTable:
    """Rows [1 + M, D] that are gathered batch by batch, and copied to the device if that is a GPU."""

    rows: Sequence[Row]
    device: torch.device

    @property
    def has_patches(self) -> bool:
        """Whether rows hold patches beside the pooled feature."""
        return bool(self.rows[0].shape[0] > 1)

    def take(self, rows: Tensor) -> ImageFeatures:
        """The features of rows [B] as float32 on the device; does not wait for the copy there."""
        return _gather([self.rows[row] for row in rows.tolist()], self.rows[0], self.device)


@dataclass(frozen=True)
class ResidentTable:
    """Features in half precision on the device; float32 when they are taken."""

    features: ImageFeatures

    @property
    def has_patches(self) -> bool:
        """Whether there are patches."""
        return self.features.has_patches

    def take(self, rows: Tensor) -> ImageFeatures:
        """The features of rows [B] as float32."""
        return _float32(self.features.take(rows))


def _fits(rows: Sequence[Row], device: torch.device) -> bool:
    if device.type != "cuda":
        return bool(rows[0].shape[0] == 1)
    free, _ = torch.cuda.mem_get_info(device)
    return bool(len(rows) * rows[0].nbytes <= DEVICE_SHARE * free)


def _resident(rows: Sequence[Row], device: torch.device) -> FeatureTable:
    """The rows copied into one block of the device's memory, part by part."""
    tokens, width = rows[0].shape
    element_type = torch.float16 if tokens > 1 and rows[0].dtype == np.float16 else torch.float32
    pooled = torch.empty(len(rows), width, dtype=element_type, device=device)
    patches = torch.empty(len(rows), tokens - 1, width, dtype=element_type, device=device) if tokens > 1 else None
    for at in range(0, len(rows), COPIED_AT_ONCE):
        part = _gather(rows[at : at + COPIED_AT_ONCE], rows[0], device)
        pooled[at : at + COPIED_AT_ONCE] = part.pooled
        if patches is not None and part.patches is not None:
            patches[at : at + COPIED_AT_ONCE] = part.patches
    features = ImageFeatures(pooled, patches)
    return features if element_type is torch.float32 else ResidentTable(features)


def _gather(rows: Sequence[Row], like: Row, device: torch.device) -> ImageFeatures:
    """Rows side by side as float32 on the device: one copy of each row, and one to a GPU from pinned memory."""
    count, (tokens, width) = len(rows), like.shape
    element_type = torch.float16 if like.dtype == np.float16 else torch.float32
    on_gpu = device.type == "cuda"
    pooled = torch.empty(count, width, dtype=element_type, pin_memory=on_gpu)
    patches = torch.empty(count, tokens - 1, width, dtype=element_type, pin_memory=on_gpu) if tokens > 1 else None
    for row, to in zip(rows, pooled.numpy(), strict=True):
        to[:] = row[0]
    if patches is not None:
        for row, to in zip(rows, patches.numpy(), strict=True):
            to[:] = row[1:]
    if on_gpu:
        pooled = pooled.to(device, non_blocking=True)
        patches = None if patches is None else patches.to(device, non_blocking=True)
    return _float32(ImageFeatures(pooled, patches))


def _float32(features: ImageFeatures) -> ImageFeatures:
    return ImageFeatures(features.pooled.float(), None if features.patches is None else features.patches.float())
