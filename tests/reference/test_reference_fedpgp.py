"""FedPGP: features, both terms of the loss, gradients, steps and rounds; two prompts as the authors' code has them."""

import pytest
import torch
import torch.nn.functional as F
from recorded import SGD, Reference, close, descend, federation, gradients, settings, values, variables, within
from torch import Tensor

from fedrt.methods.fedpgp import FedPGP
from silo.contexts import class_features
from silo.method import Params
from silo.methods.fedpgp import contrast, personal_context
from silo.training import make_optimizer

TENSORS = {"sigma": "shared_context", "U": "left", "V": "right"}


def declared(case: str) -> FedPGP:
    about = settings(case)["fedpgp"]
    return FedPGP(
        context_length=4,
        context_count=about.get("num_prompts", 1),
        rank=about["bottleneck"],
        contrast_weight=about["mu"],
        temperature=about["temp"],
        positive="placeholder",
    )


def start(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """One prompt is recorded with a leading axis of 1, which fedrt does without."""
    return {ours: one(recorded[f"{theirs}_init"]) for theirs, ours in TENSORS.items()}


def one(tensor: Tensor) -> Tensor:
    return tensor.squeeze(0) if tensor.shape[0] == 1 else tensor


def test_features_and_cosines(reference: Reference) -> None:
    recorded, method = values("fedpgp"), declared("fedpgp")
    params, tower = start(recorded), reference.text_tower()
    shared, personal = class_features(tower, method, params["shared_context"], personal_context(params))[:, 0]
    positive = tower.placeholder(4)
    close(shared, recorded["text_features_norm_global"])
    close(personal, recorded["text_features_norm_personal"])
    close(positive, recorded["text_features_norm_frozen"])
    close(tower.encode(params["left"] @ params["right"]), recorded["text_features_norm_lowrank_only"])
    close((shared * positive).sum(-1), recorded["cos_global_frozen"])
    close((shared * personal).sum(-1), recorded["cos_global_personal"])


def test_logits_losses_and_gradients(reference: Reference) -> None:
    recorded, method = values("fedpgp"), declared("fedpgp")
    local, tower = reference.local(method), reference.text_tower()
    params, batch = variables(**start(recorded)), reference.batch(0)
    logits = local.classify(params)(batch.images)
    close(logits, recorded["logits"])
    close(logits, recorded["eval_logits"])
    features = class_features(tower, method, params["shared_context"], personal_context(params))
    losses = {
        "ce": F.cross_entropy(logits, batch.labels),
        "contrastive": contrast(features[0], features[1], tower.placeholder(4), method.temperature),
        "total": local.loss(params, {}, batch),
    }
    close(losses["ce"], recorded["loss_ce"])
    close(losses["contrastive"], recorded["loss_contrastive"])
    close(losses["total"], recorded["losses"][0])
    assert not tower.placeholder(4).requires_grad
    for term, loss in losses.items():
        for theirs, ours in TENSORS.items():
            close(gradients(loss, params)[ours], one(recorded[f"grad_{term}_{theirs}"]))


def test_five_steps(reference: Reference) -> None:
    recorded = values("fedpgp")
    states, losses = descend(reference, reference.local(declared("fedpgp")), start(recorded), {})
    close(losses, recorded["losses"])
    for theirs, ours in TENSORS.items():
        within(states[0][ours], one(recorded[f"{theirs}_step1"]))
        within(states[4][ours], one(recorded[f"{theirs}_step5"]))


def test_the_handcrafted_prompt_is_another_positive(reference: Reference) -> None:
    """Ours by default, as in the paper; the recorded loss is that of the authors' placeholder."""
    recorded = values("fedpgp")
    handcrafted = FedPGP(context_length=4, rank=2)
    loss = reference.local(handcrafted).loss(start(recorded), {}, reference.batch(0))
    features = {name: recorded[f"text_features_norm_{name}"] for name in ("global", "personal")}
    expected = contrast(features["global"], features["personal"], reference.text_tower().handcrafted(), 0.5)
    close(loss, recorded["loss_ce"] + 0.5 * expected)
    assert abs(float(expected - recorded["loss_contrastive"])) > 0.01


def test_two_rounds(reference: Reference) -> None:
    recorded, about = values("fedpgp_rounds"), settings("fedpgp_rounds")
    method = declared("fedpgp_rounds")
    rounds = federation(reference, method, start(recorded), about)
    for played in rounds:
        for silo, tensors in played.trained.items():
            for theirs, ours in TENSORS.items():
                name = f"round{played.number}_client{silo}_{theirs}_after_training"
                within(tensors[ours], one(recorded[name]))
        within(played.shared["shared_context"], one(recorded[f"round{played.number}_global_sigma"]))
    last = rounds[-1]
    for silo, private in last.private.items():
        logits = reference.local(method).classify({**last.shared, **private})(reference.batch(0).images)
        close(logits, recorded[f"final_client{silo}_logits"])


class TwoPrompts:
    """The rule of the recorded case, from the method's own parts: features of prompt after prompt are 2C columns."""

    def __init__(self, reference: Reference) -> None:
        self.method, self.tower = declared("fedpgp_two_prompts"), reference.text_tower()
        self.positive = self.tower.placeholder(4)

    def features(self, params: Params) -> tuple[Tensor, Tensor]:
        shared, personal = class_features(self.tower, self.method, params["shared_context"], personal_context(params))
        return shared, personal  # [2, C, D] each

    def logits(self, params: Params, images: Tensor) -> Tensor:
        return self.tower.logit_scale * images @ self.features(params)[1].flatten(0, 1).T  # [B, 2C]

    def contrastive(self, params: Params) -> Tensor:
        return contrast(*self.features(params), self.positive, self.method.temperature)


def test_two_prompts_by_the_recorded_rule(reference: Reference) -> None:
    recorded, batch = values("fedpgp_two_prompts"), reference.batch(0)
    two, params = TwoPrompts(reference), variables(**start(recorded))
    shared, personal = two.features(params)
    close(shared.flatten(0, 1), recorded["text_features_norm_global"])
    close(personal.flatten(0, 1), recorded["text_features_norm_personal"])
    close(two.positive.repeat(2, 1), recorded["text_features_norm_frozen"])
    alone = two.tower.encode(params["left"] @ params["right"])
    close(alone.flatten(0, 1), recorded["text_features_norm_lowrank_only"])
    close((shared * two.positive).sum(-1).flatten(), recorded["cos_global_frozen"])
    close((shared * personal).sum(-1).flatten(), recorded["cos_global_personal"])
    logits = two.logits(params, batch.images.pooled)
    close(logits, recorded["logits"])
    close(logits, recorded["eval_logits"])
    losses = {"ce": F.cross_entropy(logits, batch.labels), "contrastive": two.contrastive(params)}
    losses["total"] = losses["ce"] + two.method.contrast_weight * losses["contrastive"]
    close(losses["ce"], recorded["loss_ce"])
    close(losses["contrastive"], recorded["loss_contrastive"])
    for term, loss in losses.items():
        for theirs, ours in TENSORS.items():
            close(gradients(loss, params)[ours], recorded[f"grad_{term}_{theirs}"])


def test_five_steps_of_two_prompts_by_the_recorded_rule(reference: Reference) -> None:
    recorded, two = values("fedpgp_two_prompts"), TwoPrompts(reference)
    params = variables(**start(recorded))
    optimizer, losses = make_optimizer(SGD, list(params.values())), []
    for number in range(5):
        batch = reference.batch(number)
        loss = F.cross_entropy(two.logits(params, batch.images.pooled), batch.labels)
        loss = loss + two.method.contrast_weight * two.contrastive(params)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        for theirs, ours in TENSORS.items():
            if number in (0, 4):
                within(params[ours], recorded[f"{theirs}_step{number + 1}"])
    close(torch.stack(losses), recorded["losses"])


def test_ours_votes_with_the_mean_of_the_two_prompts_logits(reference: Reference) -> None:
    """Every column of ours is a class; in the recorded rule six of twelve are not."""
    recorded, batch = values("fedpgp_two_prompts"), reference.batch(0)
    params = start(recorded)
    local = reference.local(declared("fedpgp_two_prompts"))
    mean = recorded["logits"].reshape(4, 2, 6).mean(1)
    close(local.classify(params)(batch.images), mean)
    expected = F.cross_entropy(mean, batch.labels) + 0.5 * recorded["loss_contrastive"]
    close(local.loss(params, {}, batch), expected)


@pytest.mark.parametrize("case", ["fedpgp", "fedpgp_rounds"])
def test_recorded_hyperparameters_but_for_rank_are_the_published_defaults(case: str) -> None:
    ours = FedPGP()
    assert (declared(case).contrast_weight, declared(case).temperature) == (ours.contrast_weight, ours.temperature)
