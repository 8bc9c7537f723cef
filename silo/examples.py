"""Labelled images as training and evaluation see them: rows of a table of frozen features."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from silo.method import Batch, ImageFeatures


class FeatureTable(Protocol):
    """Unit-norm features of many images and views of them, one row each: in memory (`ImageFeatures`) or on disk."""

    @property
    def has_patches(self) -> bool:
        """Whether rows hold patches beside the pooled feature."""

    def take(self, rows: Tensor) -> ImageFeatures:
        """The features of rows [B], in their order, on the device where training is."""


@dataclass(frozen=True)
class Examples:
    """N images of one silo, each in V ≥ 1 views, as rows [V, N] of a table of features, and their labels [N].

    Rows [N] are those of one view. A label is an index into the experiment's classes, or those of an evaluation split.
    The table may hold the images of other splits, and of other silos on the same host. `digest` differs if the images,
    their order or the precision of their features do; it is empty if nobody knows.
    """

    table: FeatureTable
    rows: Tensor
    labels: Tensor
    digest: str = ""

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def view_count(self) -> int:
        """V; more than 1 only for training images in augmented views."""
        return 1 if self.rows.ndim == 1 else self.rows.shape[0]

    def batch(self, chosen: Tensor | slice, view: int = 0) -> Batch:
        """The examples with these indices, in one of their views."""
        rows = self.rows if self.rows.ndim == 1 else self.rows[view]
        return Batch(self.table.take(rows[chosen]), self.labels[chosen])
