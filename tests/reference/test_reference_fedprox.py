"""FedProx: the proximal term with its gradient, and proof that the variant without one is another method."""

import pytest
import torch
from recorded import Reference, close, descend, gradients, settings, train_silo, values, variables, within
from torch import Tensor

from fedrt.methods.fedprox import FedProx
from fedrt.methods.promptfl import PromptFL


@pytest.fixture(scope="module")
def fedprox() -> dict[str, Tensor]:
    return values("fedprox")


@pytest.fixture(scope="module")
def declared() -> FedProx:
    weight = settings("fedprox")["mu"]
    assert weight == FedProx().proximal_weight
    return FedProx(context_length=4, proximal_weight=weight)


def test_loss_and_gradient(reference: Reference, fedprox: dict[str, Tensor], declared: FedProx) -> None:
    received = {"context": fedprox["ctx_global"]}
    params, batch = variables(context=fedprox["ctx_local"]), reference.batch(0)
    loss = reference.local(declared).loss(params, received, batch)
    close(loss, fedprox["prox_losses"][0])
    close(loss, fedprox["nograd_total_loss"])  # the value is the same in that variant
    close(gradients(loss, params)["context"], fedprox["prox_grad"])


def test_without_the_term_it_is_cross_entropy(reference: Reference, fedprox: dict[str, Tensor]) -> None:
    params, batch = variables(context=fedprox["ctx_local"]), reference.batch(0)
    for declared in (FedProx(context_length=4, proximal_weight=0.0), PromptFL(context_length=4)):
        loss = reference.local(declared).loss(params, {"context": fedprox["ctx_global"]}, batch)
        close(loss, fedprox["ce_loss"])
        close(gradients(loss, params)["context"], fedprox["grad_ce"])
        close(gradients(loss, params)["context"], fedprox["nograd_grad"])


def test_five_steps(reference: Reference, fedprox: dict[str, Tensor], declared: FedProx) -> None:
    received = {"context": fedprox["ctx_global"]}
    states, losses = descend(reference, reference.local(declared), {"context": fedprox["ctx_local"]}, received)
    within(states[0]["context"], fedprox["prox_ctx_step1"])
    within(states[4]["context"], fedprox["prox_ctx_step5"])
    close(losses, fedprox["prox_losses"])


def test_a_term_without_gradient_takes_the_step_of_plain_cross_entropy(
    reference: Reference, fedprox: dict[str, Tensor], declared: FedProx
) -> None:
    start, received = {"context": fedprox["ctx_local"]}, {"context": fedprox["ctx_global"]}
    plain, _ = descend(reference, reference.local(PromptFL(context_length=4)), start, received)
    within(plain[0]["context"], fedprox["nograd_ctx_step1"])
    ours, _ = descend(reference, reference.local(declared), start, received)
    worst = float((ours[0]["context"] - fedprox["nograd_ctx_step1"]).abs().max())
    assert worst > 10 * 1e-5, "the proximal term has no effect on the step"
    assert float((fedprox["prox_grad"] - fedprox["nograd_grad"]).abs().max()) > 0.05


def test_in_training_the_anchor_is_what_was_received(
    reference: Reference, fedprox: dict[str, Tensor], declared: FedProx
) -> None:
    """The term is 0 before the first step of a round and pulls from the second."""
    start = {"context": fedprox["ctx_global"]}
    examples = reference.examples([0, 1])
    ours = train_silo(reference, declared, start, examples).shared["context"]
    plain = train_silo(reference, PromptFL(context_length=4), start, examples).shared["context"]
    first = train_silo(reference, declared, start, reference.examples([0])).shared["context"]
    only = train_silo(reference, PromptFL(context_length=4), start, reference.examples([0])).shared["context"]
    assert torch.equal(first, only)
    expected = plain - 0.005 * 0.5 * (first - fedprox["ctx_global"])  # SGD's rate · μ · what the first step moved
    within(ours, expected, 1e-6)
    assert float((ours - plain).abs().max()) > 1e-5
