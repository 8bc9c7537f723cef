"""`fedrtctl`: what operators do with a federation. Create, list, show, watch, cancel and export experiments."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.live import Live

import fedrt
from fedrt.admin_client import AdminClient, LocalSocket, RemoteListener, Target, connect
from fedrt.command_line import Commands
from fedrt.ctl_export import check_destination, write_export
from fedrt.ctl_follow import follow
from fedrt.ctl_json import event_json, experiment_json, round_json, silo_json
from fedrt.ctl_progress import ClosedRound, WatchState, closed_round, state_name
from fedrt.ctl_view import (
    effective_experiment,
    event_line,
    experiment_view,
    experiments_table,
    printable,
    silos_table,
    watch_view,
)
from fedrt.errors import ExitCode
from fedrt.experiment_file import experiment_schema, load_experiment
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import experiment_pb2 as experiment_pb

DEFAULT_SOCKET = Path("/run/fedrt-coordinator/admin.sock")
INTERRUPTED = 130  # as shells count a death by SIGINT
_T = TypeVar("_T")


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Create, watch and export the experiments of a federation.",
)
Name = Annotated[str, typer.Argument(help="Name of the experiment.")]
File = Annotated[Path, typer.Argument(help="The experiment's YAML file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback()
def target(
    context: typer.Context,
    socket: Annotated[
        Path, typer.Option(envvar="FEDRT_ADMIN_SOCKET", help="The coordinator's admin_socket on this machine.")
    ] = DEFAULT_SOCKET,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a coordinator elsewhere (its listen.admin); needs --identity.")
    ] = None,
    identity: Annotated[
        Path | None, typer.Option(help="Directory of your operator key and certificate, for --address.")
    ] = None,
) -> None:
    """Where the coordinator is."""
    if (address is None) != (identity is None):
        missing = "--identity" if identity is None else "--address"
        raise typer.BadParameter(f"--address and --identity go together; add {missing}")
    context.obj = LocalSocket(socket) if address is None or identity is None else RemoteListener(address, identity)


@app.command()
def create(
    context: typer.Context,
    file: File,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the experiment until it ends.")] = False,
) -> None:
    """Create an experiment from its YAML file; it begins as soon as its silos are connected."""
    experiment_id, spec = load_experiment(file)

    async def act(client: AdminClient) -> WatchState | None:
        experiment = await client.create(experiment_id, spec)
        typer.echo(f"experiment {experiment_id!r}: {_standing(experiment)}")
        return await _follow(client, experiment_id, as_json=False) if watch else None

    state = _run(context, act)
    if state is not None:
        _end_with(state)


@app.command()
def check_config(file: File) -> None:
    """Check an experiment's YAML file and print the experiment with every default filled in."""
    sys.stdout.write(effective_experiment(*load_experiment(file)))


@app.command()
def schema() -> None:
    """Print the JSON Schema of an experiment's YAML file, for editors."""
    typer.echo(json.dumps(experiment_schema(), indent=2))


@app.command("list")
def list_(context: typer.Context, as_json: AsJson = False) -> None:
    """List the experiments, newest first."""
    found = _run(context, lambda client: client.list_all())
    if as_json:
        _print_json([experiment_json(experiment) for experiment in found])
    elif found:
        _console().print(experiments_table(found))
    else:
        typer.echo("there is no experiment yet; create one with: fedrtctl create experiment.yaml")


@app.command()
def show(
    context: typer.Context,
    name: Name,
    rounds: Annotated[int, typer.Option(min=0, help="How many of the last rounds to show; 0 for all.")] = 6,
    as_json: AsJson = False,
) -> None:
    """Show how an experiment stands, what it is, and its last rounds with the metrics of every silo."""

    async def act(client: AdminClient) -> tuple[experiment_pb.Experiment, list[ClosedRound]]:
        experiment = await client.get(name)
        return experiment, await _rounds(client, experiment)

    experiment, closed = _run(context, act)
    latest = closed[-rounds:]
    if as_json:
        _print_json({**experiment_json(experiment), "rounds": [round_json(one) for one in latest]})
    else:
        _console().print(experiment_view(experiment, latest))


@app.command()
def watch(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Follow an experiment until it ends; exit code 0 if it succeeded. With --json, one line per event."""
    _end_with(_run(context, lambda client: _follow(client, name, as_json)))


@app.command()
def cancel(context: typer.Context, name: Name) -> None:
    """End an experiment; what it has learned so far can still be exported."""
    experiment = _run(context, lambda client: client.cancel(name))
    typer.echo(f"experiment {name!r}: {_standing(experiment)}")


@app.command()
def export(
    context: typer.Context,
    name: Name,
    to: Annotated[Path, typer.Option(help="Directory for prompt.safetensors and experiment.json.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier export.")] = False,
) -> None:
    """Write what an experiment has learned: its shared tensors, and the record of its rounds."""
    check_destination(to, force)

    async def act(client: AdminClient) -> tuple[Path, Path]:
        found = await client.export(name)
        return await asyncio.to_thread(write_export, to, found, await _rounds(client, found.experiment))

    for path in _run(context, act):
        typer.echo(path)


@app.command()
def silos(context: typer.Context, as_json: AsJson = False) -> None:
    """List the silos that have ever connected."""
    found = _run(context, lambda client: client.silos())
    if as_json:
        _print_json([silo_json(silo) for silo in found])
    elif found:
        _console().print(silos_table(found))
    else:
        typer.echo("no silo has connected yet")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(fedrt.__version__)


class Lines:
    """Tells events line by line, as text or JSON."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._standing = ""

    def heard(self, event: pb.Event) -> None:
        """Print the event; as text, a change of the experiment only if it can be seen in the text."""
        line = json.dumps(event_json(event), ensure_ascii=False) if self._as_json else event_line(event)
        if event.WhichOneof("kind") == "experiment_changed":
            line, self._standing = ("" if line == self._standing else line), line
        if line:
            typer.echo(line)

    def shown(self, state: WatchState) -> None:
        """Nothing: the events tell it."""


class LiveView:
    """Shows the state in place on a terminal."""

    def __init__(self, live: Live, reference: dict[str, float] | None = None) -> None:
        self._live = live
        self._reference = reference

    def heard(self, event: pb.Event) -> None:
        """Nothing: the state tells it."""

    def shown(self, state: WatchState) -> None:
        """Replace what is shown."""
        self._live.update(watch_view(state, time.time(), self._reference), refresh=state.has_ended)


async def _follow(client: AdminClient, name: str, as_json: bool) -> WatchState:
    console = _console()
    if as_json or not console.is_terminal:
        return await follow(client, name, Lines(as_json))
    with Live(console=console, refresh_per_second=8) as live:
        return await follow(client, name, LiveView(live))


async def _rounds(client: AdminClient, experiment: experiment_pb.Experiment) -> list[ClosedRound]:
    events = await client.history(experiment)
    return [closed_round(event.round_closed) for event in events if event.WhichOneof("kind") == "round_closed"]


def _run(context: typer.Context, act: Callable[[AdminClient], Awaitable[_T]]) -> _T:
    coordinator: Target = context.obj

    async def session() -> _T:
        async with connect(coordinator) as client:
            return await act(client)

    try:
        return asyncio.run(session())
    except KeyboardInterrupt:
        typer.echo("stopped; the federation goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _end_with(state: WatchState) -> None:
    if not state.succeeded:
        reason = f": {printable(state.message)}" if state.message else ""
        typer.echo(f"experiment {state.plan.experiment_id!r} {_ENDINGS[state.state]}{reason}", err=True)
        raise typer.Exit(ExitCode.INTERNAL)


_ENDINGS = {"failed": "failed", "cancelled": "was cancelled"}


def _standing(experiment: experiment_pb.Experiment) -> str:
    message = f", {printable(experiment.status_message)}" if experiment.status_message else ""
    return state_name(experiment.state) + message


def _console() -> Console:
    return Console(highlight=False)


def _print_json(document: object) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def main() -> None:
    """The console script."""
    app()
