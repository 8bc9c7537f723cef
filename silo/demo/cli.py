"""`fedrt-demo`: three hospitals train one prompt together, on this machine, within two minutes."""

import enum
import signal
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Data(enum.StrEnum):
    """The data sets."""

    WORLD = "world"
    DIGITS = "digits"


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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python imports, Ctrl-C just ends it
    from silo.demo.performance import perform  # noqa: PLC0415
    from silo.demo.recipes import make_recipe  # noqa: PLC0415

    raise typer.Exit(perform(make_recipe(data.value, seed, rounds, images), directory))


def main() -> None:
    """The console script."""
    app()
