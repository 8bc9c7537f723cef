"""Local CoOp: one private context per silo; nothing is shared, so it says what federation is worth.

Kaiyang Zhou, Jingkang Yang, Chen Change Loy, Ziwei Liu: "Learning to Prompt for Vision-Language Models", IJCV 2022,
arXiv:2109.01134.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedrt.context import LearnedContext
from fedrt.method import ModelDims
from fedrt.tensors import Scope, TensorSpec


@dataclass(frozen=True)
class CoOp(LearnedContext):
    """A context that never leaves the silo and goes on learning from round to round; `server` has nothing to combine.

    The federated papers call it "local". Several contexts vote with the mean of their logits.
    """

    name: ClassVar[str] = "coop"
    needs_patches: ClassVar[bool] = False

    def tensors(self, dims: ModelDims) -> tuple[TensorSpec, ...]:
        """One private context [L, E]."""
        return (self.context("context", Scope.PRIVATE, dims),)
