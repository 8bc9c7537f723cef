"""Zero-shot CLIP, local half: the logits of "a photo of a {class}.", nothing trained.

Alec Radford et al.: "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
arXiv:2103.00020.
"""

from torch import Tensor

from fedrt.methods.zeroshot import ZeroShot
from silo.contexts import class_logits
from silo.method import Classifier, ImageFeatures, LocalMethod, Params, TextTower, cross_entropy


def build(method: ZeroShot, text: TextTower) -> LocalMethod:
    """Logits are s · unit(img) · unit(text("a photo of a {class}."))ᵀ; the loss is their cross-entropy."""

    def classify(_params: Params) -> Classifier:
        def logits(images: ImageFeatures) -> Tensor:
            return class_logits(text, images, text.handcrafted())

        return logits

    return LocalMethod(classify, cross_entropy(classify))
