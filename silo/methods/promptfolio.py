"""PromptFolio, local half: cross-entropy with the mixed class features of a shared and a private context.

Bikang Pan, Wei Huang, Ye Shi: "Federated Learning from Vision-Language Foundation Models: Theoretical Analysis and
Method", NeurIPS 2024, arXiv:2409.19610.
"""

import math

import torch
from torch import Tensor

from fedrt.methods.promptfolio import PUBLISHED_SHARE, PromptFolio
from silo.contexts import class_features, class_logits
from silo.method import Batch, Classifier, ImageFeatures, LocalMethod, Params, TextTower, cross_entropy

SLICE = 1024  # images at a time
LEAST = 0.1  # of either context under `auto`: at 0 a context would not learn, and so never get a share again
ROUNDING = 1e-5  # of a cosine in float32, generously


def build(method: PromptFolio, text: TextTower) -> LocalMethod:
    """Logits are s · unit(img) · ((1 − θ)·z_G + θ·z_L)ᵀ of the unit-norm class features; the loss is cross-entropy.

    The mixed features are not normalised again, so the logits are the mixed logits. With `share: auto`, θ is the
    tensor `share`, and `prepare` sets it to the best share of the two contexts' margins, but at least `LEAST` for each.
    """

    def features(params: Params) -> Tensor:
        contexts = params["shared_context"], params["private_context"]
        return class_features(text, method, *contexts).mean(1)  # [2, C, D]

    def classify(params: Params) -> Classifier:
        both = features(params)
        share = params["share"] if method.share == "auto" else method.share
        mixed = (1 - share) * both[0] + share * both[1]  # [C, D]

        def logits(images: ImageFeatures) -> Tensor:
            return class_logits(text, images, mixed)

        return logits

    def prepare(params: Params, examples: Batch) -> Params:
        share = best_share(margins(features(params), examples))
        return {"share": torch.full_like(params["share"], min(max(share, LEAST), 1 - LEAST))}

    return LocalMethod(classify, cross_entropy(classify), prepare if method.share == "auto" else None)


def margins(features: Tensor, examples: Batch) -> Tensor:
    """For each of two sets of class features [2, C, D]: how far the true class leads, [2, N].

    The lead is the image's cosine with the true class minus the highest one with another class: positive if the image
    is classified rightly, and 0 if there is no other class.
    """
    classes = torch.arange(features.shape[1], device=features.device)
    parts = []
    for at in range(0, len(examples.labels), SLICE):
        cosines = examples.images.pooled[at : at + SLICE] @ features.mT  # [2, n, C]
        truth = examples.labels[at : at + SLICE, None] == classes
        right = cosines.masked_fill(~truth, -math.inf).amax(-1)
        wrong = cosines.masked_fill(truth, -math.inf).amax(-1)
        parts.append(torch.where(wrong.isfinite(), right - wrong, 0.0))
    return torch.cat(parts, dim=1)


def best_share(scores: Tensor) -> float:
    """θ in [0, 1] with the greatest mean/std of (1 − θ)·G + θ·L over the examples, for scores G and L [2, N].

    With means μ, variances σ² and covariance σ_GL it is
    (μ_L σ_G² − μ_G σ_GL) / (μ_L σ_G² + μ_G σ_L² − (μ_G + μ_L) σ_GL)
    if that is a maximum inside [0, 1], and else the better end, also for negative means. Why this ratio: if scores are
    normal, the share of positive ones grows with it. Why margins as scores: mixed margins are at most the margin of the
    mixed logits, because the highest of sums is at most the sum of the highest.

    Where the ratio is the same for every θ, or has no value, the published share is returned: one example, no two
    different scores, no other class, or two contexts with the same scores.
    """
    values = scores.double()
    means = values.mean(1, keepdim=True)
    (var_g, cov), (_, var_l) = ((values - means) @ (values - means).T / values.shape[1]).tolist()
    if max(var_g, var_l) <= ROUNDING**2 or float((values[1] - values[0]).abs().max()) <= ROUNDING:
        return PUBLISHED_SHARE
    mean_g, mean_l = means.flatten().tolist()
    # the ratio's slope at θ has the sign of (1 − θ)·rise − θ·fall
    rise, fall = mean_l * var_g - mean_g * cov, mean_g * var_l - mean_l * cov
    if rise > 0 and fall > 0:
        inside: float = rise / (rise + fall)
        return inside
    if rise < 0 and fall < 0:  # the stationary point is the lowest: the better end has the greater mean/std
        return 1.0 if mean_l * math.sqrt(var_g) > mean_g * math.sqrt(var_l) else 0.0
    if rise == fall:
        return PUBLISHED_SHARE
    return 1.0 if rise > fall else 0.0
