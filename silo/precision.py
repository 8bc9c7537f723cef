"""What training in reduced precision costs: an error of the class features, and on some CPUs time."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from fedrt.context import ClassPosition
from fedrt.errors import FailureReason, WorkError
from fedrt.spec import Precision
from silo.method import TextTower

FEATURE_ERROR = "feature_error"  # the metric
CPU_DESCRIPTION = Path("/proc/cpuinfo")
FAST_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # as Linux names them; the last one of ARM


def feature_error(
    compute: Callable[[TextTower], object], text: TextTower, arithmetic: AbstractContextManager[object]
) -> float | None:
    """The largest absolute difference that the arithmetic makes to an entry of the class features, against float32.

    `compute` is called twice, without gradient, and the features that it asks of the tower are compared. They have unit
    norm, so that is at most 2. None if it asks for none. Raises `WorkError` if features are not finite.
    """
    exact, reduced = _RecordingTower(text), _RecordingTower(text)
    with torch.no_grad():
        compute(exact)
        with arithmetic:
            compute(reduced)
    pairs = zip(exact.features, reduced.features, strict=True)
    differences = [(ours - theirs.float()).abs().max() for ours, theirs in pairs]
    if not differences:
        return None
    largest = float(torch.stack(differences).max())
    if not math.isfinite(largest):
        raise WorkError(
            FailureReason.NOT_FINITE, "the class features are not finite in training.precision; use fp32 or bf16"
        )
    return largest


def is_slow(precision: Precision, device: torch.device, cpu_description: Path = CPU_DESCRIPTION) -> bool:
    """Whether bf16 is slower than fp32 here: on a CPU that has no instructions for it, PyTorch converts to and fro.

    False where the CPU does not describe itself, as other systems than Linux.
    """
    if precision is not Precision.BF16 or device.type != "cpu":
        return False
    try:
        words = cpu_description.read_text("utf-8", errors="replace").split()
    except OSError:
        return False
    return not FAST_BF16 & set(words)


class _RecordingTower:
    """Passes on what a text tower gives, and keeps the features of the contexts that it was asked for."""

    def __init__(self, text: TextTower) -> None:
        self._text = text
        self.features: list[Tensor] = []

    @property
    def logit_scale(self) -> Tensor:
        return self._text.logit_scale

    def encode(
        self, context: Tensor, position: ClassPosition = ClassPosition.END, class_specific: bool = False
    ) -> Tensor:
        features = self._text.encode(context, position, class_specific)
        self.features.append(features)
        return features

    def handcrafted(self) -> Tensor:
        return self._text.handcrafted()

    def placeholder(self, length: int, position: ClassPosition = ClassPosition.END) -> Tensor:
        return self._text.placeholder(length, position)
