"""ClassBias: the silos learn a context together, and each silo learns for itself how frequent its classes are.

Adding the log frequency of each class to its logit is logit adjustment (Menon et al., ICLR 2021, arXiv:2007.07314);
keeping a part of the model at home is FedPer (Arivazhagan et al., 2019, arXiv:1912.00818).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from fedrt.context import LearnedContext
from fedrt.method import ModelDims
from fedrt.tensors import Scope, TensorSpec, Zeros


@dataclass(frozen=True)
class ClassBias(LearnedContext):
    """PromptFL's shared context and a private bias; the larger `bias_scale`, the faster the bias learns.

    With `bias_scale` 0 it is PromptFL.
    """

    name: ClassVar[str] = "classbias"
    needs_patches: ClassVar[bool] = False

    bias_scale: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.bias_scale < math.inf:
            raise ValueError(f"bias_scale is {self.bias_scale}; it must not be negative")

    def tensors(self, dims: ModelDims) -> tuple[TensorSpec, ...]:
        """A shared context [L, E], and a private bias [C]."""
        return (
            self.context("context", Scope.SHARED, dims),
            TensorSpec("bias", (dims.class_count,), Scope.PRIVATE, Zeros()),
        )
