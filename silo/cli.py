"""`fedrt-silo`: run the daemon, check its configuration, name its model, show what left the building."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import structlog
import typer

import fedrt
from fedrt.certificates import Expectation
from fedrt.config import effective_yaml, json_schema
from fedrt.daemon import Lifecycle, report, run_daemon
from fedrt.errors import FedrtError
from fedrt.identity import Role
from fedrt.log import configure_logging, reload_level
from fedrt.tls import IdentityFiles, load_identity
from silo.config import SiloConfig, check_files, data_source, load_silo_config, model_source
from silo.work import WorkerReport
from silo.worker import ProcessWorker

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A silo of a fedrt federation.")
_T = TypeVar("_T")
Config = Annotated[Path, typer.Option("--config", "-c", help="The silo's YAML file.")]


@app.command()
def run(config: Config) -> None:
    """Run until SIGTERM or Ctrl-C; a second one stops at once. SIGHUP takes the log level from the file again."""
    from silo.app import serve  # noqa: PLC0415  # the other commands do not need grpc

    loaded = _or_exit(lambda: load_silo_config(config))

    def start(lifecycle: Lifecycle) -> Awaitable[None]:
        lifecycle.reload.append(lambda: reload_level(lambda: load_silo_config(config).log.level))
        return serve(loaded, lifecycle)

    raise typer.Exit(run_daemon(start))


@app.command()
def check_config(config: Config) -> None:
    """Check the YAML file, the files it names and the certificate, and print the effective configuration."""

    def check() -> tuple[SiloConfig, str]:
        loaded = load_silo_config(config)
        check_files(loaded)
        files = IdentityFiles(loaded.identity.directory)
        identity = load_identity(files, datetime.now(UTC), Expectation(Role.SILO, loaded.federation))
        expiry = f"{identity.credential.not_after:%Y-%m-%d %H:%M} UTC"
        return loaded, f"# {identity.identity}, certificate valid until {expiry}"

    loaded, line = _or_exit(check)
    sys.stdout.write(effective_yaml(loaded))
    typer.echo(line)


@app.command()
def model(config: Config) -> None:
    """Load the model and the data, and print what an experiment must name to run here."""
    found = _or_exit(lambda: asyncio.run(_describe(load_silo_config(config))))
    typer.echo(f"architecture: {found.architecture}\nweights_sha256: {found.weights_sha256}")
    typer.echo(f"context_dim: {found.context_dim}\nfeature_dim: {found.feature_dim}\ndevice: {found.device}")
    typer.echo(f"unreadable files: {found.unreadable_count}")
    for split, counts in found.class_counts.items():
        listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        typer.echo(f"{split}: {sum(counts.values())} examples ({listed})")


async def _describe(config: SiloConfig) -> WorkerReport:
    configure_logging("warning", "console")
    check_files(config)
    log = structlog.get_logger("silo")
    worker = ProcessWorker(model_source(config), data_source(config), config.model.threads, log)
    try:
        return await worker.describe()
    finally:
        await worker.stop()


@app.command()
def departures(config: Config, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Show what left the building: every kind of message with its number, and every tensor with its shape and bytes."""
    path = _or_exit(lambda: load_silo_config(config)).state_directory / "departures.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if as_json:
        for line in lines:
            typer.echo(line)
        return
    messages, tensors, sizes = Counter[str](), Counter[str](), Counter[str]()
    for entry in map(json.loads, lines):
        messages[entry["message"]] += entry["count"]
        for tensor in entry.get("tensors", []):
            name = f"{tensor['name']} {tensor['type']} {tensor['shape']}"
            tensors[name] += 1
            sizes[name] += tensor["bytes"]
    for name, count in sorted(messages.items()):
        typer.echo(f"message {name}: {count}")
    for name, count in sorted(tensors.items()):
        typer.echo(f"tensor {name}: {count} times, {sizes[name]} bytes")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the YAML file, for editors."""
    typer.echo(json.dumps(json_schema(SiloConfig), indent=2))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(fedrt.__version__)


def _or_exit(action: Callable[[], _T]) -> _T:
    try:
        return action()
    except FedrtError as error:
        raise typer.Exit(report(error)) from None


def main() -> None:
    """The console script."""
    app()
