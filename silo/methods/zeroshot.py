"""Zero-shot CLIP, local half: the logits of "a photo of a {class}.", nothing trained.

Alec Radford et al.: "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
arXiv:2103.00020.
"""

import torch.nn.functional as F
from torch import Tensor

from fedrt.methods.zeroshot import ZeroShot
from silo.method import Batch, ImageFeatures, LocalMethod, Params, TextTower


def build(method: ZeroShot, text: TextTower) -> LocalMethod:
    """Logits are s · unit(img) · unit(text("a photo of a {class}."))ᵀ; the loss is their cross-entropy."""
    classes = text.handcrafted()  # [C, D]

    def logits(_params: Params, images: ImageFeatures) -> Tensor:
        return text.logit_scale * images.pooled @ classes.T  # [B, C]

    def loss(params: Params, _received: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(logits(params, batch.images), batch.labels)

    return LocalMethod(logits, loss)
