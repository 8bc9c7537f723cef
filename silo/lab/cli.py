"""`fedrt-lab`: runs grids of experiments, settings x methods x seeds, and writes tables and figures."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from fedrt.command_line import Commands
from fedrt.daemon import prepare_grpc
from fedrt.log import configure_logging

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Grids of experiments: settings x methods x seeds, run by a real coordinator and real silos on this machine.",
)
File = Annotated[Path, typer.Argument(help="The lab's YAML file.")]


@app.command()
def run(
    file: File,
    jobs: Annotated[int, typer.Option(min=1, help="Settings and seeds that run side by side.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="Only these cells, as setting/method or setting; may be repeated.")
    ] = None,
    again: Annotated[
        list[str] | None, typer.Option(help="Run these cells anew though they are finished; as --only.")
    ] = None,
) -> None:
    """Run what is not finished yet, then write results.csv, summary.md and figures. Ctrl-C ends it; run it again."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python imports, Ctrl-C just ends it
    prepare_grpc()
    from silo.lab.perform import Order, perform  # noqa: PLC0415

    raise typer.Exit(perform(Order(file, jobs, tuple(only or ()), tuple(again or ()))))


@app.command()
def check(file: File) -> None:
    """Look for every mistake of the file, start nothing, and print the grid."""
    from silo.lab.check import checked_plans, grid_text  # noqa: PLC0415
    from silo.lab.grid import cells_of  # noqa: PLC0415
    from silo.lab.records import read_cells  # noqa: PLC0415
    from silo.lab.sections import load_lab  # noqa: PLC0415

    lab = load_lab(file)
    plans = checked_plans(lab, file)
    typer.echo(grid_text(lab, plans, read_cells(lab.directory, cells_of(plans))))


@app.command("report")
def report_(file: File) -> None:
    """Write tables and figures again from what is finished; nothing is run."""
    from silo.lab.directory import claim  # noqa: PLC0415
    from silo.lab.grid import cells_of, expand  # noqa: PLC0415
    from silo.lab.records import read_cells  # noqa: PLC0415
    from silo.lab.report import write_report  # noqa: PLC0415
    from silo.lab.sections import load_lab  # noqa: PLC0415

    lab = load_lab(file)
    plans = expand(lab, file.absolute().parent)
    claim(lab)
    written, complaints = write_report(lab, plans, read_cells(lab.directory, cells_of(plans)))
    for line in [*complaints, *written]:
        typer.echo(line)


@app.command()
def recipes() -> None:
    """List the recipes that come with fedrt."""
    from silo.lab.shipped import recipe_titles  # noqa: PLC0415

    for name, title in recipe_titles().items():
        typer.echo(f"{name:<34} {title}")


@app.command()
def recipe(name: Annotated[str, typer.Argument(help="Name of a recipe, as `fedrt-lab recipes` lists it.")]) -> None:
    """Print a recipe: redirect it to a file, set its paths, run it."""
    from silo.lab.shipped import recipe_text  # noqa: PLC0415

    typer.echo(recipe_text(name), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the lab's YAML file, for editors."""
    import json  # noqa: PLC0415

    from silo.lab.sections import lab_schema  # noqa: PLC0415

    typer.echo(json.dumps(lab_schema(), indent=2, ensure_ascii=False))


def main() -> None:
    """The console script."""
    configure_logging("warning", "console")  # to stderr, like every daemon's
    app()


if __name__ == "__main__":
    main()
