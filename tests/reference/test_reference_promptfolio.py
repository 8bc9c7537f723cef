"""PromptFolio: mixed features, the pure shares 0 and 1, steps, and rounds whose mean ignores the order of listing."""

import pytest
import torch
import torch.nn.functional as F
from recorded import Reference, aggregate, close, descend, federation, gradients, settings, values, variables, within
from torch import Tensor

from fedrt.methods.promptfolio import PromptFolio
from silo.contexts import class_features

NAMES = ("shared_context", "private_context")  # rows 0 and 1 of the recorded contexts


def declared(share: float = 0.4) -> PromptFolio:
    return PromptFolio(context_length=4, share=share)


def split(contexts: Tensor) -> dict[str, Tensor]:
    return dict(zip(NAMES, contexts, strict=True))


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([tensors[name] for name in NAMES])


def test_the_recorded_share_is_the_default() -> None:
    assert settings("promptfolio")["theta"] == settings("promptfolio_rounds")["theta"] == PromptFolio().share


def test_features_and_their_mixture(reference: Reference) -> None:
    recorded, tower = values("promptfolio"), reference.text_tower()
    close(reference.batch(0).images.pooled, recorded["image_features_norm"])
    both = class_features(tower, declared(), *recorded["ctx_init"])[:, 0]
    close(both, F.normalize(recorded["text_features_raw"], dim=-1))
    close(0.6 * both[0] + 0.4 * both[1], recorded["mixed_text_features"])
    # logits of the unit vectors are the mixed features themselves: nothing is normalised again
    classifier = reference.local(declared()).classify(split(recorded["ctx_init"]))
    images = reference.batch(0).images._replace(pooled=torch.eye(reference.dims.feature_dim))
    close(classifier(images).T / tower.logit_scale, recorded["mixed_text_features"])
    assert float((recorded["mixed_text_features"].norm(dim=-1) - 1).abs().max()) > 1e-3


@pytest.mark.parametrize(("case", "share"), [("mix", 0.4), ("global_only", 0.0), ("local_only", 1.0)])
def test_logits_loss_and_gradient(reference: Reference, case: str, share: float) -> None:
    recorded, method, batch = values("promptfolio"), reference.local(declared(share)), reference.batch(0)
    params = variables(**split(recorded["ctx_init"]))
    close(method.classify(params)(batch.images), recorded[f"{case}_logits"])
    loss = method.loss(params, {}, batch)
    close(loss, recorded[f"{case}_loss"])
    close(joined(gradients(loss, params)), recorded[f"{case}_grad_ctx"])


def test_five_steps(reference: Reference) -> None:
    recorded = values("promptfolio")
    states, losses = descend(reference, reference.local(declared()), split(recorded["ctx_init"]), {})
    close(losses, recorded["losses"])
    within(joined(states[0]), recorded["ctx_step1"])
    within(joined(states[4]), recorded["ctx_step5"])


def test_two_rounds(reference: Reference) -> None:
    recorded, about = values("promptfolio_rounds"), settings("promptfolio_rounds")
    rounds = federation(reference, declared(), split(recorded["ctx_init"]), about)
    for played in rounds:
        for silo, tensors in played.trained.items():
            within(joined(tensors), recorded[f"round{played.number}_client{silo}_ctx_after_training"])
        within(played.shared["shared_context"][None], recorded[f"round{played.number}_global"])
    last = rounds[-1]
    for silo, private in last.private.items():
        held = {**last.shared, **private}
        within(joined(held), recorded[f"final_client{silo}_ctx"])
        logits = reference.local(declared()).classify(held)(reference.batch(0).images)
        close(logits, recorded[f"final_client{silo}_logits"])


def test_the_mean_does_not_depend_on_the_order_of_listing() -> None:
    """The authors' code lists uploads in one order and weighs them in another; that variant is recorded too."""
    recorded, about = values("promptfolio_rounds"), settings("promptfolio_rounds")
    trained = {silo: split(recorded[f"round1_client{silo}_ctx_after_training"]) for silo in range(3)}
    shared = {"shared_context": recorded["ctx_init"][0]}
    results = []
    for order in ([0, 1, 2], about["permuted_order"]):
        uploads = {silo: {"shared_context": trained[silo]["shared_context"]} for silo in order}
        results.append(aggregate(declared(), shared, uploads, about["counts"])["shared_context"])
    assert torch.equal(*results)
    within(results[0][None], recorded["round1_global"])
    mixed_up = recorded["round1_global_positional_index_variant"]
    assert float((results[0][None] - mixed_up).abs().max()) > 10 * 1e-5
