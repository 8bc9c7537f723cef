"""The local halves: the contract that all of them keep, and numbers one can recompute by hand."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fedrt.methods
import silo.methods
from fedrt.errors import SpecError
from fedrt.method import ModelDims
from fedrt.methods.promptfl import PromptFL
from fedrt.methods.zeroshot import ZeroShot
from silo.method import Batch, ImageFeatures, LocalMethod, TextTower
from silo.methods import BUILT_IN, find_local_method, local_method_names

DIMS = ModelDims(context_dim=6, feature_dim=4, class_count=3)


@dataclass(frozen=True)
class LinearTower:
    """A text tower whose features are a fixed linear map of the context's mean, plus one vector per class."""

    classes: Tensor  # [C, D]
    mapping: Tensor  # [E, D]
    scale: float = 10.0

    @property
    def logit_scale(self) -> Tensor:
        return torch.tensor(self.scale)

    def encode(self, context: Tensor) -> Tensor:
        return F.normalize((context.mean(-2) @ self.mapping)[..., None, :] + self.classes, dim=-1)

    def handcrafted(self) -> Tensor:
        return F.normalize(self.classes, dim=-1)


def tower() -> LinearTower:
    generator = torch.Generator().manual_seed(0)
    return LinearTower(torch.randn(3, 4, generator=generator), torch.randn(6, 4, generator=generator))


def features(count: int = 5) -> ImageFeatures:
    generator = torch.Generator().manual_seed(1)
    pooled, patches = torch.randn(count, 4, generator=generator), torch.randn(count, 7, 4, generator=generator)
    return ImageFeatures(F.normalize(pooled, dim=-1), F.normalize(patches, dim=-1))


def local(name: str, text: TextTower) -> tuple[LocalMethod, dict[str, Tensor]]:
    declaration = fedrt.methods.find_method(name)()
    generator = torch.Generator().manual_seed(2)
    specs = declaration.tensors(DIMS)
    params = {spec.name: torch.randn(spec.shape, generator=generator).requires_grad_() for spec in specs}
    return find_local_method(name)(declaration, text), params


def test_both_halves_of_every_method_exist() -> None:
    assert set(BUILT_IN) == set(fedrt.methods.BUILT_IN)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_logits_have_a_row_per_image_and_a_column_per_class(name: str) -> None:
    method, params = local(name, tower())
    assert method.logits(params, features(5)).shape == (5, 3)
    assert method.logits(params, features(1)).shape == (1, 3)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_gradient_reaches_every_declared_tensor(name: str) -> None:
    method, params = local(name, tower())
    loss = method.loss(params, params, Batch(features(5), torch.tensor([0, 1, 2, 0, 1])))
    assert loss.shape == ()
    if params:
        loss.backward()
    assert all(tensor.grad is not None and float(tensor.grad.abs().max()) > 0 for tensor in params.values())


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_logits_of_an_image_do_not_depend_on_its_batch(name: str) -> None:
    method, params = local(name, tower())
    images = features(5)
    alone = ImageFeatures(images.pooled[2:3], images.patches[2:3] if images.patches is not None else None)
    torch.testing.assert_close(method.logits(params, alone)[0], method.logits(params, images)[2])


class KnownTower:
    """Two classes along the axes; the context's first number turns them."""

    logit_scale = torch.tensor(2.0)

    def encode(self, context: Tensor) -> Tensor:
        angle = context[..., 0, 0]
        return torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])

    def handcrafted(self) -> Tensor:
        return torch.eye(2)


def test_zero_shot_by_hand() -> None:
    method = silo.methods.zeroshot.build(ZeroShot(), KnownTower())
    images = ImageFeatures(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), None)
    torch.testing.assert_close(method.logits({}, images), torch.tensor([[2.0, 0.0], [1.2, 1.6]]))
    loss = method.loss({}, {}, Batch(images, torch.tensor([0, 0])))
    expected = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(0.4))) / 2
    assert float(loss) == pytest.approx(expected)


def test_promptfl_by_hand() -> None:
    method = silo.methods.promptfl.build(PromptFL(context_length=1), KnownTower())
    context = torch.zeros(1, 3, requires_grad=True)
    images = ImageFeatures(torch.tensor([[1.0, 0.0]]), None)
    torch.testing.assert_close(method.logits({"context": context}, images), torch.tensor([[2.0, 0.0]]))
    quarter = torch.tensor([[math.pi / 2, 0.0, 0.0]])
    torch.testing.assert_close(method.logits({"context": quarter}, images), torch.tensor([[0.0, -2.0]]))
    method.loss({"context": context}, {}, Batch(images, torch.tensor([1]))).backward()
    # logits 2(cos a, −sin a), label 1: d loss / d a at 0 = 0·(…) − 2·(p₁ − 1) with p₁ = 1 / (1 + e²)
    assert context.grad is not None
    assert context.grad.flatten().tolist() == pytest.approx([2 * (1 - 1 / (1 + math.exp(2))), 0.0, 0.0])


def test_promptfl_with_the_handcrafted_features_is_zero_shot() -> None:
    text = tower()
    zero, _ = local("zeroshot", text)
    prompt, _ = local("promptfl", text)
    nothing = {"context": torch.zeros(16, 6)}
    torch.testing.assert_close(prompt.logits(nothing, features()), zero.logits({}, features()))


def test_unknown_method() -> None:
    with pytest.raises(SpecError, match=r"'fedxyz' has no local half on this silo; install .*\['promptfl', 'zeroshot'"):
        find_local_method("fedxyz")


@dataclass(frozen=True)
class Point:
    """An entry point of a third-party package."""

    name: str
    target: object

    def load(self) -> object:
        return self.target


def test_third_party_methods_come_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(method: Any, text: TextTower) -> LocalMethod:
        raise NotImplementedError

    points = {"silo.methods": [Point("fedxyz", build), Point("promptfl", build)]}
    monkeypatch.setattr(silo.methods, "entry_points", lambda group: points[group])
    assert find_local_method("fedxyz") is build
    assert find_local_method("promptfl") is BUILT_IN["promptfl"]  # a package cannot take the name of a built-in
    assert local_method_names() == sorted({*BUILT_IN, "fedxyz"})
