"""The local half of a method: what it sees (features, labels, a text tower) and the two pure functions it gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

Params = Mapping[str, Tensor]  # every declared tensor by name, shared and private


class ImageFeatures(NamedTuple):
    """Unit-norm features of B images: pooled [B, D], and patches [B, M, D] where the method needs them."""

    pooled: Tensor
    patches: Tensor | None


class Batch(NamedTuple):
    """B images with labels [B], indices into the experiment's classes."""

    images: ImageFeatures
    labels: Tensor


class TextTower(Protocol):
    """CLIP's frozen text tower, bound to the experiment's class names."""

    @property
    def logit_scale(self) -> Tensor:
        """Exp of CLIP's trained temperature, a scalar."""

    def encode(self, context: Tensor) -> Tensor:
        """Unit-norm features [..., C, D] of [start, context, class name, ".", end] for context [..., L, E]."""

    def handcrafted(self) -> Tensor:
        """Unit-norm features [C, D] of "a photo of a {class}."."""


@dataclass(frozen=True)
class LocalMethod:
    """What a method computes locally. Optimiser, batches, devices and deltas are not its business."""

    logits: Callable[[Params, ImageFeatures], Tensor]  # [B, C]
    loss: Callable[[Params, Params, Batch], Tensor]  # (parameters, received shared, batch) -> scalar
