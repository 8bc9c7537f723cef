"""Runs inside a daemon of the chaos suite: kills it at a named point, or lets its disk refuse, as files tell it to.

The runner writes these files into the daemon's control directory, also while the daemon runs:
* `armed` holds `<point> #<count> <linger> <token>`: at the count-th passage of the point the process notes the token in
  `hit` and kills itself with SIGKILL, so that nothing of Python or of C libraries is run any more. Before, the thread
  waits for `linger` seconds, as on a slow disk: what other threads do too early then has time to leave the process.
* `disk` holds `ENOSPC` or `EROFS`: every write to the state directory fails with it until the file is gone. With
  ` #<point>` behind, only from the next passage of that point on.
"""

import errno
import os
import signal
import threading
import time
from pathlib import Path

CONTROL = "FEDRT_CHAOS_CONTROL"  # environment variable: the control directory
STATE = "FEDRT_CHAOS_STATE"  # environment variable: the state directory, whose disk may refuse
RUN = "FEDRT_CHAOS_RUN"  # environment variable: marks every process that descends from a run


class Hooks:
    """What the points call. Every method may be called from any thread."""

    def __init__(self, control: Path, state: Path) -> None:
        self._armed = control / "armed"
        self._hit = control / "hit"
        self._disk = control / "disk"
        self.state = state
        self._lock = threading.Lock()
        self._token = ""
        self._passed = ""  # the point from which on the disk refuses
        self._count = 0

    @classmethod
    def from_environment(cls) -> "Hooks":
        """Those of this process."""
        return cls(Path(os.environ[CONTROL]), Path(os.environ[STATE]))

    def passage(self, point: str) -> None:
        """The process is at this point; it may be its last one."""
        if point == _read(self._disk).partition(" #")[2]:
            self._passed = point
        linger = self._due(point)
        if linger is not None:
            time.sleep(linger)
            os.kill(os.getpid(), signal.SIGKILL)

    def is_armed(self, point: str) -> bool:
        """Whether the next passages of this point count."""
        return _read(self._armed).rpartition(" #")[0] == point

    def _due(self, point: str) -> float | None:
        """Count a passage; if it is the one, it is noted, and nothing is armed any more. Returns how long to linger."""
        text = _read(self._armed)
        name, _, rest = text.rpartition(" #")
        if name != point:
            return None
        count, linger, token = rest.split()
        with self._lock:
            if token != self._token:
                self._token, self._count = token, 0
            self._count += 1
            if self._count != int(count):
                return None
        descriptor = os.open(self._hit, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, f"{token}\n".encode())
        os.close(descriptor)
        os.unlink(self._armed)
        return float(linger)

    @property
    def refusal(self) -> OSError | None:
        """What a write to the disk fails with now."""
        name, _, point = _read(self._disk).partition(" #")
        if not name:
            self._passed = ""
        if point and self._passed != point:
            return None
        number = getattr(errno, name) if name else 0
        return OSError(number, os.strerror(number)) if name else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
