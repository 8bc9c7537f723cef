"""The commands of `fedrt-coordinator` that look after a store: back it up, restore it, compute its rounds again."""

import contextlib
import json
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from coordinator.config import load_coordinator_config
from fedrt.errors import ConfigurationError, ExitCode

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
        "what came later, and with the same contributors it is the same bits. Experiments created later are not known: "
        "create them again under other names. What was cancelled later runs again. Keys and certificates are not part "
        "of a backup."
    )


def replay(
    experiment: Annotated[str, typer.Argument(help="The experiment's name.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The coordinator's YAML file.")] = None,
    backup: Annotated[Path | None, typer.Option(help="Read this backup instead of the coordinator's store.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compute every aggregate again from the stored updates and compare digests; a coordinator may be running.

    Ends with 0 if all agree and with 1 if one does not, or can no longer be computed.
    """
    from coordinator import replay_view as view  # noqa: PLC0415  # needs a database
    from coordinator.backup_lock import keeping_blobs  # noqa: PLC0415
    from coordinator.replay import find_experiment  # noqa: PLC0415
    from coordinator.replay import replay as computed_again  # noqa: PLC0415
    from coordinator.store import Store  # noqa: PLC0415

    directory = _store_directory(config, backup)
    with contextlib.ExitStack() as stack:
        store = Store(directory, read_only=True)
        stack.callback(store.close)
        if backup is None:
            stack.enter_context(keeping_blobs(directory))
        found, rounds = find_experiment(store, experiment), []
        for replayed in computed_again(store, found):
            rounds.append(replayed)
            if not as_json:
                typer.echo(view.line(replayed))
    typer.echo(json.dumps(view.document(found, rounds), indent=2) if as_json else view.summary(found, rounds))
    raise typer.Exit(ExitCode.DONE if view.all_agree(rounds) else ExitCode.INTERNAL)


def _store_directory(config: Path | None, backup: Path | None) -> Path:
    from coordinator.store import FILE_NAME  # noqa: PLC0415  # needs a database

    if backup is not None:
        if not (backup / FILE_NAME).is_file():
            raise ConfigurationError(
                f"'{backup}' is no backup: it has no {FILE_NAME}; name a directory that "
                "`fedrt-coordinator backup` wrote"
            )
        return backup.absolute()
    if config is None:
        raise ConfigurationError("nothing says which store to read; give --config or --backup")
    return load_coordinator_config(config).state_directory


def _size(byte_count: int) -> str:
    return f"{byte_count / (1 << 20):.1f} MiB"
