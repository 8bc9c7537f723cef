"""Who is asked in a round: a pure function of who may, who is connected, and the seed."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from fedrt.spec import RoundsSpec
from fedrt.task import TaskKind
from fedrt.tensors import seeded_generator


@dataclass(frozen=True)
class Selection:
    """Who is asked, how many results are needed, and who was wanted but is not asked: (silo, why).

    With `enough`, the round does not wait for more results than that.
    """

    asked: tuple[str, ...]
    needed: int
    absent: tuple[tuple[str, str], ...] = ()
    enough: int | None = None


@dataclass(frozen=True)
class Waiting:
    """Why a round cannot begin yet, in one sentence."""

    message: str


@dataclass(frozen=True)
class Population:
    """The silos the coordinator knows, and those of them that are connected and not draining."""

    known: frozenset[str]
    available: frozenset[str]


@dataclass(frozen=True)
class Occasion:
    """What is selected for. `draw` is (seed, round, attempt); `aside` are silos to do without if possible, and why."""

    kind: TaskKind
    draw: tuple[int, int, int]
    overdue: bool = False
    aside: Mapping[str, str] = field(default_factory=dict)


def select(rounds: RoundsSpec, population: Population, occasion: Occasion) -> Selection | Waiting:
    """Ask every available silo that may take part, or `max_silos` of them, and `over_selection`, drawn by `draw`.

    Without `min_results` every silo that may take part is needed, so the round waits for all of them. An evaluation
    begins as a training round does, but once it has been `overdue` with whoever is there, and it asks everyone who is:
    it needs one result only, whoever is absent is recorded, and the experiment goes on. Silos that are set aside are
    not asked for anything else if enough others are there.
    """
    kind = occasion.kind
    wanted: Set[str] = frozenset(rounds.silos) or population.known
    available = sorted(wanted & population.available)
    missing = sorted(wanted - population.available)
    wished = len(wanted) if rounds.max_silos is None else min(rounds.max_silos, len(wanted))
    needed, capacity = rounds.min_results or wished, min(wished + rounds.over_selection, len(wanted))
    if not wanted:
        return Waiting("waiting for silos: none has ever connected")
    if kind is TaskKind.INITIALIZE:
        needed, capacity = 1, 1
    if kind is TaskKind.EVALUATE:
        needed, capacity = 1 if occasion.overdue else needed, len(wanted)
    if len(available) < needed:
        names = f"; not connected: {', '.join(missing)}" if missing else ""
        advice = "; name rounds.silos in the experiment to do without silos that are gone"
        waiting = f"waiting for silos: {len(available)} of {needed} needed are connected{names}"
        return Waiting(waiting + (advice if missing and not rounds.silos else ""))
    absent = dict.fromkeys(missing, "not connected")
    if kind is not TaskKind.EVALUATE:
        others = [name for name in available if name not in occasion.aside]
        if len(others) >= needed:
            absent |= {name: occasion.aside[name] for name in available if name in occasion.aside}
            available = others
    asked = available
    if len(available) > capacity:
        seed, number, attempt = occasion.draw
        order = seeded_generator(seed, "select", number, attempt).permutation(len(available))
        asked = sorted(available[index] for index in order[:capacity])
    enough = wished if kind is TaskKind.TRAIN and rounds.over_selection else None
    return Selection(tuple(asked), 1 if kind is TaskKind.EVALUATE else needed, tuple(sorted(absent.items())), enough)
