"""What methods with learnable contexts have in common: the hyper-parameters of the context, and the server rule.

A context is L learnable vectors that take the place of words in the prompt of each class (CoOp: Kaiyang Zhou, Jingkang
Yang, Chen Change Loy, Ziwei Liu, "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv:2109.01134).
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from fedrt.aggregation import ServerRule, ServerState, Update, WeightedMean
from fedrt.method import ModelDims
from fedrt.tensors import Init, Normal, Phrase, Scope, TensorSpec

FEDERATED_AVERAGE = WeightedMean()


class ClassPosition(enum.StrEnum):
    """Where the class name stands: after, between the two halves of, or before the context (CoOp)."""

    END = "end"
    MIDDLE = "middle"
    FRONT = "front"


@dataclass(frozen=True)
class LearnedContext:
    """`context_length` vectors for each class name, and how the server combines what the silos learn.

    `context_init` starts them from words instead of noise, or from words with noise where there are several.
    `context_count` is how many contexts each scope holds; `class_specific` gives every class contexts of its own.
    """

    context_length: int = 16
    context_init: str | None = None
    context_count: int = 1
    class_position: ClassPosition = ClassPosition.END
    class_specific: bool = False
    server: ServerRule = FEDERATED_AVERAGE

    def __post_init__(self) -> None:
        if self.context_length < 1:
            raise ValueError("context_length must be at least 1")
        if self.context_count < 1:
            raise ValueError("context_count must be at least 1")
        if self.context_init is not None and not self.context_init.strip():
            raise ValueError("context_init must hold at least one word, or be left out")

    def context(self, name: str, scope: Scope, dims: ModelDims) -> TensorSpec:
        """A context [L, E]; with axes [N] of several contexts and [C] of classes in front where there are such."""
        init: Init = Normal(0.02)
        if self.context_init is not None:  # without noise, several contexts would start alike and stay so
            init = Phrase(self.context_init, 0.02 if self.context_count > 1 else 0.0)
        return TensorSpec(name, (*self.leading(dims), self.context_length, dims.context_dim), scope, init)

    def leading(self, dims: ModelDims) -> tuple[int, ...]:
        """The axes in front of [L, E]: N if there are several contexts, C if each class has its own."""
        count = (self.context_count,) if self.context_count > 1 else ()
        return (*count, dims.class_count) if self.class_specific else count

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """The next state by the server rule."""
        return self.server.apply(state, updates)
