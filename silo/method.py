"""The local half of a method: what it sees (features, labels, a text tower) and the pure functions it gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from fedrt.context import ClassPosition

Params = Mapping[str, Tensor]  # every declared tensor by name, shared and private


class ImageFeatures(NamedTuple):
    """Unit-norm features of B images: pooled [B, D], and patches [B, M, D] where the method needs them."""

    pooled: Tensor
    patches: Tensor | None

    @property
    def has_patches(self) -> bool:
        """Whether there are patches."""
        return self.patches is not None

    def take(self, rows: Tensor | slice) -> "ImageFeatures":
        """The features of some of the images; this makes it a `silo.examples.FeatureTable`."""
        return ImageFeatures(self.pooled[rows], None if self.patches is None else self.patches[rows])


class Batch(NamedTuple):
    """B images with labels [B], indices into the experiment's classes."""

    images: ImageFeatures
    labels: Tensor


class TextTower(Protocol):
    """CLIP's frozen text tower, bound to class names: the experiment's, or those of an evaluation split."""

    @property
    def logit_scale(self) -> Tensor:
        """Exp of CLIP's trained temperature, a scalar."""

    def encode(
        self, context: Tensor, position: ClassPosition = ClassPosition.END, class_specific: bool = False
    ) -> Tensor:
        """Unit-norm features [..., C, D] of [start, context, class name, ".", end] for context [..., L, E].

        With `class_specific`, of one context for each class, [..., C, L, E]. Several contexts in one call cost least.
        """

    def handcrafted(self) -> Tensor:
        """Unit-norm features [C, D] of "a photo of a {class}.", without gradient."""

    def placeholder(self, length: int, position: ClassPosition = ClassPosition.END) -> Tensor:
        """Unit-norm features [C, D] of the prompt with `length` words "X" for context, without gradient."""


Classifier = Callable[[ImageFeatures], Tensor]  # -> logits [B, C]
Classify = Callable[[Params], Classifier]  # does the work on texts once, so that many batches of images can follow
Loss = Callable[[Params, Params, Batch], Tensor]  # (parameters, received shared, batch) -> scalar
Prepare = Callable[[Params, Batch], Params]  # (parameters, all training examples) -> tensors that are not trained


@dataclass(frozen=True)
class LocalMethod:
    """What a method computes locally. Optimiser, batches, devices and deltas are not its business.

    `prepare`, for methods with tensors that are not trained, is called once before the training of each round, without
    gradient, and returns their new values.
    """

    classify: Classify
    loss: Loss
    prepare: Prepare | None = None


def cross_entropy(classify: Classify) -> Loss:
    """The mean cross-entropy of a classifier's logits: the loss of most methods, or the first term of it."""

    def loss(params: Params, _received: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(classify(params)(batch.images), batch.labels)

    return loss
