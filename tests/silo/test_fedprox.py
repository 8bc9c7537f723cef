"""FedProx: the proximal term by hand, its limits, and its anchor."""

import pytest
import torch
from towers import TurningTower, angled, examples, images, labelled, local, make, tensors, trained, variables

from silo.method import Batch, ImageFeatures


def test_the_term_by_hand() -> None:
    """μ/2 · ‖(3, 0, 4)‖² = 0.25 · 25, with the gradient μ · (3, 0, 4)."""
    plain, prox = make("promptfl", context_length=1), make("fedprox", context_length=1)
    context = {"context": torch.tensor([[3.0, 0.0, 4.0]], requires_grad=True)}
    received, batch = {"context": torch.zeros(1, 3)}, Batch(ImageFeatures(torch.eye(2), None), torch.tensor([1, 0]))
    losses = [local(one, TurningTower()).loss(context, received, batch) for one in (prox, plain)]
    difference = losses[0] - losses[1]
    assert float(difference.detach()) == pytest.approx(6.25, rel=1e-6)
    difference.backward()
    assert context["context"].grad is not None
    torch.testing.assert_close(context["context"].grad, torch.tensor([[1.5, 0.0, 2.0]]))


def test_it_sums_over_several_contexts() -> None:
    declared = make("fedprox", context_count=2)
    params = tensors(declared)
    received = {"context": params["context"] + torch.tensor([1.0, 3.0])[:, None, None]}
    method = local(declared)
    added = method.loss(params, received, labelled()) - method.loss(params, params, labelled())
    assert float(added) == pytest.approx(0.25 * (18 * 1 + 18 * 9), rel=1e-5)


def test_without_weight_it_is_promptfl() -> None:
    prox, plain = make("fedprox", proximal_weight=0.0), make("promptfl")
    params = variables(prox)
    assert torch.equal(local(prox).classify(params)(images()), local(plain).classify(params)(images()))
    ours, theirs = trained(prox, examples()), trained(plain, examples())
    assert torch.equal(ours.shared["context"], theirs.shared["context"])
    assert ours.metrics == theirs.metrics


def test_a_greater_weight_keeps_nearer_to_what_was_received() -> None:
    start = tensors(make("fedprox"), size=0.1)

    def moved(weight: float) -> float:
        result = trained(make("fedprox", proximal_weight=weight), examples(), start, local_epochs=10)
        return float((result.shared["context"] - start["context"]).norm())

    distances = [moved(weight) for weight in (0.0, 0.5, 2.0)]
    assert distances[0] > distances[1] > distances[2] > 0


def test_the_logits_know_nothing_of_the_anchor() -> None:
    prox, plain = make("fedprox", context_length=1), make("promptfl", context_length=1)
    pictures = ImageFeatures(torch.eye(2), None)
    logits = [local(one, TurningTower()).classify({"context": angled(0.3)})(pictures) for one in (prox, plain)]
    assert torch.equal(*logits)
