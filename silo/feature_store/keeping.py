"""The rows of one kind as a process uses them: on disk, and in memory where the disk refuses."""

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor

from fedrt.errors import StorageError
from silo.feature_store.kinds import Row, RowKey
from silo.feature_store.shelf import Shelf

SAVED_AT_ONCE = 64 << 20  # bytes
SAVE_INTERVAL = 2.0  # seconds; about as much work is lost to kill -9

log = logging.getLogger(__name__)


class KeptRows:
    """Saves in a thread of its own, so that the disk and the image tower work at the same time.

    `open_shelf` is called until it gives a shelf; without it all rows stay in memory. A disk that refuses (it is full,
    say) is tried again with every part that is saved, and what it has refused with it.
    """

    def __init__(self, open_shelf: Callable[[], Shelf] | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._open_shelf = open_shelf
        self._clock = clock
        self._memory: dict[RowKey, Row] = {}
        self._waiting: dict[RowKey, Row] = {}
        self._waiting_bytes = 0
        self._saved_time = clock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._saving: tuple[dict[RowKey, Row], Future[None]] | None = None
        self.problem: str | None = None

    @property
    def in_memory_count(self) -> int:
        """Rows that will be lost with the process."""
        return len(self._memory)

    def find(self, wanted: Collection[RowKey], on_segment: Callable[[], None]) -> dict[RowKey, Row]:
        """Those rows that there are. `on_segment` is called again and again."""
        found = {key: self._memory[key] for key in wanted if key in self._memory}
        missing = [key for key in wanted if key not in found]
        if self._open_shelf is not None and missing:
            try:
                found |= self._open_shelf().find(missing, on_segment)
            except StorageError as error:
                self._refused(error)
        return found

    def add(self, key: RowKey, row: Row, in_memory: bool = False) -> None:
        """Keep a row, on request in memory until the next part is saved."""
        if self._open_shelf is None or in_memory:
            self._memory[key] = row
            return
        self._waiting[key] = row
        self._waiting_bytes += row.nbytes
        if self._waiting_bytes >= SAVED_AT_ONCE or self._clock() - self._saved_time >= SAVE_INTERVAL:
            self._begin()

    def settle(self) -> None:
        """Return when all that was added is on disk, or else in memory."""
        if self._waiting:
            self._begin()
        self._collect()

    def _begin(self) -> None:
        """Save what waits once the former part is saved, and what the disk has refused before."""
        self._collect()
        if self._open_shelf is None:
            return
        part = self._memory | self._waiting
        self._waiting, self._waiting_bytes, self._saved_time = {}, 0, self._clock()
        self._saving = (part, self._pool.submit(_save, self._open_shelf, part))

    def _collect(self) -> None:
        if self._saving is None:
            return
        (part, saved), self._saving = self._saving, None
        problem = saved.exception()
        self._memory = part  # what is left of it
        if isinstance(problem, StorageError):
            self._refused(problem)
        elif problem is not None:
            raise problem
        elif self.problem is not None:
            self.problem = None
            log.info("features are kept on disk again")

    def _refused(self, error: StorageError) -> None:
        if self.problem is None:
            log.warning("features stay in memory, to be computed again at the next start: %s", error)
        self.problem = str(error)


def _save(open_shelf: Callable[[], Shelf], part: dict[RowKey, Row]) -> None:
    open_shelf().save(part)
