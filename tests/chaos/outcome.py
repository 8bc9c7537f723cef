"""Judges how experiments ended, and measures how long they stood still."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedrt.task import TaskKind
from fedrt.v1 import task_pb2
from tests.chaos.experiments import Expected
from tests.chaos.faults import Struck
from tests.chaos.layout import COORDINATOR, Layout
from tests.chaos.schedule import Kind
from tests.chaos.watching import History, State

TRAIN = getattr(task_pb2, f"TASK_KIND_{TaskKind.TRAIN.name}")


@dataclass(frozen=True)
class Found:
    """How an experiment ended."""

    history: History
    digest: str
    vaults: dict[str, str]  # by silo


def objections(found: Found, expected: Expected) -> list[str]:
    """What differs from the undisturbed run."""
    history, problems = found.history, []
    if history.state != State.STATE_SUCCEEDED:
        return [f"{history.name} ended as {State.State.Name(history.state)}: {history.message}"]
    if found.digest != expected.digest:
        problems.append(f"{history.name}: the shared tensors differ from the undisturbed run")
    for silo, digest in expected.vaults.items():
        if found.vaults.get(silo, digest) != digest:
            problems.append(f"{history.name}: the vault of {silo} differs from the undisturbed run")
    if history.twice:
        problems.append(f"{history.name}: rounds succeeded twice: {history.twice}")
    if set(history.rounds) != set(expected.rounds):
        problems.append(f"{history.name}: rounds {sorted(history.rounds)}, expected {sorted(expected.rounds)}")
        return problems
    for place, there in expected.rounds.items():
        here = history.rounds[place]
        if place[0] == TRAIN and set(here) != set(there):
            problems.append(f"{history.name}: contributors of round {place} are {sorted(here)}")
        for silo in set(here) & set(there):
            if here[silo] != there[silo]:
                problems.append(f"{history.name}: what {silo} measured in round {place} is {here[silo]}")
    return problems


def longest_gap(histories: Iterable[History]) -> float:
    """The longest time in seconds between two events of an experiment."""
    pairs = [pair for one in histories for pair in zip(one.event_times, one.event_times[1:], strict=False)]
    return round(max((later - earlier for earlier, later in pairs), default=0.0), 2)


def stalls(struck: Iterable[Struck], histories: Iterable[History]) -> dict[str, dict[str, float]]:
    """For each kind of fault the longest time in seconds from when it was taken back to the next event of an experiment
    that was under way: over all faults, and over those that struck alone.
    """
    known, faults = list(histories), [one for one in struck if one.end is not None and one.reached]
    longest: dict[str, dict[str, float]] = {}
    for one in faults:
        name = one.fault.kind.value
        if one.fault.target == "coordinator" or one.fault.kind is Kind.CRASH_POINT:
            name = f"{name} ({'coordinator' if one.fault.target == 'coordinator' else 'silo'})"
        entry = longest.setdefault(name, {"count": 0, "longest": 0.0})
        entry["count"] += 1
        end = one.end or one.begin
        for history in known:
            times = history.event_times
            if not times or not times[0] < end < times[-1]:
                continue
            following = min(instant for instant in times if instant > end)
            entry["longest"] = max(entry["longest"], following - end)
            if one.alone:
                entry["longest_alone"] = max(entry.get("longest_alone", 0.0), following - end)
    return {name: {key: round(value, 2) for key, value in entry.items()} for name, entry in sorted(longest.items())}


def leftovers(layout: Layout) -> list[Path]:
    """Files that no daemon needs any more."""
    state = layout.root / "state"
    return [
        *state.rglob(".*.new"),
        *(state / COORDINATOR / "blobs" / "intake").glob("*"),
        *layout.root.glob("*.sock"),
        *state.glob("*/spool/*"),
    ]
