"""FedOTP: a shared and a private context, matched with the patches of an image by optimal transport.

Hongxia Li, Wei Huang, Jingya Wang, Ye Shi: "Global and Local Prompts Cooperation via Optimal Transport for Federated
Learning", CVPR 2024, arXiv:2403.00041.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedrt.context import LearnedContext
from fedrt.method import ModelDims
from fedrt.tensors import Scope, TensorSpec


@dataclass(frozen=True)
class FedOTP(LearnedContext):
    """The global prompt of the paper is the shared context, its local one the private context.

    Each class has N = 2 · `context_count` prompts. For an image and a class, a plan T carries mass from the M patches
    to the N prompts. `mass` is γ, what it carries in all: with the `unbalanced` solver each prompt receives γ/N, and a
    patch gives 1/M or less, so that patches unlike all prompts may stay out. With `balanced` every patch gives 1/M,
    every prompt receives 1/N, and `mass` means nothing. `entropy` is ε, the weight of the plan's entropy: a small one
    gives each prompt few patches of its own. Logits are γ · s times a mean cosine, so a small mass also flattens them.

    With `stopping: problem` the plan of each image and class depends on these two only. For two prompts it is exact up
    to rounding. For more it is found in at most `max_sweeps` sweeps, fewer once a sweep changes little, measured by
    `threshold`. With `stack`, as in the authors' code, it is found by such sweeps for any number of prompts, and all of
    a batch go on together, so that the logits of an image depend slightly on its batch.

    Contexts that start from the same words get the same gradient; only averaging with other silos parts the shared
    ones from the private ones.
    """

    name: ClassVar[str] = "fedotp"
    needs_patches: ClassVar[bool] = True

    mass: float = 0.8
    entropy: float = 0.1
    threshold: float = 1e-3
    max_sweeps: int = 100
    solver: Literal["unbalanced", "balanced"] = "unbalanced"
    stopping: Literal["problem", "stack"] = "problem"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass is {self.mass}; it must be above 0 and at most 1")
        if not 0 < self.entropy < float("inf"):
            raise ValueError(f"entropy is {self.entropy}; it must be positive")
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"threshold is {self.threshold}; it must be positive")
        if self.max_sweeps < 1:
            raise ValueError(f"max_sweeps is {self.max_sweeps}; it must be at least 1")

    def tensors(self, dims: ModelDims) -> tuple[TensorSpec, ...]:
        """A shared and a private context [L, E], drawn independently of each other."""
        return (
            self.context("shared_context", Scope.SHARED, dims),
            self.context("private_context", Scope.PRIVATE, dims),
        )
