"""Who is asked in a round: a pure function of who may, who is connected, and the seed."""

from collections.abc import Set
from dataclasses import dataclass

from fedrt.spec import RoundsSpec
from fedrt.task import TaskKind
from fedrt.tensors import seeded_generator


@dataclass(frozen=True)
class Selection:
    """Who is asked, how many results are needed, and who was wanted but is not there: (silo, why)."""

    asked: tuple[str, ...]
    needed: int
    absent: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Waiting:
    """Why a round cannot begin yet, in one sentence."""

    message: str


@dataclass(frozen=True)
class Population:
    """The silos the coordinator knows, and those of them that are connected and not draining."""

    known: frozenset[str]
    available: frozenset[str]


def select(
    rounds: RoundsSpec, population: Population, kind: TaskKind, draw: tuple[int, int, int], overdue: bool = False
) -> Selection | Waiting:
    """Ask every available silo that may take part, or `max_silos` of them drawn by `draw` (seed, round, attempt).

    Without `min_results` every silo that may take part is needed, so the round waits for all of them. An evaluation
    begins as a training round does, but once it has been `overdue` with whoever is there, and it asks everyone who is:
    it needs one result only, whoever is absent is recorded, and the experiment goes on.
    """
    wanted: Set[str] = frozenset(rounds.silos) or population.known
    available = sorted(wanted & population.available)
    missing = sorted(wanted - population.available)
    capacity = len(wanted) if rounds.max_silos is None else min(rounds.max_silos, len(wanted))
    needed = rounds.min_results or capacity
    if not wanted:
        return Waiting("waiting for silos: none has ever connected")
    if kind is TaskKind.INITIALIZE:
        needed, capacity = 1, 1
    if kind is TaskKind.EVALUATE:
        needed, capacity = 1 if overdue else needed, len(wanted)
    if len(available) < needed:
        names = f"; not connected: {', '.join(missing)}" if missing else ""
        advice = "; name rounds.silos in the experiment to do without silos that are gone"
        waiting = f"waiting for silos: {len(available)} of {needed} needed are connected{names}"
        return Waiting(waiting + (advice if missing and not rounds.silos else ""))
    asked = available
    if len(available) > capacity:
        order = seeded_generator(draw[0], "select", draw[1], draw[2]).permutation(len(available))
        asked = sorted(available[index] for index in order[:capacity])
    absent = tuple((name, "not connected") for name in missing)
    return Selection(tuple(asked), 1 if kind is TaskKind.EVALUATE else needed, absent)
