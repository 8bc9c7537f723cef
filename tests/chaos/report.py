"""What a chaos run prints: its faults, how experiments ended, how long they stood still, and what is left."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.chaos.faults import Struck
from tests.chaos.outcome import longest_gap, stalls

if TYPE_CHECKING:
    from tests.chaos.run import Run


def make_report(run: "Run", duration: float) -> dict[str, Any]:
    """Everything worth knowing, ready for JSON."""
    struck: list[Struck] = [one for one in run.faults.struck if one.reached]
    known = list(run.watcher.histories.values())
    histories = [one for one in known if not one.name.startswith("undisturbed-")]
    return {
        "seed": run.plan.seed,
        "duration_seconds": round(duration, 1),
        "small_disks": run.has_disks,
        "fault_count": len(struck),
        "faults": dict(sorted(Counter(one.fault.kind.value for one in struck).items())),
        "crash_points_hit": len(run.hits),
        "crash_points": dict(sorted(run.hits.items())),
        "crash_points_not_reached": sorted(set(run.not_reached) - set(run.hits)),
        "experiments": dict(sorted(Counter(one.spec_name for one in histories if not one.is_doomed).items())),
        "experiments_cancelled": sum(one.is_doomed for one in histories),
        "rounds": sum(len(one.rounds) for one in histories),
        "rounds_tried_again": sum(one.attempts for one in histories),
        "digests_equal": run.equal,
        "digests_total": run.compared,
        "restarts": {name: max(0, len(daemon.exits) - 1) for name, daemon in run.daemons.items()},
        "longest_gap_undisturbed": longest_gap(one for one in known if one.name.startswith("undisturbed-")),
        "longest_gap": longest_gap(histories),
        "stalls_seconds": stalls(run.faults.struck, histories),
        "orphan_processes": run.orphans_seen,
        "problems": list(dict.fromkeys(run.problems)),
    }
