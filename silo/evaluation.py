"""Local evaluation: how well given tensors classify given examples, in float32 whatever training computes in."""

import torch
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from silo.examples import Examples
from silo.measures import measures
from silo.method import Classifier

BATCH = 16_384  # images at a time, one matrix product for most splits: with 1,000 classes 64 MiB of logits
PATCHES_BATCH = 64  # where the intermediates are B x C x M x N: with 1,000 classes, ViT-B/16 and 2 prompts 96 MiB each


@torch.no_grad()
def evaluate(classifier: Classifier, examples: Examples, batch: int | None = None) -> dict[str, float]:
    """The measures of `silo.measures` on all examples; `batch` of them go through the classifier in one product.

    Raises `WorkError` without examples or if a logit is not finite.
    """
    count = len(examples)
    if count == 0:
        raise WorkError(FailureReason.DATA_UNAVAILABLE, "there are no examples to evaluate")
    size = batch or (PATCHES_BATCH if examples.table.has_patches else BATCH)
    parts: list[Tensor] = []
    for at in range(0, count, size):
        parts.append(classifier(examples.batch(slice(at, at + size)).images))
    logits = torch.cat(parts)
    if not bool(torch.isfinite(logits).all()):
        raise WorkError(FailureReason.NOT_FINITE, "the logits are not finite; the tensors or the features are damaged")
    return measures(logits, examples.labels)
