"""Accuracy and loss of logits that are written down."""

import math

import pytest
import torch
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from silo.evaluation import PATCHES_BATCH, evaluate
from silo.method import Batch, ImageFeatures, LocalMethod, Params
from silo.training import Examples


def never(params: Params, received: Params, batch: Batch) -> Tensor:
    raise AssertionError("evaluation does not use the training loss")


def examples(logits: list[list[float]], labels: list[int]) -> Examples:
    return Examples(ImageFeatures(torch.tensor(logits), None), torch.tensor(labels))


IDENTITY = LocalMethod(lambda params, images: images.pooled + params["shift"], never)
NO_SHIFT = {"shift": torch.zeros(1)}


def test_by_hand() -> None:
    result = evaluate(IDENTITY, NO_SHIFT, examples([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 5.0]], [0, 0, 0]))
    losses = [math.log(2), math.log(4 / 3), math.log(1 + math.exp(5))]
    assert result["accuracy"] == pytest.approx(2 / 3)  # a tie goes to the first class
    assert result["loss"] == pytest.approx(sum(losses) / 3)


def test_uniform_logits_have_the_loss_of_chance() -> None:
    result = evaluate(IDENTITY, NO_SHIFT, examples([[1.0] * 8] * 4, [0, 1, 2, 3]))
    assert result == {"accuracy": 0.25, "loss": pytest.approx(math.log(8))}


def test_batches_do_not_change_the_result() -> None:
    data = Examples(
        ImageFeatures(torch.randn(37, 5, generator=torch.Generator().manual_seed(0)), None), torch.arange(37) % 5
    )
    whole = evaluate(IDENTITY, NO_SHIFT, data)
    parts = evaluate(IDENTITY, NO_SHIFT, data, batch=10)
    assert parts["accuracy"] == whole["accuracy"]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-12)
    assert evaluate(IDENTITY, NO_SHIFT, data) == whole


def test_pooled_images_go_through_at_once_and_patches_in_batches() -> None:
    sizes: list[int] = []

    def logits(params: Params, images: ImageFeatures) -> Tensor:
        assert not torch.is_grad_enabled()
        sizes.append(len(images.pooled))
        return images.pooled

    count = PATCHES_BATCH + 44
    pooled, labels = torch.zeros(count, 2), torch.zeros(count, dtype=torch.long)
    evaluate(LocalMethod(logits, never), {}, Examples(ImageFeatures(pooled, None), labels))
    evaluate(LocalMethod(logits, never), {}, Examples(ImageFeatures(pooled, torch.zeros(count, 1, 2)), labels))
    assert sizes == [count, PATCHES_BATCH, 44]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_not_finite(value: float) -> None:
    with pytest.raises(WorkError, match="not finite") as caught:
        evaluate(IDENTITY, {"shift": torch.tensor([value])}, examples([[0.0, 1.0]], [0]))
    assert caught.value.reason is FailureReason.NOT_FINITE


def test_no_examples() -> None:
    with pytest.raises(WorkError, match="no examples") as caught:
        evaluate(IDENTITY, NO_SHIFT, Examples(ImageFeatures(torch.zeros(0, 2), None), torch.zeros(0, dtype=torch.long)))
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE
