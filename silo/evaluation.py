"""Local evaluation: how well given tensors classify given examples."""

import torch
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from silo.examples import Examples
from silo.measures import measures
from silo.method import Classifier

BATCH = 1024  # images at a time
PATCHES_BATCH = 256  # where patches make the intermediates large


@torch.no_grad()
def evaluate(classifier: Classifier, examples: Examples, batch: int | None = None) -> dict[str, float]:
    """The measures of `silo.measures` on all examples, of which `batch` go through the classifier at a time.

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
