"""CoOp's context by hand, whoever holds it; as a private one it learns what PromptFL's does and sends nothing."""

import math

import pytest
import torch
from towers import TurningTower, angled, examples, images, local, make, tensors, trained

from silo.method import Batch, ImageFeatures


def test_zero_shot_by_hand() -> None:
    method = local(make("zeroshot"), TurningTower())
    batch = Batch(ImageFeatures(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), None), torch.tensor([0, 0]))
    torch.testing.assert_close(method.classify({})(batch.images), torch.tensor([[2.0, 0.0], [1.2, 1.6]]))
    expected = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(0.4))) / 2
    assert float(method.loss({}, {}, batch)) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["coop", "promptfl"])
def test_one_context_by_hand(name: str) -> None:
    method = local(make(name, context_length=1), TurningTower())
    context = angled(0.0).requires_grad_()
    batch = Batch(ImageFeatures(torch.tensor([[1.0, 0.0]]), None), torch.tensor([1]))
    torch.testing.assert_close(method.classify({"context": context})(batch.images), torch.tensor([[2.0, 0.0]]))
    quarter = {"context": angled(math.pi / 2)}
    torch.testing.assert_close(method.classify(quarter)(batch.images), torch.tensor([[0.0, -2.0]]))
    method.loss({"context": context}, {}, batch).backward()
    # logits 2(cos a, −sin a), label 1: d loss / d a at 0 = 0·(…) − 2·(p₁ − 1) with p₁ = 1 / (1 + e²)
    assert context.grad is not None
    assert context.grad.flatten().tolist() == pytest.approx([2 * (1 - 1 / (1 + math.exp(2))), 0.0, 0.0])


@pytest.mark.parametrize("name", ["coop", "promptfl"])
def test_two_contexts_vote_with_the_mean_of_their_logits(name: str) -> None:
    method = local(make(name, context_length=1, context_count=2), TurningTower())
    context = torch.stack([angled(0.0), angled(math.pi / 2)])
    logits = method.classify({"context": context})(ImageFeatures(torch.tensor([[1.0, 0.0]]), None))
    torch.testing.assert_close(logits, (torch.tensor([[2.0, 0.0]]) + torch.tensor([[0.0, -2.0]])) / 2)


def test_a_context_that_adds_nothing_is_zero_shot() -> None:
    nothing = {"context": torch.zeros(3, 6)}
    for name in ("coop", "promptfl"):
        logits = local(make(name)).classify(nothing)(images())
        torch.testing.assert_close(logits, local(make("zeroshot")).classify({})(images()))


def test_coop_learns_in_private_what_promptfl_learns_to_share() -> None:
    alone, together = make("coop"), make("promptfl")
    start = tensors(alone, size=0.1)
    ours, theirs = trained(alone, examples(), start), trained(together, examples(), start)
    assert (ours.shared, theirs.private) == ({}, {})
    assert torch.equal(ours.private["context"], theirs.shared["context"])
    assert not torch.equal(ours.private["context"], start["context"])
