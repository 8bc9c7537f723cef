"""The measures of logits that are written down; `test_measures` says what they are."""

import math

import pytest
import torch
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from silo.evaluation import BATCH, PATCHES_BATCH, evaluate
from silo.examples import Examples
from silo.measures import measures
from silo.method import Batch, Classifier, ImageFeatures, LocalMethod, Params


def never(params: Params, received: Params, batch: Batch) -> Tensor:
    raise AssertionError("evaluation does not use the training loss")


def of(pooled: Tensor, labels: Tensor, patches: Tensor | None = None) -> Examples:
    return Examples(ImageFeatures(pooled, patches), torch.arange(len(labels)), labels)


def examples(logits: list[list[float]], labels: list[int]) -> Examples:
    return of(torch.tensor(logits), torch.tensor(labels))


def shifted(params: Params) -> Classifier:
    return lambda images: images.pooled + params["shift"]


IDENTITY = LocalMethod(shifted, never)
NO_SHIFT = {"shift": torch.zeros(1)}


def test_by_hand() -> None:
    result = evaluate(IDENTITY.classify(NO_SHIFT), examples([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 5.0]], [0, 0, 0]))
    losses = [math.log(2), math.log(4 / 3), math.log(1 + math.exp(5))]
    assert result["accuracy"] == pytest.approx(2 / 3)  # a tie goes to the first class
    assert result["loss"] == pytest.approx(sum(losses) / 3)


def test_uniform_logits_have_the_loss_of_chance() -> None:
    result = evaluate(IDENTITY.classify(NO_SHIFT), examples([[1.0] * 8] * 4, [0, 1, 2, 3]))
    assert (result["accuracy"], result["auroc"]) == (0.25, 0.5)
    assert result["loss"] == pytest.approx(math.log(8))


def test_all_measures_are_there() -> None:
    data = examples([[2.0, 0.0], [0.0, 1.0], [1.0, 0.5]], [0, 1, 1])
    assert evaluate(IDENTITY.classify(NO_SHIFT), data) == measures(data.table.pooled, data.labels)
    assert set(evaluate(IDENTITY.classify(NO_SHIFT), data)) == {
        "accuracy",
        "loss",
        "macro_f1",
        "calibration_error",
        "auroc",
    }


def test_only_the_examples_rows_of_the_table_count() -> None:
    table = ImageFeatures(torch.tensor([[9.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 9.0]]), None)
    chosen = Examples(table, torch.tensor([2, 1, 2]), torch.tensor([0, 1, 1]))
    assert evaluate(IDENTITY.classify(NO_SHIFT), chosen) == measures(table.pooled[[2, 1, 2]], chosen.labels)


def test_batches_do_not_change_the_result() -> None:
    generator = torch.Generator().manual_seed(0)
    data = of(torch.randn(37, 5, generator=generator), torch.arange(37) % 5)
    whole = evaluate(IDENTITY.classify(NO_SHIFT), data)
    assert evaluate(IDENTITY.classify(NO_SHIFT), data, batch=10) == whole
    assert evaluate(IDENTITY.classify(NO_SHIFT), data) == whole


def test_texts_are_done_once_and_images_in_batches() -> None:
    sizes: list[int] = []
    texts: list[Params] = []

    def classify(params: Params) -> Classifier:
        texts.append(params)

        def logits(images: ImageFeatures) -> Tensor:
            assert not torch.is_grad_enabled()
            sizes.append(len(images.pooled))
            return images.pooled

        return logits

    count = BATCH + 44
    pooled, labels = torch.zeros(count, 2), torch.zeros(count, dtype=torch.long)
    evaluate(classify({}), of(pooled, labels))
    assert (sizes, len(texts)) == ([BATCH, 44], 1)
    sizes.clear()
    few = PATCHES_BATCH + 3
    evaluate(classify({}), of(pooled[:few], labels[:few], torch.zeros(few, 1, 2)))
    assert (sizes, len(texts)) == ([PATCHES_BATCH, 3], 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_not_finite(value: float) -> None:
    with pytest.raises(WorkError, match="not finite") as caught:
        evaluate(IDENTITY.classify({"shift": torch.tensor([value])}), examples([[0.0, 1.0]], [0]))
    assert caught.value.reason is FailureReason.NOT_FINITE


def test_no_examples() -> None:
    with pytest.raises(WorkError, match="no examples") as caught:
        evaluate(IDENTITY.classify(NO_SHIFT), of(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)))
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE
