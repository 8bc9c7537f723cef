"""CoOp's prompt and PromptFL's loss: features, logits, losses, gradients and optimiser steps."""

import pytest
import torch
import torch.nn.functional as F
from recorded import BATCH, SGD, Reference, close, values, within
from torch import Tensor

from fedrt.method import ModelDims
from fedrt.methods.promptfl import PromptFL
from fedrt.spec import TrainingSpec
from silo.clip import ClassPosition
from silo.methods import promptfl
from silo.training import Examples, Plan, RoundPosition, Start, make_optimizer, train


@pytest.fixture(scope="module")
def coop() -> dict[str, Tensor]:
    return values("coop")


@pytest.mark.parametrize("position", list(ClassPosition))
def test_features_logits_loss_and_gradient(
    reference: Reference, coop: dict[str, Tensor], position: ClassPosition
) -> None:
    tower = reference.clip.text_tower(reference.class_names, position)
    method = promptfl.build(PromptFL(context_length=4), tower)
    context = coop["ctx_init"].clone().requires_grad_()
    batch = reference.batch(0)
    close(batch.images.pooled, F.normalize(coop["image_features_raw"], dim=-1))
    close(tower.encode(context), F.normalize(coop[f"text_features_raw_{position.value}"], dim=-1))
    close(method.logits({"context": context}, batch.images), coop[f"logits_{position.value}"])
    loss = method.loss({"context": context}, {}, batch)
    close(loss, coop[f"loss_{position.value}"])
    loss.backward()
    assert context.grad is not None
    close(context.grad, coop[f"grad_ctx_{position.value}"])


def test_five_steps(reference: Reference, coop: dict[str, Tensor]) -> None:
    method = promptfl.build(PromptFL(context_length=4), reference.clip.text_tower(reference.class_names))
    context = coop["ctx_init"].clone().requires_grad_()
    optimizer = make_optimizer(SGD, [context])
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss = method.loss({"context": context}, {}, reference.batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step == 0:
            within(context, coop["ctx_step1"])
    close(torch.stack(losses), coop["losses"])
    within(context, coop["ctx_step5"])
    close(method.logits({"context": context}, reference.batch(0).images), coop["logits_after_step5"])


def test_one_step_of_local_training(reference: Reference, coop: dict[str, Tensor]) -> None:
    declared = PromptFL(context_length=4)
    method = promptfl.build(declared, reference.clip.text_tower(reference.class_names))
    specs = declared.tensors(ModelDims(reference.clip.context_dim, reference.clip.feature_dim, 6))
    examples = Examples(*reference.batch(0))
    plan = Plan(TrainingSpec(batch_size=BATCH, optimizer=SGD), RoundPosition(1, 1), seed=1)
    trained = train(method, specs, Start({"context": coop["ctx_init"]}, {}), examples, plan, lambda *_: None)
    within(trained.shared["context"], coop["ctx_step1"])
    close(torch.tensor(trained.metrics["loss"]), coop["losses"][0])


def test_class_specific_contexts(reference: Reference, coop: dict[str, Tensor]) -> None:
    tower = reference.clip.text_tower(reference.class_names)
    contexts = coop["csc_ctx"].clone().requires_grad_()
    batch = reference.batch(0)
    logits = tower.logit_scale * batch.images.pooled @ tower.encode_class_specific(contexts).T
    close(logits, coop["csc_logits"])
    loss = F.cross_entropy(logits, batch.labels)
    close(loss, coop["csc_loss"])
    loss.backward()
    assert contexts.grad is not None
    close(contexts.grad, coop["csc_grad_ctx"])


def test_context_from_words(reference: Reference, coop: dict[str, Tensor]) -> None:
    words = reference.clip.embed_phrase("a photo of a", 4)
    within(words, coop["words_ctx"], 0.0)
    tower = reference.clip.text_tower(reference.class_names)
    close(tower.encode(words), F.normalize(coop["words_text_features_raw"], dim=-1))


def test_image_features_of_one_batch_do_not_depend_on_the_others(reference: Reference) -> None:
    together = reference.clip.encode_images(reference.images, patches=False)
    within(together.pooled[4:8], reference.batch(1).images.pooled, 1e-6)
