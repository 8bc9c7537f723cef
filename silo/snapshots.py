"""What training needs to go on after an epoch with the same bits, and who keeps it: `silo.checkpoints`, in files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """All that training needs to go on after an epoch with the same bits; `epochs_done` is at least 1."""

    epochs_done: int
    mean_loss: float
    params: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Tensor]]  # what it keeps of each tensor; its settings follow from the plan
    scaler: Mapping[str, float]
    shuffle: Tensor  # the state of the generator


class Checkpointer(Protocol):
    """Keeps snapshots of one order and nothing else; never fails."""

    def load(self) -> Snapshot | None:
        """The latest one, or None if there is none to go on from."""

    def is_due(self) -> bool:
        """Whether it is worth taking another."""

    def save(self, snapshot: Snapshot) -> None:
        """Keep it instead of the one before, if that can be done."""


class NoCheckpoints:
    """Starts at the beginning, always."""

    def load(self) -> None:
        """Nothing."""

    def is_due(self) -> bool:
        """Never."""
        return False

    def save(self, snapshot: Snapshot) -> None:
        """Nothing."""
