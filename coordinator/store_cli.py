"""The commands of `fedrt-coordinator` that look after a store: back it up, restore it, compute its rounds again."""

import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from coordinator.config import load_coordinator_config

Config = Annotated[Path, typer.Option("--config", "-c", help="The coordinator's YAML file.")]


def backup(
    config: Config, destination: Annotated[Path, typer.Argument(help="A directory that does not exist.")]
) -> None:
    """Copy the store, of a running coordinator too, to a new directory; without any key or certificate."""
    from coordinator.backup import back_up  # noqa: PLC0415  # needs a database

    os.umask(0o077)
    made = back_up(load_coordinator_config(config).state_directory, destination.absolute(), datetime.now(UTC))
    total, linked = made.manifest.byte_count, made.linked_bytes
    typer.echo(
        f"backup of {made.manifest.create_time:%Y-%m-%d %H:%M:%S} UTC in '{made.directory}': the database and "
        f"{len(made.manifest.blobs)} large tensors, {_size(total)}"
        + (f", of which {_size(linked)} are hard links and take no space" if linked else "")
    )
    typer.echo("It holds no keys and no certificates; keep a copy of it on another disk.")


def restore(config: Config, source: Annotated[Path, typer.Argument(help="A directory that `backup` wrote.")]) -> None:
    """Put a backup into the state directory, which must not hold a store, while no coordinator runs there."""
    from coordinator.restore import restore as put_back  # noqa: PLC0415  # needs a database

    os.umask(0o077)
    loaded = load_coordinator_config(config)
    manifest = put_back(source.absolute(), loaded.state_directory)
    when = f"{manifest.create_time:%Y-%m-%d %H:%M:%S} UTC"
    typer.echo(
        f"restored '{source}' (fedrt {manifest.fedrt_version}, {_size(manifest.byte_count)}) into "
        f"'{loaded.state_directory}'; start it with: fedrt-coordinator run --config {shlex.quote(str(config))}"
    )
    typer.echo(
        f"It will know what it knew at {when}. Its experiments go on from there: silos send again or compute again "
        "what came later, and with the same contributors it is the same bits. Experiments created later are not known, "
        "and what was cancelled later runs again. Keys and certificates are not part of a backup."
    )


def _size(byte_count: int) -> str:
    return f"{byte_count / (1 << 20):.1f} MiB"
