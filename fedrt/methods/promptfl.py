"""PromptFL: one shared context, averaged after every round.

Tao Guo, Song Guo, Junxiao Wang, Wenchao Xu: "PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead
of Models", IEEE Transactions on Mobile Computing 2023, arXiv:2208.11625. The context is CoOp's (Zhou et al., IJCV 2022,
arXiv:2109.01134).
"""

from dataclasses import dataclass
from typing import ClassVar

from fedrt.context import LearnedContext
from fedrt.method import ModelDims
from fedrt.tensors import Scope, TensorSpec


@dataclass(frozen=True)
class PromptFL(LearnedContext):
    """A shared context in front of each class name; several contexts vote with the mean of their logits."""

    name: ClassVar[str] = "promptfl"
    needs_patches: ClassVar[bool] = False

    def tensors(self, dims: ModelDims) -> tuple[TensorSpec, ...]:
        """One shared context [L, E]."""
        return (self.context("context", Scope.SHARED, dims),)
