"""FedPGP: a shared context, made personal by a private matrix of low rank, with a contrastive term.

Tianyu Cui, Hongxia Li, Jingya Wang, Ye Shi: "Harmonizing Generalization and Personalization in Federated Prompt
Learning", ICML 2024, arXiv:2405.09771.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedrt.context import LearnedContext
from fedrt.method import ModelDims
from fedrt.tensors import Normal, Scope, TensorSpec


@dataclass(frozen=True)
class FedPGP(LearnedContext):
    """The shared context σ, and the personal one σ + U·V that classifies.

    `rank` is b, the columns of U and rows of V; `contrast_weight` is μ and `temperature` τ of the contrastive term,
    which draws the features of σ towards those of a frozen prompt and away from the personal ones. `positive` names
    the frozen prompt: "a photo of a {class}.", CLIP's own knowledge as in the paper, or the placeholder "X X … X
    {class}." of the authors' code.

    Several contexts vote with the mean of their logits. In the authors' code their features become further columns of
    the logits, 2C for two, of which the labels name the first C only: an image can then be put into a class that does
    not exist.
    """

    name: ClassVar[str] = "fedpgp"
    needs_patches: ClassVar[bool] = False

    rank: int = 8
    contrast_weight: float = 0.5
    temperature: float = 0.5
    positive: Literal["handcrafted", "placeholder"] = "handcrafted"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= self.context_length:
            raise ValueError(
                f"rank is {self.rank}; it must be at least 1 and at most context_length, which is {self.context_length}"
            )
        if not 0 <= self.contrast_weight < float("inf"):
            raise ValueError(f"contrast_weight is {self.contrast_weight}; it must be a number that is not negative")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be positive")

    def tensors(self, dims: ModelDims) -> tuple[TensorSpec, ...]:
        """The shared σ [L, E] with the private U [L, b] and V [b, E], all with the same leading axes."""
        leading = self.leading(dims)
        return (
            self.context("shared_context", Scope.SHARED, dims),
            TensorSpec("left", (*leading, self.context_length, self.rank), Scope.PRIVATE, Normal(0.02)),
            TensorSpec("right", (*leading, self.rank, dims.context_dim), Scope.PRIVATE, Normal(0.02)),
        )
