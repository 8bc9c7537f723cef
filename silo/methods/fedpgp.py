"""FedPGP, local half: cross-entropy of the personal context, and a contrastive term for the shared one.

Tianyu Cui, Hongxia Li, Jingya Wang, Ye Shi: "Harmonizing Generalization and Personalization in Federated Prompt
Learning", ICML 2024, arXiv:2405.09771.
"""

import torch.nn.functional as F
from torch import Tensor

from fedrt.methods.fedpgp import FedPGP
from silo.contexts import class_features, class_logits
from silo.method import Batch, Classifier, ImageFeatures, LocalMethod, Params, TextTower, cross_entropy


def personal_context(params: Params) -> Tensor:
    """σ + U·V, of σ's shape [..., L, E]."""
    return params["shared_context"] + params["left"] @ params["right"]


def contrast(shared: Tensor, personal: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Mean over classes and contexts of −log(e^{p/τ} / (e^{p/τ} + e^{n/τ})), of unit-norm features [..., C, D].

    p is the cosine of the shared features with the positive ones, n that with the personal ones. No gradient flows
    through `positive`, which a text tower gives without one.
    """
    nearness = (shared * positive).sum(-1)  # [..., C]
    likeness = (shared * personal).sum(-1)
    return F.softplus((likeness - nearness) / temperature).mean()


def build(method: FedPGP, text: TextTower) -> LocalMethod:
    """Logits are s · unit(img) · unit(text(σ + U·V))ᵀ; the loss is their cross-entropy + μ · contrast.

    The features of σ and σ + U·V come from one pass; an evaluation, or μ = 0, needs the latter only.
    """

    def classifier(features: Tensor) -> Classifier:
        mean = features.mean(0)  # [N, C, D] -> [C, D]

        def logits(images: ImageFeatures) -> Tensor:
            return class_logits(text, images, mean)

        return logits

    def classify(params: Params) -> Classifier:
        return classifier(class_features(text, method, personal_context(params))[0])

    def positive() -> Tensor:
        if method.positive == "handcrafted":
            return text.handcrafted()
        return text.placeholder(method.context_length, method.class_position)

    def loss(params: Params, _received: Params, batch: Batch) -> Tensor:
        shared, personal = class_features(text, method, params["shared_context"], personal_context(params))
        first = F.cross_entropy(classifier(personal)(batch.images), batch.labels)
        return first + method.contrast_weight * contrast(shared, personal, positive(), method.temperature)

    return LocalMethod(classify, loss if method.contrast_weight else cross_entropy(classify))
