"""Where the checkpoints of work lie, one file each; the daemon's half, which removes them. The worker writes them.

Nothing depends on them but time: whoever loses one starts its task again.
"""

import time
from hashlib import sha256
from pathlib import Path

from fedrt.statefile import ensure_private_directory, remove_unfinished, storage_error

UNCLAIMED_LIMIT = 7 * 86400.0  # seconds after which a checkpoint that no task went on with is removed


class CheckpointDirectory:
    """A private directory of checkpoints."""

    def __init__(self, directory: Path) -> None:
        ensure_private_directory(directory)
        remove_unfinished(directory)
        self._directory = directory

    def path(self, work: str) -> Path:
        """The file of a piece of work, there or not."""
        return self._directory / f"{sha256(work.encode()).hexdigest()[:40]}.safetensors"

    def remove(self, work: str) -> None:
        """Remove the file of work that has ended, and what a killed worker left of it. Raises `StorageError`."""
        path = self.path(work)
        try:
            path.unlink(missing_ok=True)
            for left in self._directory.glob(f".{path.name}.*.new"):
                left.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("remove", path, error) from error

    def sweep(self, now: float | None = None) -> int:
        """Remove what no task has claimed for seven days; returns how many. Raises `StorageError`.

        By the wall clock, because it has to count while the daemon does not run. A clock that jumps removes a file too
        early or too late; then a task starts again at its beginning, or a file lies longer.
        """
        limit = (time.time() if now is None else now) - UNCLAIMED_LIMIT
        removed = 0
        try:
            for path in self._directory.glob("*.safetensors"):
                if path.stat().st_mtime < limit:
                    path.unlink(missing_ok=True)
                    removed += 1
        except OSError as error:
            raise storage_error("clean", self._directory, error) from error
        return removed
