"""Local CoOp, local half: cross-entropy of CLIP's logits with one learnable context.

Kaiyang Zhou, Jingkang Yang, Chen Change Loy, Ziwei Liu: "Learning to Prompt for Vision-Language Models", IJCV 2022,
arXiv:2109.01134.
"""

from torch import Tensor

from fedrt.context import LearnedContext
from silo.contexts import class_features, class_logits
from silo.method import Classifier, ImageFeatures, LocalMethod, Params, TextTower, cross_entropy


def build(method: LearnedContext, text: TextTower) -> LocalMethod:
    """Logits are s · unit(img) · unit(text([start, context, class, '.', end]))ᵀ; the loss is their cross-entropy.

    `method` declares the tensor `context`, of either scope; several contexts vote with the mean of their logits.
    """

    def classify(params: Params) -> Classifier:
        features = class_features(text, method, params["context"])[0].mean(0)  # [C, D]

        def logits(images: ImageFeatures) -> Tensor:
            return class_logits(text, images, features)

        return logits

    return LocalMethod(classify, cross_entropy(classify))
