"""Class features of learnable contexts, and logits from them: what local halves of several methods have in common."""

import torch
from torch import Tensor

from fedrt.context import LearnedContext
from silo.method import ImageFeatures, TextTower


def class_features(text: TextTower, method: LearnedContext, *contexts: Tensor) -> Tensor:
    """Unit-norm features [K, N, C, D] of K tensors declared by `LearnedContext.context`, all in one pass.

    N is `context_count`; the axes that a context lacks, because there is one of them only, are put in.
    """
    if method.context_count == 1:
        contexts = tuple(context.unsqueeze(0) for context in contexts)
    return text.encode(torch.stack(contexts), method.class_position, method.class_specific)


def class_logits(text: TextTower, images: ImageFeatures, features: Tensor) -> Tensor:
    """CLIP's logits [B, C]: s times the cosines of pooled image features [B, D] with class features [C, D].

    In float32, also under autocast: rounding a cosine to bfloat16 moves a logit by up to a tenth.
    """
    with torch.autocast(images.pooled.device.type, enabled=False):
        return text.logit_scale * images.pooled @ features.to(images.pooled.dtype).T
