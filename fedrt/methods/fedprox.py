"""PromptFL with FedProx: the shared context is held near to what the silo received.

Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar, Virginia Smith: "Federated Optimization in
Heterogeneous Networks", MLSys 2020, arXiv:1812.06127. PromptFL: Guo et al., arXiv:2208.11625.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedrt.methods.promptfl import PromptFL


@dataclass(frozen=True)
class FedProx(PromptFL):
    """`proximal_weight` is μ of the term μ/2 · ‖context − received‖²; with 0 this is PromptFL.

    0.5 is the default of the federated prompt-learning papers' code. There, however, the term has no gradient; here it
    has, as in FedProx's paper.
    """

    name: ClassVar[str] = "fedprox"
    needs_patches: ClassVar[bool] = False

    proximal_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.proximal_weight < float("inf"):
            raise ValueError(f"proximal_weight is {self.proximal_weight}; it must be a number that is not negative")
