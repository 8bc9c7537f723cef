"""PromptFL, local half: cross-entropy of CLIP's logits with one learnable context.

Tao Guo, Song Guo, Junxiao Wang, Wenchao Xu: "PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead
of Models", IEEE Transactions on Mobile Computing 2023, arXiv:2208.11625. The context is CoOp's (Zhou et al., IJCV 2022,
arXiv:2109.01134).
"""

from torch import Tensor

from fedrt.methods.promptfl import PromptFL
from silo.contexts import class_features
from silo.method import Classifier, ImageFeatures, LocalMethod, Params, TextTower, cross_entropy


def build(method: PromptFL, text: TextTower) -> LocalMethod:
    """Logits are s · unit(img) · unit(text([start, context, class, '.', end]))ᵀ; the loss is their cross-entropy."""

    def classify(params: Params) -> Classifier:
        features = class_features(text, method, params["context"])[0].mean(0)  # [C, D]

        def logits(images: ImageFeatures) -> Tensor:
            return text.logit_scale * images.pooled @ features.T  # [B, C]

        return logits

    return LocalMethod(classify, cross_entropy(classify))
