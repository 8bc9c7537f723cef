"""`fedrt-coordinator`: run the daemon, check its configuration, print the schema of its file."""

import json
import sys
from collections.abc import Awaitable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

import fedrt
from coordinator.config import CoordinatorConfig, load_coordinator_config
from fedrt.certificates import Expectation
from fedrt.config import effective_yaml, json_schema
from fedrt.daemon import Lifecycle, prepare_grpc, report, run_daemon
from fedrt.errors import ExitCode, FedrtError
from fedrt.identity import Role
from fedrt.log import reload_level

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The coordinator of a fedrt federation.")
Config = Annotated[Path, typer.Option("--config", "-c", help="The coordinator's YAML file.")]


@app.command()
def run(config: Config) -> None:
    """Run until SIGTERM or Ctrl-C; a second one stops at once. SIGHUP takes the log level from the file again."""
    prepare_grpc()
    from coordinator.app import serve  # noqa: PLC0415  # the other commands need neither grpc nor a database

    def start(lifecycle: Lifecycle) -> Awaitable[None]:
        lifecycle.reload.append(lambda: reload_level(lambda: load_coordinator_config(config).log.level))
        return serve(loaded, lifecycle)

    try:
        loaded = load_coordinator_config(config)
    except FedrtError as error:
        raise typer.Exit(report(error)) from None
    raise typer.Exit(run_daemon(start))


@app.command()
def check_config(config: Config) -> None:
    """Check the YAML file and the certificate it names, and print the effective configuration."""
    from fedrt.tls import IdentityFiles, load_identity  # noqa: PLC0415  # imports grpc

    try:
        loaded = load_coordinator_config(config)
        files = IdentityFiles(loaded.identity.directory)
        identity = load_identity(files, datetime.now(UTC), Expectation(Role.COORDINATOR, loaded.federation))
    except FedrtError as error:
        raise typer.Exit(report(error)) from None
    sys.stdout.write(effective_yaml(loaded))
    typer.echo(f"# {identity.identity}, certificate valid until {identity.credential.not_after:%Y-%m-%d %H:%M} UTC")


@app.command()
def verify(
    config: Config, as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False
) -> None:
    """Check every record and every tensor in the store, also while the coordinator runs; exit code 1 for damage."""
    from coordinator.verification import verify as verify_store  # noqa: PLC0415  # imports the database

    try:
        found = verify_store(load_coordinator_config(config).state_directory)
    except FedrtError as error:
        raise typer.Exit(report(error)) from None
    typer.echo(json.dumps(found.as_json(), indent=2) if as_json else found.as_text())
    raise typer.Exit(ExitCode.DONE if found.whole else ExitCode.INTERNAL)


@app.command()
def collect(config: Config) -> None:
    """Remove what the store no longer needs, of a coordinator that is stopped; a running one does it once a day."""
    from coordinator.retention import collect_by_hand  # noqa: PLC0415  # imports the database

    try:
        loaded = load_coordinator_config(config)
        freed = collect_by_hand(loaded.state_directory, loaded.retention.updates)
    except FedrtError as error:
        raise typer.Exit(report(error)) from None
    typer.echo(str(freed))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the YAML file, for editors."""
    typer.echo(json.dumps(json_schema(CoordinatorConfig), indent=2))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(fedrt.__version__)


def main() -> None:
    """The console script."""
    app()
