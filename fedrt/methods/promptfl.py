"""PromptFL: one shared context, averaged after every round.

Tao Guo, Song Guo, Junxiao Wang, Wenchao Xu: "PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead
of Models", IEEE Transactions on Mobile Computing 2023, arXiv:2208.11625. The context is CoOp's (Zhou et al., IJCV 2022,
arXiv:2109.01134).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedrt.aggregation import ServerState, Update, federated_average
from fedrt.method import ModelDims
from fedrt.tensors import Normal, Phrase, Scope, TensorSpec


@dataclass(frozen=True)
class PromptFL:
    """`context_length` vectors in front of each class name; `context_init` starts them from words instead of noise."""

    name: ClassVar[str] = "promptfl"
    needs_patches: ClassVar[bool] = False

    context_length: int = 16
    context_init: str | None = None

    def __post_init__(self) -> None:
        if self.context_length < 1:
            raise ValueError("context_length must be at least 1")
        if self.context_init is not None and not self.context_init.strip():
            raise ValueError("context_init must hold at least one word, or be left out")

    def tensors(self, dims: ModelDims) -> tuple[TensorSpec, ...]:
        """One shared context [L, E]."""
        init = Normal(0.02) if self.context_init is None else Phrase(self.context_init)
        return (TensorSpec("context", (self.context_length, dims.context_dim), Scope.SHARED, init),)

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """Mean delta weighted by examples."""
        return federated_average(state, updates)
