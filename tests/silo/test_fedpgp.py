"""FedPGP: the contrastive term and the personal context by hand, its limits, and its two positives."""

import math

import pytest
import torch
import torch.nn.functional as F
from towers import (
    DIMS,
    LinearTower,
    TurningTower,
    angled,
    drawn,
    examples,
    images,
    labelled,
    local,
    make,
    tensors,
    trained,
    variables,
)

from silo.method import Batch, ImageFeatures
from silo.methods.fedpgp import contrast, personal_context


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_the_contrastive_term_by_hand() -> None:
    """Class 0: p = 0.6, n = 1; class 1: p = 0, n = −1; τ = 0.5."""
    shared = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    positive = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    personal = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    expected = (softplus((1 - 0.6) / 0.5) + softplus((-1 - 0) / 0.5)) / 2
    assert float(contrast(shared, personal, positive, 0.5)) == pytest.approx(expected)
    assert expected == pytest.approx((-math.log(math.e**1.2 / (math.e**1.2 + math.e**2)) + softplus(-2)) / 2)
    assert float(contrast(shared, personal, positive, 0.5)) != pytest.approx(
        float(contrast(shared, positive, personal, 0.5)), abs=0.1
    )


def test_it_is_the_cross_entropy_of_the_pairs_whatever_the_leading_axes() -> None:
    shared, personal, positive = (F.normalize(drawn(at, 2, 3, 4), dim=-1) for at in (1, 2, 3))
    pairs = torch.stack([(shared * positive[0]).sum(-1), (shared * personal).sum(-1)], -1).reshape(6, 2) / 0.7
    expected = F.cross_entropy(pairs, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(contrast(shared, personal, positive[0], 0.7), expected)


def test_the_whole_loss_by_hand() -> None:
    """σ turns by 0.2, σ + U·V by 0.2 + 0.5·0.4; the positive stands at 0, or opposite as the placeholder."""
    params = {"shared_context": angled(0.2), "left": torch.tensor([[0.5]]), "right": torch.tensor([[0.4, 0.0, 0.0]])}
    batch = Batch(ImageFeatures(torch.tensor([[1.0, 0.0]]), None), torch.tensor([0]))
    first = softplus(-2 * math.sin(0.4) - 2 * math.cos(0.4))  # logits 2(cos a, −sin a), label 0
    for positive, sign in (("handcrafted", 1), ("placeholder", -1)):
        declared = make("fedpgp", context_length=1, rank=1, contrast_weight=3, temperature=0.25, positive=positive)
        method = local(declared, TurningTower())
        second = softplus((math.cos(0.2) - sign * math.cos(0.2)) / 0.25)
        assert float(method.loss(params, {}, batch)) == pytest.approx(first + 3 * second, rel=1e-5)
        expected = torch.tensor([[2 * math.cos(0.4), -2 * math.sin(0.4)]])
        torch.testing.assert_close(method.classify(params)(batch.images), expected)


@pytest.mark.parametrize("options", [{}, {"context_count": 2}, {"class_specific": True}])
def test_the_personal_context_differs_by_a_matrix_of_the_declared_rank(options: dict[str, object]) -> None:
    params = tensors(make("fedpgp", **options))
    difference = personal_context(params) - params["shared_context"]
    assert difference.shape == params["shared_context"].shape
    assert torch.linalg.matrix_rank(difference, rtol=1e-4).flatten().tolist() == [2] * (difference.numel() // 18)


@pytest.mark.parametrize("options", [{}, {"context_count": 2}, {"class_specific": True}])
def test_without_adapter_and_contrast_it_is_promptfl(options: dict[str, object]) -> None:
    pgp, plain = make("fedpgp", contrast_weight=0.0, **options), make("promptfl", **options)
    context = tensors(plain, size=0.1)["context"]
    zeros = {spec.name: torch.zeros(spec.shape) for spec in pgp.tensors(DIMS)[1:]}
    ours = trained(pgp, examples(), {"shared_context": context, **zeros})
    theirs = trained(plain, examples(), {"context": context})
    torch.testing.assert_close(ours.shared["shared_context"], theirs.shared["context"])
    assert not any(bool(tensor.any()) for tensor in ours.private.values())  # each is the other's gradient
    held = {**ours.shared, **ours.private}
    torch.testing.assert_close(local(pgp).classify(held)(images()), local(plain).classify(theirs.shared)(images()))


def test_a_weight_of_zero_needs_the_personal_features_only() -> None:
    for weight, contexts in ((0.0, 1), (0.5, 2)):
        declared, text = make("fedpgp", contrast_weight=weight), LinearTower()
        local(declared, text).loss(tensors(declared), {}, labelled())
        assert text.calls == [(contexts, 1, 3, 6)]


def test_the_contrast_trains_the_shared_context_and_parts_the_personal_one_from_it() -> None:
    """Cross-entropy alone gives σ and σ + U·V the same gradient; the term gives σ another one."""
    declared, params = make("fedpgp"), variables(make("fedpgp"))
    gradients = []
    for weight in (0.0, 0.5):
        loss = local(make("fedpgp", contrast_weight=weight)).loss(params, {}, labelled())
        gradients.append(torch.autograd.grad(loss, list(params.values())))
    for without, with_term in zip(*gradients, strict=True):
        assert float((without - with_term).abs().max()) > 1e-3
    assert [spec.name for spec in declared.tensors(DIMS)] == ["shared_context", "left", "right"]


def test_the_placeholder_has_the_length_and_the_class_position_of_the_context() -> None:
    asked: list[tuple[int, str]] = []

    class Recording(LinearTower):
        def placeholder(self, length: int, position: object = None) -> torch.Tensor:
            asked.append((length, str(position)))
            return self.handcrafted()

    for position in ("end", "front"):
        declared = make("fedpgp", positive="placeholder", class_position=position)
        local(declared, Recording()).loss(tensors(declared), {}, labelled())
    assert asked == [(3, "end"), (3, "front")]
