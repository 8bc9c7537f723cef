"""`fedrt-demo`: three hospitals train one prompt together, on this machine, in two minutes."""

import asyncio
import enum
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedrt.daemon import report
from fedrt.errors import ExitCode, FedrtError
from silo.demo.course import Course
from silo.demo.curves import draw_curves
from silo.demo.directory import Layout, open_directory
from silo.demo.outcome import Outcome, write_summary
from silo.demo.processes import Processes
from silo.demo.recipes import make_recipe
from silo.demo.report import print_report

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILLED = 128  # plus the signal's number: how shells count a death by it

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Data(enum.StrEnum):
    """The data sets."""

    WORLD = "world"
    DIGITS = "digits"


class Interrupted(BaseException):
    """A signal asked the demo to end; everything has ended in order."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@app.command()
def demo(
    data: Annotated[Data, typer.Option(help="Drawn scenes, or real handwritten digits.")] = Data.WORLD,
    directory: Annotated[
        Path, typer.Option(help="Where everything is put; what an earlier demo left there is replaced.")
    ] = Path(".demo"),
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of federated training.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images and of all training.")] = 1,
    images: Annotated[
        int | None, typer.Option(min=128, help="Training images per hospital, and test images; for world.")
    ] = None,
) -> None:
    """Start a coordinator and three hospitals on this machine and train one prompt together.

    No image leaves its hospital, which is shown at the end. Ctrl-C ends everything.
    """
    console = Console(highlight=False)
    try:
        layout, lock = open_directory(directory)
        recipe = make_recipe(data.value, seed, rounds, images)
        outcome = asyncio.run(_run(Course(layout, recipe, console)))
        finish(console, layout, outcome)
        lock.release()
    except FedrtError as error:
        raise typer.Exit(report(error)) from None
    except Interrupted as interrupted:
        console.print(f"\n {interrupted}; no process is left")
        raise typer.Exit(KILLED + interrupted.number) from None
    except KeyboardInterrupt:
        raise typer.Exit(KILLED + signal.SIGINT) from None
    if not outcome.nothing_private_left:
        raise typer.Exit(ExitCode.INTERNAL)


def finish(console: Console, layout: Layout, outcome: Outcome) -> None:
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


def main() -> None:
    """The console script."""
    app()
