"""`python -m tests.chaos --minutes 10 --seed 1`: prints a report as JSON; exit code 1 if anything is wrong."""

from tests.chaos import namespace

if __name__ == "__main__":
    NO_DISKS = namespace.enter()  # before anything starts a thread

import argparse
import asyncio
import json
import logging
import secrets
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any


def main(no_disks: str) -> int:
    """Run; returns the exit code."""
    from tests.chaos.run import DEFAULT_SPECS, Plan, chaos  # imports grpc, which starts threads

    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults strike")
    parser.add_argument("--seed", type=int, default=None, help="of the schedule; drawn if not set")
    parser.add_argument("--json", type=Path, default=None, help="write the report into this file, too")
    parser.add_argument("--specs", default=",".join(DEFAULT_SPECS), help="which experiments")
    parser.add_argument(
        "--clip", action=argparse.BooleanOptionalAction, default=True, help="silos with the real worker"
    )
    parser.add_argument("--keep", action="store_true", help="keep logs and an account also if nothing is wrong")
    options = parser.parse_args()
    if unknown := set(options.specs.split(",")) - set(DEFAULT_SPECS):
        parser.error(f"--specs: {min(unknown)!r} is no experiment; there are {', '.join(DEFAULT_SPECS)}")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # broken connections are what this is about
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    print(f"chaos for {options.minutes:g} minutes with seed {seed}", file=sys.stderr)
    if no_disks:
        print(f"full disks are simulated only: {no_disks}", file=sys.stderr)
    plan = Plan(options.minutes, seed, options.clip, tuple(options.specs.split(",")), options.keep)
    try:
        report = asyncio.run(_interruptible(chaos(plan, has_disks=not no_disks)))
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("interrupted; no process is left", file=sys.stderr)
        return 130
    text = json.dumps(report, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
    for problem in report["problems"]:
        print(f"wrong: {problem}", file=sys.stderr)
    if "account" in report:
        print(f"see {report['account']}/account.txt", file=sys.stderr)
    return 1 if report["problems"] else 0


async def _interruptible(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Also SIGTERM ends the run in order, so that no process is left."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


if __name__ == "__main__":
    sys.exit(main(NO_DISKS))
