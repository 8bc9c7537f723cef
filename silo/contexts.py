"""Class features of learnable contexts: how local halves turn a context of `LearnedContext` into features."""

import torch
from torch import Tensor

from fedrt.context import LearnedContext
from silo.method import TextTower


def class_features(text: TextTower, method: LearnedContext, *contexts: Tensor) -> Tensor:
    """Unit-norm features [K, N, C, D] of K tensors declared by `LearnedContext.context`, all in one pass.

    N is `context_count`; the axes that a context lacks, because there is one of them only, are put in.
    """
    if method.context_count == 1:
        contexts = tuple(context.unsqueeze(0) for context in contexts)
    return text.encode(torch.stack(contexts), method.class_position, method.class_specific)
