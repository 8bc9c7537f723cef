"""How much longer a lab will take, from what its cells have taken so far; pure, and silent while it cannot be known."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from silo.lab.grid import Cell, FederationPlan


@dataclass(frozen=True)
class Taken:
    """What one cell took, or will by its own account: seconds, for so many rounds of training."""

    setting: str
    label: str
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Pace:
    """What was measured so far, of cells and of the starts of federations (seconds)."""

    cells: tuple[Taken, ...] = ()
    starts: tuple[float, ...] = ()

    def of_cell(self, cell: Cell) -> float | None:
        """Seconds that a cell may take; None before one like it, or one that trains, has been measured.

        As long as the same method took in the same setting, or else in any setting per round, or else as any method
        took per round. An evaluation without training is taken to last no longer than a round.
        """
        rounds = cell.rounds.count
        alike = [one.seconds for one in self.cells if (one.setting, one.label) == (cell.setting, cell.label)]
        untrained = [one.seconds for one in self.cells if not one.rounds]
        if alike or (not rounds and untrained):
            return fmean(alike or untrained)
        trained = [one for one in self.cells if one.rounds]
        same = [one for one in trained if one.label == cell.label] or trained
        return fmean(one.seconds / one.rounds for one in same) * max(1, rounds) if same else None

    def of_start(self) -> float:
        """Seconds until a federation is ready; 0 before one was."""
        return fmean(self.starts) if self.starts else 0.0

    def of_cells(self, cells: Iterable[Cell]) -> float | None:
        """Seconds that cells may take one after the other; None if one of them is not known."""
        parts = [self.of_cell(cell) for cell in cells]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def of_federation(self, plan: FederationPlan) -> float | None:
        """Seconds that a federation may take from its start."""
        cells = self.of_cells(plan.cells)
        return None if cells is None else self.of_start() + cells


def time_left(running: Sequence[float | None], waiting: Sequence[float | None], jobs: int) -> float | None:
    """Seconds until all is done: `running` are what is left of federations at work, `waiting` follow in order.

    None if one of them is not known.
    """
    known = [seconds for seconds in running if seconds is not None]
    following = [seconds for seconds in waiting if seconds is not None]
    if len(known) < len(running) or len(following) < len(waiting):
        return None
    ends = known + [0.0] * max(0, jobs - len(known))
    heapq.heapify(ends)
    for seconds in following:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends, default=0.0)
