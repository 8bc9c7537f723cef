"""Zero-shot CLIP: the handcrafted prompt "a photo of a {class}.", nothing trained.

Alec Radford et al.: "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
arXiv:2103.00020.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedrt.aggregation import ServerState, Update
from fedrt.method import ModelDims
from fedrt.tensors import TensorSpec


@dataclass(frozen=True)
class ZeroShot:
    """Declares no tensors: an experiment with it has no training rounds and evaluates once."""

    name: ClassVar[str] = "zeroshot"
    needs_patches: ClassVar[bool] = False

    def tensors(self, dims: ModelDims) -> tuple[TensorSpec, ...]:
        """None."""
        return ()

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """The state as it was."""
        return state
