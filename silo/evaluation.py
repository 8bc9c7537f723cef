"""Local evaluation: accuracy and loss of given tensors on given examples."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from silo.method import LocalMethod, Params
from silo.training import Examples

PATCHES_BATCH = 256  # images at a time where patches make the intermediates large


@torch.no_grad()
def evaluate(method: LocalMethod, params: Params, examples: Examples, batch: int | None = None) -> dict[str, float]:
    """`accuracy` in [0, 1] and `loss`, the mean cross-entropy, in float32.

    Without patches all images go through at once by default, so the text tower runs once; `batch` bounds how many do.
    Raises `WorkError` without examples or if a logit is not finite.
    """
    count = len(examples)
    if count == 0:
        raise WorkError(FailureReason.DATA_UNAVAILABLE, "there are no examples to evaluate")
    size = batch or (count if examples.images.patches is None else PATCHES_BATCH)
    correct: list[Tensor] = []
    losses: list[Tensor] = []
    for at in range(0, count, size):
        part = examples.batch(slice(at, at + size))
        logits = method.logits(params, part.images)
        correct.append((logits.argmax(dim=1) == part.labels).sum())
        losses.append(F.cross_entropy(logits.double(), part.labels, reduction="sum"))
    loss = float(torch.stack(losses).sum()) / count
    if not math.isfinite(loss):
        raise WorkError(FailureReason.NOT_FINITE, "the logits are not finite; the tensors or the features are damaged")
    return {"accuracy": int(torch.stack(correct).sum()) / count, "loss": loss}
