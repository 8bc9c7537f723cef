"""The silo's real worker, which writes a checkpoint after each epoch and hangs after the first: ... MARKER FD.

It hangs only if MARKER does not exist yet, and makes it then.
"""

import sys
import time
from pathlib import Path

from silo import checkpoints, worker_main
from silo.snapshots import Snapshot


def hang_once(marker: Path) -> None:
    save = checkpoints.FileCheckpointer.save

    def save_and_hang(self: checkpoints.FileCheckpointer, snapshot: Snapshot) -> None:
        save(self, snapshot)
        if not marker.exists():
            marker.write_text(str(snapshot.epochs_done))
            time.sleep(3600)

    checkpoints.FileCheckpointer.save = save_and_hang  # type: ignore[method-assign]


if __name__ == "__main__":
    worker_main.die_with_parent()
    checkpoints.SAVE_INTERVAL = 0.0
    hang_once(Path(sys.argv.pop(1)))
    worker_main.main()
