"""CoOp's prompt and loss: features, logits, losses, gradients and optimiser steps."""

import pytest
import torch
import torch.nn.functional as F
from recorded import Reference, close, descend, gradients, train_silo, values, variables, within
from torch import Tensor

from fedrt.context import ClassPosition
from fedrt.methods.coop import CoOp
from fedrt.methods.promptfl import PromptFL

PLAIN = CoOp(context_length=4)


@pytest.fixture(scope="module")
def coop() -> dict[str, Tensor]:
    return values("coop")


@pytest.mark.parametrize("position", list(ClassPosition))
def test_features_logits_loss_and_gradient(
    reference: Reference, coop: dict[str, Tensor], position: ClassPosition
) -> None:
    method = reference.local(CoOp(context_length=4, class_position=position))
    params, batch = variables(context=coop["ctx_init"]), reference.batch(0)
    close(batch.images.pooled, F.normalize(coop["image_features_raw"], dim=-1))
    features = reference.text_tower().encode(params["context"], position)
    close(features, F.normalize(coop[f"text_features_raw_{position}"], dim=-1))
    close(method.classify(params)(batch.images), coop[f"logits_{position}"])
    loss = method.loss(params, {}, batch)
    close(loss, coop[f"loss_{position}"])
    close(gradients(loss, params)["context"], coop[f"grad_ctx_{position}"])


@pytest.mark.parametrize("declared", [PLAIN, PromptFL(context_length=4)], ids=lambda declared: declared.name)
def test_five_steps(reference: Reference, coop: dict[str, Tensor], declared: CoOp | PromptFL) -> None:
    method = reference.local(declared)
    states, losses = descend(reference, method, {"context": coop["ctx_init"]}, {})
    within(states[0]["context"], coop["ctx_step1"])
    within(states[4]["context"], coop["ctx_step5"])
    close(losses, coop["losses"])
    close(method.classify(states[4])(reference.batch(0).images), coop["logits_after_step5"])


def test_one_step_of_local_training(reference: Reference, coop: dict[str, Tensor]) -> None:
    trained = train_silo(reference, PLAIN, {"context": coop["ctx_init"]}, reference.examples([0]))
    assert trained.shared == {}
    within(trained.private["context"], coop["ctx_step1"])
    close(torch.tensor(trained.metrics["loss"]), coop["losses"][0])


def test_class_specific_contexts(reference: Reference, coop: dict[str, Tensor]) -> None:
    method = reference.local(CoOp(context_length=4, class_specific=True))
    params, batch = variables(context=coop["csc_ctx"]), reference.batch(0)
    close(method.classify(params)(batch.images), coop["csc_logits"])
    loss = method.loss(params, {}, batch)
    close(loss, coop["csc_loss"])
    close(gradients(loss, params)["context"], coop["csc_grad_ctx"])


def test_context_from_words(reference: Reference, coop: dict[str, Tensor]) -> None:
    words = reference.clip.embed_phrase("a photo of a", 4)
    within(words, coop["words_ctx"], 0.0)
    tower = reference.text_tower()
    close(tower.encode(words), F.normalize(coop["words_text_features_raw"], dim=-1))
    close(tower.encode(words), tower.handcrafted())


def test_image_features_of_one_batch_do_not_depend_on_the_others(reference: Reference) -> None:
    together = reference.clip.encode_images(reference.images, patches=False)
    within(together.pooled[4:8], reference.batch(1).images.pooled, 1e-6)
