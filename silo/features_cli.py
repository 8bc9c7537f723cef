"""`fedrt-silo features`: encode all images ahead of the first task, show what the store of features holds, clear it."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedrt.daemon import report
from fedrt.errors import ConfigurationError, FedrtError
from fedrt.log import configure_logging
from silo.config import check_files, data_source, feature_source, load_silo_config, model_source
from silo.feature_store import KindSummary, clear, summarize
from silo.sources import FeatureSource
from silo.work import OWN
from silo.worker_frames import Load

INTERRUPTED = 130

app = typer.Typer(no_args_is_help=True, help="The store of image features: an image is encoded once.")
Config = Annotated[Path, typer.Option("--config", "-c", help="The silo's YAML file.")]


@app.command("build")
def build_command(
    config: Config,
    patches: Annotated[
        bool, typer.Option(help="With patches, for methods that need them; others need a build without.")
    ] = False,
    views: Annotated[
        int, typer.Option(min=0, help="Augmented views of each training image, beside the plain one.")
    ] = 0,
) -> None:
    """Encode what the store lacks. Ctrl-C or worse loses seconds of work: the same command goes on.

    Images of a host.yaml are encoded by the host itself, at the first task that needs them.
    """
    try:
        loaded = load_silo_config(config)
        configure_logging("info", "console")
        check_files(loaded)
        features = feature_source(loaded.features, loaded.state_directory)
        lines = _build(
            Load(model_source(loaded), {OWN: data_source(loaded)}, loaded.model.threads, features), patches, views
        )
    except FedrtError as error:
        raise typer.Exit(report(error)) from None
    except KeyboardInterrupt:
        typer.echo("stopped; what was encoded is kept, and the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None
    for line in lines:
        typer.echo(line)
    typer.echo(f"features: {features.directory}")


@app.command("show")
def show_command(config: Config, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Print how large the store is and what the features are of."""
    features, kinds = _or_exit(config)
    total = sum(one.byte_count for one in kinds)
    if as_json:
        document = {
            "directory": str(features.directory),
            "max_bytes": features.max_bytes,
            "bytes": total,
            "kinds": [_document(one) for one in kinds],
        }
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(f"{features.directory}: {_gib(total)} of at most {_gib(features.max_bytes)}")
    for one in kinds:
        typer.echo(
            f"{_words(one)}: {one.row_count} rows, {_gib(one.byte_count)}, last used {_time(one):%Y-%m-%d %H:%M} UTC"
        )


@app.command("clear")
def clear_command(config: Config) -> None:
    """Remove all features but those that a running process has in use; they are computed again when needed."""
    features, _ = _or_exit(config)
    try:
        removed, kept = clear(features.directory)
    except FedrtError as error:
        raise typer.Exit(report(error)) from None
    typer.echo(f"removed {_gib(removed)}")
    if kept:
        typer.echo(f"{_gib(kept)} are in use by a running process; stop it and clear again")


def _build(load: Load, patches: bool, views: int) -> list[Any]:
    try:
        from silo.building import build_features  # noqa: PLC0415  # torch takes seconds to import
    except ImportError as error:
        raise ConfigurationError(
            f"this command needs {error.name or 'a package'}, which is not installed; run: pip install 'fedrt[silo]'"
        ) from error
    return list(build_features(load, patches, views))


def _or_exit(config: Path) -> tuple[FeatureSource, list[KindSummary]]:
    try:
        loaded = load_silo_config(config)
        features = feature_source(loaded.features, loaded.state_directory)
        return features, summarize(features.directory)
    except FedrtError as error:
        raise typer.Exit(report(error)) from None


def _document(one: KindSummary) -> dict[str, Any]:
    kind = {} if one.kind is None else asdict(one.kind)
    return kind | {"rows": one.row_count, "bytes": one.byte_count, "last_used": _time(one).isoformat()}


def _words(one: KindSummary) -> str:
    if one.kind is None:
        return f"{one.name} (its description is damaged)"
    kind = one.kind
    patches = ", with patches" if kind.patches else ""
    return f"{kind.architecture} with weights {kind.weights_sha256[:8]} on {kind.device}, {kind.element_type}{patches}"


def _time(one: KindSummary) -> datetime:
    return datetime.fromtimestamp(one.used_ns / 1e9, UTC)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
