"""Text towers that one can compute by hand, with images and tensors to go with them, for tests of local halves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedrt.context import ClassPosition
from fedrt.method import Method, ModelDims
from fedrt.methods import make_method
from fedrt.spec import OptimizerSpec, TrainingSpec
from fedrt.tensors import Scope
from silo.examples import Examples
from silo.method import Batch, ImageFeatures, LocalMethod, TextTower
from silo.methods import find_local_method
from silo.training import Plan, RoundPosition, Start, Trained, train

DIMS = ModelDims(context_dim=6, feature_dim=4, class_count=3)
WEIGHT = {ClassPosition.END: 1.0, ClassPosition.MIDDLE: 2.0, ClassPosition.FRONT: 3.0}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class LinearTower:
    """Features are a linear map of the context's mean, weighted by the class position, plus one vector per class."""

    class_count: int = DIMS.class_count
    calls: list[tuple[int, ...]] = field(default_factory=list)  # the shapes that `encode` was given

    @property
    def classes(self) -> Tensor:
        return drawn(0, self.class_count, DIMS.feature_dim)

    @property
    def logit_scale(self) -> Tensor:
        return torch.tensor(10.0)

    def encode(
        self, context: Tensor, position: ClassPosition = ClassPosition.END, class_specific: bool = False
    ) -> Tensor:
        self.calls.append(tuple(context.shape))
        mapped = WEIGHT[position] * context.mean(-2) @ drawn(1, DIMS.context_dim, DIMS.feature_dim)
        return F.normalize((mapped if class_specific else mapped[..., None, :]) + self.classes, dim=-1)

    def handcrafted(self) -> Tensor:
        return F.normalize(self.classes, dim=-1)

    def placeholder(self, length: int, position: ClassPosition = ClassPosition.END) -> Tensor:
        return F.normalize(self.classes + length * WEIGHT[position], dim=-1)


class TurningTower:
    """Two classes along the axes of a plane; the first number of a context turns both by that angle."""

    logit_scale = torch.tensor(2.0)

    def encode(
        self, context: Tensor, position: ClassPosition = ClassPosition.END, class_specific: bool = False
    ) -> Tensor:
        angle = context[..., 0, 0]
        first, second = torch.stack([angle.cos(), angle.sin()], -1), torch.stack([-angle.sin(), angle.cos()], -1)
        return torch.stack([first, second], -2)

    def handcrafted(self) -> Tensor:
        return torch.eye(2)

    def placeholder(self, length: int, position: ClassPosition = ClassPosition.END) -> Tensor:
        return -torch.eye(2)


def angled(angle: float) -> Tensor:
    """A context [1, 3] that turns the plane of `TurningTower`."""
    return torch.tensor([[angle, 0.0, 0.0]])


def images(count: int = 5) -> ImageFeatures:
    return ImageFeatures(F.normalize(drawn(2, count, 4), dim=-1), F.normalize(drawn(3, count, 7, 4), dim=-1))


def examples(count: int = 5, class_count: int = DIMS.class_count) -> Examples:
    return Examples(images(count), torch.arange(count), torch.arange(count) % class_count)


def labelled(count: int = 5) -> Batch:
    return examples(count).batch(slice(None))


def make(name: str, **settings: object) -> Method:
    """The method with contexts of three vectors, and what else is set."""
    small: dict[str, object] = {} if name == "zeroshot" else {"context_length": 3}
    if name == "fedpgp":
        small["rank"] = 2
    return make_method(name, json.dumps(small | settings))


def local(declared: Method, text: TextTower | None = None) -> LocalMethod:
    return find_local_method(declared.name)(declared, text or LinearTower())


def tensors(declared: Method, dims: ModelDims = DIMS, size: float = 1.0) -> dict[str, Tensor]:
    """Some value for each tensor; for those that are not trained one between 0 and 1."""
    return {
        spec.name: size * drawn(4 + at, *spec.shape) if spec.trained else torch.full(spec.shape, 0.3)
        for at, spec in enumerate(declared.tensors(dims))
    }


def variables(declared: Method, dims: ModelDims = DIMS) -> dict[str, Tensor]:
    """The same, collecting gradients where they are trained."""
    found = tensors(declared, dims)
    return {spec.name: found[spec.name].requires_grad_(spec.trained) for spec in declared.tensors(dims)}


def trained(
    declared: Method,
    data: Examples,
    start: Mapping[str, Tensor] | None = None,
    class_count: int = DIMS.class_count,
    **settings: Any,
) -> Trained:
    """Two epochs of local training, from small tensors if no others are given."""
    dims = replace(DIMS, class_count=class_count)
    specs, begin = declared.tensors(dims), start or tensors(declared, dims, 0.1)
    held = {scope: {spec.name: begin[spec.name] for spec in specs if spec.scope is scope} for scope in Scope}
    training = TrainingSpec(**{"optimizer": OptimizerSpec(learning_rate=0.1), "local_epochs": 2, **settings})
    plan = Plan(training, RoundPosition(1, 1), seed=1)
    method = local(declared, LinearTower(class_count))
    return train(method, specs, Start(held[Scope.SHARED], held[Scope.PRIVATE]), data, plan, lambda *_: None)
