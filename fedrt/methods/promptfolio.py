"""PromptFolio: the class features of a shared and a private context, mixed in fixed shares.

Bikang Pan, Wei Huang, Ye Shi: "Federated Learning from Vision-Language Foundation Models: Theoretical Analysis and
Method", NeurIPS 2024, arXiv:2409.19610.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from fedrt.context import LearnedContext
from fedrt.method import ModelDims
from fedrt.tensors import Constant, Scope, TensorSpec

PUBLISHED_SHARE = 0.4  # of the authors' code


def _number_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError("it must be a number from 0 to 1, or the word 'auto'")


Share = Annotated[float | Literal["auto"], BeforeValidator(_number_or_auto)]


@dataclass(frozen=True)
class PromptFolio(LearnedContext):
    """`share` is θ, the weight of the private context: with 0 this is PromptFL, with 1 local CoOp.

    `auto` is ours, not the paper's: before the training of each round a silo sets its θ from its own training examples
    and keeps it as a private tensor (`silo.methods.promptfolio.best_share`), between 0.1 and 0.9 so that both learn.
    """

    name: ClassVar[str] = "promptfolio"
    needs_patches: ClassVar[bool] = False

    context_length: int = 8
    share: Share = PUBLISHED_SHARE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share != "auto" and not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be a number from 0 to 1, or the word 'auto'")

    def tensors(self, dims: ModelDims) -> tuple[TensorSpec, ...]:
        """A shared and a private context [L, E]; with `auto` also the private share [1], which is not trained."""
        contexts = (
            self.context("shared_context", Scope.SHARED, dims),
            self.context("private_context", Scope.PRIVATE, dims),
        )
        if self.share != "auto":
            return contexts
        return (*contexts, TensorSpec("share", (1,), Scope.PRIVATE, Constant(PUBLISHED_SHARE), trained=False))
