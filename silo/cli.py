"""`fedrt-silo`: run a silo or a host of many, check its files, name its model, keep features, show what left."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import structlog
import typer

import fedrt
from fedrt.certificates import Expectation
from fedrt.config import effective_yaml, json_schema
from fedrt.daemon import Lifecycle, prepare_grpc, report, run_daemon
from fedrt.errors import ConfigurationError, FedrtError
from fedrt.identity import Role
from fedrt.log import configure_logging, reload_level
from fedrt.notation import format_size
from silo.config import SiloConfig, check_files, data_source, feature_source, load_silo_config, model_source
from silo.data import index
from silo.departures import read_lines
from silo.features_cli import app as features_app
from silo.sources import DataSource
from silo.work import OWN, WorkerReport
from silo.worker import ProcessWorker

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A silo of a fedrt federation.")
app.add_typer(features_app, name="features")
_T = TypeVar("_T")
Config = Annotated[Path, typer.Option("--config", "-c", help="The silo's YAML file.")]
HostFile = Annotated[Path, typer.Option("--config", "-c", help="The host's YAML file.")]


@app.command()
def run(config: Config) -> None:
    """Run until SIGTERM or Ctrl-C; a second one stops at once. SIGHUP takes the log level from the file again."""
    prepare_grpc()
    from silo.app import serve  # noqa: PLC0415  # the other commands do not need grpc

    loaded = _or_exit(lambda: load_silo_config(config))

    def start(lifecycle: Lifecycle) -> Awaitable[None]:
        lifecycle.reload.append(lambda: reload_level(lambda: load_silo_config(config).log.level))
        return serve(loaded, lifecycle)

    raise typer.Exit(run_daemon(start))


@app.command()
def host(config: HostFile) -> None:
    """Run many virtual silos of one data set in this process, each with its own session, as `run` does for one."""
    prepare_grpc()
    from silo.host.app import serve as serve_host  # noqa: PLC0415
    from silo.host.config import load_host_config  # noqa: PLC0415

    loaded = _or_exit(lambda: load_host_config(config))

    def start(lifecycle: Lifecycle) -> Awaitable[None]:
        lifecycle.reload.append(lambda: reload_level(lambda: load_host_config(config).log.level))
        return serve_host(loaded, lifecycle)

    raise typer.Exit(run_daemon(start))


@app.command()
def partition(
    config: HostFile,
    plot: Annotated[Path | None, typer.Option(help="Draw who holds what into this PNG file.")] = None,
    to: Annotated[Path | None, typer.Option(help="Write each silo's manifest into this directory.")] = None,
) -> None:
    """Deal a host's data set out without running, and print who holds what; the host deals in the same way."""
    from rich.console import Console  # noqa: PLC0415  # with numpy and the sections, it takes a while to import

    import silo.partition as parts  # noqa: PLC0415
    from silo.host.config import load_host_config  # noqa: PLC0415
    from silo.host.dealing import deal_out  # noqa: PLC0415

    def act() -> parts.Partition:
        collection, dealt = deal_out(load_host_config(config))
        if to is not None:
            parts.write_manifests(dealt, collection, to)
        if plot is not None:
            try:
                parts.plot(dealt, plot)
            except ImportError as error:
                raise ConfigurationError("--plot needs matplotlib; run: pip install 'fedrt[lab]'") from error
        return dealt

    dealt = _or_exit(act)
    Console().print(parts.table(dealt))
    if to is not None:
        typer.echo(f"manifests of {len(dealt.silos)} silos: {to}")


@app.command()
def check_config(config: Config) -> None:
    """Check the YAML file, the files it names, the certificate and which images there are, and print what was found."""
    from fedrt.tls import IdentityFiles, load_identity  # noqa: PLC0415  # imports grpc

    def check() -> tuple[SiloConfig, list[str]]:
        loaded = load_silo_config(config)
        check_files(loaded)
        files = IdentityFiles(loaded.identity.directory)
        identity = load_identity(files, datetime.now(UTC), Expectation(Role.SILO, loaded.federation))
        expiry = f"{identity.credential.not_after:%Y-%m-%d %H:%M} UTC"
        features = feature_source(loaded.features, loaded.state_directory)
        kept = f"features: {features.directory}, at most {format_size(features.max_bytes)}, {features.element_type}"
        valid = f"{identity.identity}, certificate valid until {expiry}"
        return loaded, [valid, kept, *_images(data_source(loaded))]

    loaded, lines = _or_exit(check)
    sys.stdout.write(effective_yaml(loaded))
    for line in lines:
        typer.echo(f"# {line}")


def _images(source: DataSource) -> Iterator[str]:
    """How many images there are, readable or not, a line per split. Raises `ConfigurationError`."""
    for split, counts in index(source).class_counts.items():
        total, classes = sum(counts.values()), len(counts)
        of_classes = "1 class" if classes == 1 else f"{classes} classes"
        yield f"{split}: {total} {'image' if total == 1 else 'images'} of {of_classes}"


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
    features = feature_source(config.features, config.state_directory)
    data, log = {OWN: data_source(config)}, structlog.get_logger("silo")
    worker = ProcessWorker(model_source(config), data, config.model.threads, log, features=features)
    try:
        return await worker.describe()
    finally:
        await worker.stop()


@app.command()
def departures(config: Config, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Show what left the building: every kind of message with its number, and every tensor with its shape and bytes."""
    path = _or_exit(lambda: load_silo_config(config)).state_directory / "departures.jsonl"
    entries = list(read_lines(path)) if path.exists() else []
    if as_json:
        for entry in entries:
            typer.echo(json.dumps(entry, separators=(",", ":")))
        return
    messages, tensors, sizes = Counter[str](), Counter[str](), Counter[str]()
    for entry in entries:
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
