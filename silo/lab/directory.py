"""The lab's directory: whose it is, which a marker file tells, and that one fedrt-lab at a time works in it."""

from pathlib import Path

from fedrt.errors import ConfigurationError
from fedrt.locking import DirectoryLock
from fedrt.statefile import ensure_private_directory, storage_error, write_atomic
from silo.lab.sections import LabFile

MARKER = ".fedrt-lab"


def claim(lab: LabFile) -> None:
    """Make the directory the lab's, or see that it is. Raises `ConfigurationError` if it holds anything else.

    One without a marker that holds finished cells is taken for this lab's. Raises `StorageError`.
    """
    directory = lab.directory.absolute()
    marker = directory / MARKER
    try:
        if not directory.exists():
            ensure_private_directory(directory)
        owner = marker.read_text(encoding="utf-8").strip() if marker.exists() else None
        is_free = owner is not None or not any(directory.iterdir()) or _was_a_labs(directory)
    except OSError as error:
        raise storage_error("use directory", directory, error) from error
    except UnicodeDecodeError:
        owner, is_free = "", True
    if not is_free:
        raise ConfigurationError(
            f"directory '{directory}' holds files that are not a lab's; set directory to a new or an empty one"
        )
    if owner is not None and owner != lab.lab:
        raise ConfigurationError(
            f"directory '{directory}' belongs to the lab {owner!r}, not to {lab.lab!r}; set another directory, or, if "
            f"the lab has been renamed, remove '{marker}'"
        )
    if owner is None:
        write_atomic(marker, f"{lab.lab}\n".encode(), 0o644)


def locked(directory: Path) -> DirectoryLock:
    """The directory for us alone. Raises `ConfigurationError` while another fedrt-lab runs there."""
    try:
        return DirectoryLock(directory.absolute())
    except ConfigurationError:
        raise ConfigurationError(
            f"another fedrt-lab runs in '{directory}'; wait for its end, or set another directory"
        ) from None


def _was_a_labs(directory: Path) -> bool:
    """Whether a lab ran here before there was a marker: it has finished cells, or was interrupted before the first."""
    return (directory / "cells").is_dir() or ((directory / "lock").is_file() and (directory / "work").is_dir())
