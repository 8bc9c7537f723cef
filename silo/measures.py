"""What is measured of a classifier: accuracy, loss, macro-F1, AUROC and calibration error, from logits and labels.

Means over classes are over the classes that occur among the labels: a silo may hold only some of an experiment's.
Everything is computed in float64 on the CPU, in pieces: beside the logits it takes little memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15  # of the calibration error
_PIECE = 1 << 22  # logits in float64 at a time


def measures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """All measures of finite logits [N, C], N > 0, with labels [N] below C.

    Of equal logits the first class is predicted. `auroc` is absent where it is not defined: with labels of one class.
    """
    logits, labels = logits.detach().cpu(), labels.cpu()
    norm = softmax_norm(logits)
    predicted = logits.argmax(dim=1)
    chosen = logits.gather(1, labels[:, None])[:, 0].double()
    found = {
        "accuracy": float((predicted == labels).double().mean()),
        "loss": float((norm.log_sum - (chosen - norm.peak)).mean()),
        "macro_f1": macro_f1(predicted, labels),
        "calibration_error": calibration_error((-norm.log_sum).exp(), predicted == labels),
    }
    if int(labels.min()) < int(labels.max()):
        found["auroc"] = auroc(logits, norm, labels)
    return found


@dataclass(frozen=True)
class SoftmaxNorm:
    """What turns the logits [N, C] of N images into log-probabilities: logit − `peak` − `log_sum`.

    `peak` [N] is the largest logit and `log_sum` [N] the logarithm of Σ exp(logit − peak). They are kept apart because
    their sum would round, and could tell equal probabilities apart.
    """

    peak: Tensor
    log_sum: Tensor


def softmax_norm(logits: Tensor) -> SoftmaxNorm:
    """The norm of logits [N, C], in float64."""
    peak = logits.max(dim=1).values.double()
    rows = max(1, _PIECE // logits.shape[1])
    pieces = zip(torch.split(logits, rows), torch.split(peak, rows), strict=True)
    log_sum = torch.cat([(piece.double() - top[:, None]).exp().sum(dim=1).log() for piece, top in pieces])
    return SoftmaxNorm(peak, log_sum)


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean of 2·TP / (2·TP + FP + FN) over the classes that occur among the labels; predictions [N], labels [N]."""
    classes = 1 + max(int(predicted.max()), int(labels.max()))
    counts = torch.bincount(labels, minlength=classes)  # TP + FN, for each class
    guesses = torch.bincount(predicted, minlength=classes)  # TP + FP
    hits = torch.bincount(labels[predicted == labels], minlength=classes)  # TP
    return float((2 * hits.double() / (counts + guesses))[counts > 0].mean())


def auroc(logits: Tensor, norm: SoftmaxNorm, labels: Tensor) -> float:
    """Mean over classes of the area under the curve "this class against the rest", ranked by its probability.

    The area is the probability that an image of the class scores above one of another; ties count one half (Mann and
    Whitney). The labels [N] must hold at least two classes.
    """
    present = torch.bincount(labels).nonzero()[:, 0]
    areas: list[float] = []
    for some in torch.split(present, max(1, _PIECE // len(labels))):
        scores = logits[:, some].T.contiguous().double() - norm.peak - norm.log_sum  # log-probabilities [P, N]
        areas += [_area(row, labels == label) for row, label in zip(scores, some, strict=True)]
    return sum(areas) / len(areas)


def _area(scores: Tensor, positive: Tensor) -> float:
    """Counts pairs by the places of all scores among the sorted ones of the class, in whole numbers."""
    ranked = scores[positive].sort().values
    ours, everyone = len(ranked), len(scores)
    # for each image, twice the number of ours below it and, one for two, equal to it
    below = torch.searchsorted(ranked, scores) + torch.searchsorted(ranked, scores, right=True)
    above = 2 * ours * everyone - int(below.sum())
    return (above - ours**2) / (2 * ours * (everyone - ours))  # ours among themselves make half of ours²


def calibration_error(confidence: Tensor, is_right: Tensor) -> float:
    """Expected calibration error over 15 equal bins of (0, 1] (Naeini et al., AAAI 2015; Guo et al., ICML 2017,
    arXiv:1706.04599): the mean over images of |accuracy − mean confidence| of their bin.

    `confidence` [N] is the probability of the predicted class, `is_right` [N] whether it is the image's.
    """
    bins = torch.bucketize(confidence, torch.arange(1, BINS, dtype=torch.float64) / BINS)
    surplus = torch.bincount(bins, is_right.double() - confidence, minlength=BINS)
    return float(surplus.abs().sum() / len(confidence))
