"""What `fedrt-coordinator replay` prints: a line for each round and a sentence at the end, or one JSON document."""

from collections.abc import Sequence
from typing import Any

from coordinator.experiments import Experiment
from coordinator.replay import Finding, ReplayedRound

_NAMES = 8  # contributors that a line names
_DIGITS = 16  # of a digest in a line; JSON has all


def line(replayed: ReplayedRound) -> str:
    """One round in one line."""
    names = [part.silo_id for part in replayed.counted]
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    who = ", ".join(names[:_NAMES]) + more
    examples = sum(part.example_count for part in replayed.counted)
    source = f"{who}; {examples} examples" if names else "no silo"
    if replayed.number == 0:
        source = f"initial tensors of {who or 'the coordinator'}"
    digest = replayed.sha256[:_DIGITS] if replayed.sha256 else "nothing stored"
    problems = f": {'; '.join(replayed.problems)}" if replayed.problems else ""
    return f"round {replayed.number}: {source}; {digest} {replayed.finding.value}{problems}"


def summary(experiment: Experiment, rounds: Sequence[ReplayedRound]) -> str:
    """What it comes to."""
    name = f"experiment {experiment.experiment_id!r} ({experiment.state.value})"
    if not experiment.shares:
        return f"{name}: its method {experiment.spec.local.method_name!r} shares nothing, so nothing was aggregated"
    if not rounds:
        return f"{name}: nothing was aggregated yet"
    agreeing = sum(replayed.finding is Finding.AGREES for replayed in rounds)
    more = "" if experiment.state.has_ended else "; it goes on, and these are its rounds so far"
    return f"{name}: {agreeing} of {len(rounds)} agree, the initial tensors counted{more}"


def document(experiment: Experiment, rounds: Sequence[ReplayedRound]) -> dict[str, Any]:
    """The same for programs, with whole digests; those of updates can be compared with the silos' departures."""
    return {
        "experiment": experiment.experiment_id,
        "state": experiment.state.value,
        "method": experiment.spec.local.method_name,
        "agrees": all_agree(rounds),
        "rounds": [
            {
                "round": replayed.number,
                "finding": replayed.finding.name.lower(),
                "problems": list(replayed.problems),
                "sha256": replayed.sha256,
                "computed_sha256": replayed.computed_sha256,
                "contributors": [
                    {"silo": part.silo_id, "examples": part.example_count, "sha256": part.sha256}
                    for part in replayed.counted
                ],
            }
            for replayed in rounds
        ],
    }


def all_agree(rounds: Sequence[ReplayedRound]) -> bool:
    """Whether every round could be computed again and agrees."""
    return all(replayed.finding is Finding.AGREES for replayed in rounds)
