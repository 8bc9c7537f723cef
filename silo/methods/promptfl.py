"""PromptFL, local half: cross-entropy of CLIP's logits with one learnable context.

Tao Guo, Song Guo, Junxiao Wang, Wenchao Xu: "PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead
of Models", IEEE Transactions on Mobile Computing 2023, arXiv:2208.11625. The context is CoOp's (Zhou et al., IJCV 2022,
arXiv:2109.01134).
"""

import torch.nn.functional as F
from torch import Tensor

from fedrt.methods.promptfl import PromptFL
from silo.method import Batch, ImageFeatures, LocalMethod, Params, TextTower


def build(method: PromptFL, text: TextTower) -> LocalMethod:
    """Logits are s · unit(img) · unit(text([start, context, class, '.', end]))ᵀ; the loss is their cross-entropy."""

    def logits(params: Params, images: ImageFeatures) -> Tensor:
        return text.logit_scale * images.pooled @ text.encode(params["context"]).T  # [B, C]

    def loss(params: Params, _received: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(logits(params, batch.images), batch.labels)

    return LocalMethod(logits, loss)
