"""One daemon per state directory: a lock the kernel releases when the process ends, however it ends."""

import fcntl
import os
from pathlib import Path

from fedrt.errors import ConfigurationError
from fedrt.statefile import ensure_private_directory, storage_error


class DirectoryLock:
    """Held from construction until `release` or the end of the process; there is no stale lock to remove by hand.

    Raises `ConfigurationError` if another process holds it and `StorageError` if the directory cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        ensure_private_directory(directory)
        path = directory / "lock"
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error("open", path, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise ConfigurationError(
                f"state_directory '{directory}' is in use by another running daemon; stop that one or set another path"
            ) from None

    def release(self) -> None:
        """Let another process have the directory."""
        os.close(self._descriptor)
