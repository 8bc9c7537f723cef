"""The measures against scikit-learn, plain loops and numbers that one can compute by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from silo import measures as module
from silo.measures import SoftmaxNorm, auroc, calibration_error, macro_f1, measures, softmax_norm

ALL = {"accuracy", "loss", "macro_f1", "calibration_error", "auroc"}
LOG3 = math.log(3)


def case(seed: int, images: int, classes: int, scale: float = 3.0, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """Random logits and labels; with repeats, every row of logits comes several times, with labels of its own."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, classes, generator=generator)
    labels = torch.randint(0, classes, (images * repeats,), generator=generator)
    return logits.repeat(repeats, 1), labels


scales = st.sampled_from([0.1, 1.0, 20.0])
cases = st.builds(case, st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 7), scales, st.integers(1, 3))


@st.composite
def arrays(draw: st.DrawFn, elements: st.SearchStrategy[Any]) -> tuple[Tensor, Tensor]:
    """Logits of these elements, and labels."""
    images, classes = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    logits = draw(hnp.arrays(np.float32, (images, classes), elements=elements))
    labels = draw(hnp.arrays(np.int64, images, elements=st.integers(0, classes - 1)))
    return torch.from_numpy(logits), torch.from_numpy(labels)


def by_sklearn(logits: Tensor, labels: Tensor) -> dict[str, float]:
    probabilities = logits.double().softmax(1).numpy()
    truth, predicted = labels.numpy(), probabilities.argmax(1)
    present = sorted(set(truth.tolist()))
    found = {"macro_f1": f1_score(truth, predicted, labels=present, average="macro", zero_division=0.0)}
    if len(present) > 1:
        areas = [roc_auc_score(truth == label, probabilities[:, label]) for label in present]
        found["auroc"] = sum(areas) / len(areas)
    return found


def by_loop(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, loss and calibration error, one image and one bin at a time."""
    answers = []
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        parts = [math.exp(value - max(row)) for value in row]
        top = row.index(max(row))
        answers.append(
            (parts[top] / math.fsum(parts), top == label, math.log(math.fsum(parts)) + max(row) - row[label])
        )
    error = 0.0
    for number in range(15):
        inside = [(p, right) for p, right, _ in answers if number / 15 < p <= (number + 1) / 15]
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            error += len(inside) / len(answers) * abs(accuracy - confidence)
    return {
        "accuracy": sum(right for _, right, _ in answers) / len(answers),
        "loss": sum(loss for _, _, loss in answers) / len(answers),
        "calibration_error": error,
    }


@given(cases)
def test_any_logits_measure_as_scikit_learn_and_plain_loops_do(given_case: tuple[Tensor, Tensor]) -> None:
    assert measures(*given_case) == pytest.approx(by_sklearn(*given_case) | by_loop(*given_case), rel=1e-12, abs=1e-12)


@given(cases)
def test_the_loss_is_the_cross_entropy(given_case: tuple[Tensor, Tensor]) -> None:
    logits, labels = given_case
    assert measures(logits, labels)["loss"] == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-12)


def no_norm(count: int) -> SoftmaxNorm:
    return SoftmaxNorm(torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64))


@given(arrays(st.integers(-2, 2)))
def test_ties_count_one_half_as_in_scikit_learn(given_case: tuple[Tensor, Tensor]) -> None:
    """Few different scores, so that almost every image ties with others."""
    scores, labels = given_case
    present = sorted(set(labels.tolist()))
    if len(present) > 1:
        areas = [roc_auc_score(labels == label, scores[:, label]) for label in present]
        assert auroc(scores, no_norm(len(labels)), labels) == pytest.approx(sum(areas) / len(areas), rel=1e-12)


@settings(max_examples=200)
@given(arrays(st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_any_finite_logits_have_finite_measures_within_their_bounds(given_case: tuple[Tensor, Tensor]) -> None:
    found = measures(*given_case)
    assert set(found) == (ALL if len(set(given_case[1].tolist())) > 1 else ALL - {"auroc"})
    assert 0 <= found.pop("loss") < math.inf
    assert all(0 <= value <= 1 for value in found.values())


# By hand


def test_by_hand() -> None:
    logits = torch.tensor([[LOG3, 0.0], [0.0, 0.0], [0.0, LOG3], [LOG3, 0.0]])  # class 0 has 3/4, 1/2, 1/4, 3/4
    found = measures(logits, torch.tensor([0, 0, 1, 1]))  # predicted 0, 0, 1, 0: a tie goes to the first class
    assert found == {
        "accuracy": 0.75,
        "loss": pytest.approx((math.log(4 / 3) + math.log(2) + math.log(4 / 3) + math.log(4)) / 4),
        "macro_f1": pytest.approx((2 * 2 / (2 * 2 + 1) + 2 / (2 + 1)) / 2),
        # three are sure by 3/4 and two of them right; one is sure by 1/2 and right
        "calibration_error": pytest.approx(3 / 4 * abs(2 / 3 - 3 / 4) + 1 / 4 * (1 - 1 / 2)),
        # pairs of class 0 and 1: 3/4 against 1/4 and 3/4 gives 1 and 1/2; 1/2 against them 1 and 0
        "auroc": pytest.approx(2.5 / 4),
    }


def test_a_perfect_classifier() -> None:
    assert measures(50 * torch.eye(4), torch.arange(4)) == pytest.approx(
        {"accuracy": 1, "loss": 0, "macro_f1": 1, "calibration_error": 0, "auroc": 1}
    )


def test_the_worst_classifier_is_sure_and_always_wrong() -> None:
    found = measures(50 * torch.eye(2), torch.tensor([1, 0]))
    assert found == pytest.approx({"accuracy": 0, "loss": 50, "macro_f1": 0, "calibration_error": 1, "auroc": 0})


def test_a_classifier_that_knows_nothing() -> None:
    found = measures(torch.zeros(8, 4), torch.arange(8) % 4)
    assert found["accuracy"] == 0.25
    assert found["loss"] == pytest.approx(math.log(4))
    assert found["auroc"] == 0.5
    assert found["calibration_error"] == pytest.approx(0)
    assert found["macro_f1"] == pytest.approx((2 * 2 / (2 + 8)) / 4)


def test_equal_probabilities_tie_whatever_their_logits() -> None:
    """Both images are at chance; 1e4 more in all logits of one must not rank it above the other."""
    found = measures(torch.tensor([[0.1, 0.1, 0.1], [1e4, 1e4, 1e4]]), torch.tensor([0, 1]))
    assert found["auroc"] == 0.5


def test_probabilities_too_small_for_a_float_are_still_ranked() -> None:
    """e⁻⁸⁰⁰ and e⁻⁹⁰⁰ are both 0 in float64; so near to 1, on the other hand, the two are equal."""
    found = measures(torch.tensor([[0.0, -800.0], [0.0, -900.0]]), torch.tensor([1, 0]))
    assert found["auroc"] == (1.0 + 0.5) / 2


def test_one_image_has_no_area() -> None:
    found = measures(torch.tensor([[0.0, LOG3]]), torch.tensor([1]))
    assert found == {
        "accuracy": 1.0,
        "loss": pytest.approx(math.log(4 / 3)),
        "macro_f1": 1.0,
        "calibration_error": pytest.approx(0.25),
    }


def test_images_of_one_class_have_no_area() -> None:
    found = measures(torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]), torch.tensor([2, 2]))
    assert set(found) == ALL - {"auroc"}
    assert found["macro_f1"] == pytest.approx(2 / 3)  # TP 1, FN 1, FP 0


def test_an_experiment_of_one_class() -> None:
    assert measures(torch.tensor([[3.0], [-1.0]]), torch.tensor([0, 0])) == {
        "accuracy": 1.0, "loss": 0.0, "macro_f1": 1.0, "calibration_error": 0.0,
    }  # fmt: skip


def test_classes_without_images_count_only_as_wrong_guesses() -> None:
    """Class 1 is guessed once and class 2 never occurs: neither has an F1 or an area of its own."""
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 2.0]])
    found = measures(logits, torch.tensor([0, 0, 3]))
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["auroc"] == pytest.approx((0.5 + 1) / 2)  # class 0 is likelier in the third image than in the second


def test_macro_f1_and_accuracy_differ_where_classes_do() -> None:
    predicted, labels = torch.zeros(100, dtype=torch.long), torch.tensor([0] * 99 + [1])
    assert macro_f1(predicted, labels) == pytest.approx((2 * 99 / (2 * 99 + 1)) / 2)


@pytest.mark.parametrize("edge", range(1, 15))
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(edge: int) -> None:
    """A right answer and a wrong one make up for each other in one bin, and cannot in two."""
    value = torch.tensor(edge / 15, dtype=torch.float64)
    below, above = value - 1e-6, value + 1e-6
    is_right = torch.tensor([True, False])
    assert calibration_error(torch.stack([value, below]), is_right) == pytest.approx(abs(0.5 - edge / 15), abs=1e-5)
    assert calibration_error(torch.stack([above, value]), is_right) == pytest.approx(0.5, abs=1e-5)


# How it is computed


def test_logits_in_half_precision_are_measured_in_float64() -> None:
    logits, labels = case(1, 200, 5)
    half = logits.to(torch.bfloat16)
    assert measures(half, labels) == measures(half.double(), labels)


def test_logits_in_float64_are_not_rounded() -> None:
    found = measures(torch.tensor([[1.0, 1.0 + 1e-12], [1.0, 1.0]], dtype=torch.float64), torch.tensor([1, 0]))
    assert (found["accuracy"], found["auroc"]) == (1.0, 1.0)


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_the_pieces_change_no_bit(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = case(2, 50, 6)
    whole = measures(logits, labels)
    monkeypatch.setattr(module, "_PIECE", piece)
    assert measures(logits, labels) == whole


def test_what_goes_in_is_not_changed_and_may_need_a_gradient() -> None:
    logits, labels = case(3, 20, 4)
    before = logits.clone()
    found = measures(logits.requires_grad_(), labels)
    assert torch.equal(logits, before)
    assert found == measures(before, labels)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made; views of `known` cost nothing."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.bytes = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


def test_many_images_of_many_classes_take_little_memory_beside_the_logits() -> None:
    logits, labels = case(4, 20_000, 1_000)
    with Largest(logits) as largest:
        found = measures(logits, labels)
    assert 0 < largest.bytes <= 8 * module._PIECE < logits.nbytes / 2
    assert found["auroc"] == pytest.approx(0.5, abs=0.01)
    assert found["accuracy"] == pytest.approx(1 / 1000, abs=0.001)


def test_the_norm_makes_probabilities() -> None:
    logits, _ = case(5, 30, 6)
    norm = softmax_norm(logits)
    probabilities = (logits.double() - norm.peak[:, None] - norm.log_sum[:, None]).exp()
    torch.testing.assert_close(probabilities, logits.double().softmax(1), rtol=1e-12, atol=0)
