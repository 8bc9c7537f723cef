"""Performs the demo on a terminal: signals, errors, exit codes, and what is written and printed at the end."""

import asyncio
import signal
from pathlib import Path

from rich.console import Console

from fedrt.daemon import report
from fedrt.errors import ExitCode, FedrtError
from silo.demo.course import Course
from silo.demo.curves import draw_curves
from silo.demo.directory import Layout, open_directory
from silo.demo.outcome import Outcome, write_summary
from silo.demo.processes import Processes
from silo.demo.recipes import Recipe
from silo.demo.report import print_report

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILLED = 128  # plus the signal's number: how shells count a death by it


class Interrupted(BaseException):
    """A signal asked the demo to end; everything has ended in order."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def perform(recipe: Recipe, directory: Path) -> int:
    """Run the demo; returns the exit code: 0, that of an error, or 128 and the number of the signal that ended it."""
    console = Console(highlight=False)
    try:
        layout, lock = open_directory(directory)
        outcome = asyncio.run(_run(Course(layout, recipe, console)))
        _finish(console, layout, outcome)
        lock.release()
    except FedrtError as error:
        return report(error)
    except Interrupted as interrupted:
        console.print(f"\n {interrupted}; no process is left")
        return KILLED + interrupted.number
    except KeyboardInterrupt:
        return KILLED + signal.SIGINT
    return ExitCode.DONE if outcome.nothing_private_left else ExitCode.INTERNAL


def _finish(console: Console, layout: Layout, outcome: Outcome) -> None:
    """Write the summary and the curves, and print the report."""
    write_summary(layout.summary, outcome)
    draw_curves(layout.curves, outcome)
    print_report(console, layout, outcome)


async def _run(course: Course) -> Outcome:
    """Run the course; the first signal ends it in order, another one kills its processes. Raises `Interrupted`."""
    work = asyncio.current_task()
    assert work is not None
    received: list[int] = []
    running: list[Processes] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            work.cancel()
        else:
            for processes in running:
                processes.kill()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        return await course.run(running.append)
    except asyncio.CancelledError:
        if received:
            raise Interrupted(received[0]) from None
        raise
