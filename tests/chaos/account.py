"""What to read when a chaos run went wrong: processes, schedule, experiments' events and the last words of daemons."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.chaos.processes import marked
from tests.chaos.watching import State

if TYPE_CHECKING:
    from tests.chaos.run import Run

LAST_LINES = 60


def process_states(mark: str) -> list[str]:
    """One line for each living process of the run."""
    lines = []
    for process in marked(mark):
        with contextlib.suppress(psutil.Error, OSError):
            waits = Path(f"/proc/{process.pid}/wchan").read_text()
            command = " ".join(process.cmdline()[1:])
            lines.append(f"{process.pid} (of {process.ppid()}) {process.status()} in '{waits}': {command}")
    return lines


def write_account(run: "Run", report: dict[str, Any]) -> Path:
    """Write `account.txt` beside the logs and keep the state directories; returns the directory."""
    root = run.layout.root
    shutil.copytree(root / "state", root / "state-kept", dirs_exist_ok=True)
    lines = ["PROBLEMS", *run.problems, "", "PROCESSES", *run.states, "", "EXPERIMENTS"]
    for history in run.watcher.histories.values():
        lines.append(f"{history.name}: {State.State.Name(history.state)} {history.message}")
        lines += [f"    {line}" for line in history.lines]
    lines += ["", "FAULTS (begin, end, what)"]
    lines += [
        f"{one.begin:.3f} {(one.end or 0):.3f} {one.fault}{'' if one.reached else ' (not reached)'}"
        for one in run.faults.struck
    ]
    for name, daemon in run.daemons.items():
        lines += ["", f"{name}: ends {[(round(instant, 3), code) for instant, code in daemon.exits]}"]
        with contextlib.suppress(OSError):
            lines += run.layout.log(name).read_text(errors="replace").splitlines()[-LAST_LINES:]
    (root / "account.txt").write_text("\n".join(lines) + "\n")
    (root / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return root
