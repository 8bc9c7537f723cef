"""The worker process: `python -m silo.worker_main <fd>` loads CLIP once and serves orders until the daemon is gone.

It never outlives the daemon: the kernel kills it when the daemon dies (Linux), and a thread that reads the socket ends
it at the end of the stream, also in the middle of an order. Ctrl-C is the daemon's to decide upon.
"""

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from fedrt.errors import ConfigurationError, FailureReason, RemoteProtocolError, SpecError, TensorError, WorkError
from silo.work import OnProgress, WorkerReport, WorkOrder, WorkOutcome
from silo.worker_frames import Failed, Frame, Load, Misconfigured, Progress, Ready, receive, send

LOG_FORMAT = "%(levelname)s %(message)s"  # the daemon reads the level from it
PROGRESS_INTERVAL = 0.1  # seconds
_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")

log = logging.getLogger(__name__)
T = TypeVar("T")


class Bench(Protocol):
    """What performs orders; `silo.workbench.Workbench`, or a fake."""

    def report(self) -> WorkerReport:
        """What is held now."""

    def perform(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        """Do the work, or raise."""


OpenBench = Callable[[Load], Bench]  # raises `ConfigurationError`


def main() -> None:
    """Serve on the file descriptor that the first argument names."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, _open_workbench)


def _open_workbench(load: Load) -> Bench:
    # Here and not above: torch takes seconds to import, and until `main` has run this process could be orphaned.
    try:
        from silo.workbench import open_workbench  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            f"the worker needs {error.name or 'a package'}, which is not installed; run: pip install 'fedrt[silo]'"
        ) from error
    return open_workbench(load)


def die_with_parent() -> None:
    """Ask the kernel to kill this process with the thread that started it, hence with the daemon's event loop.

    Where the kernel cannot, or the parent died before this, the end of the stream must do.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def serve(connection: socket.socket, open_bench: OpenBench) -> None:
    """Load what the first frame says, then answer orders one by one; returns when no longer fit for another."""
    inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), name="reader", daemon=True).start()
    load = inbox.get()
    if not isinstance(load, Load):
        raise RemoteProtocolError(f"the first frame is '{type(load).__name__}'; expected was 'Load'")
    opened = _guarded(lambda: open_bench(load))
    if isinstance(opened, Misconfigured | Failed):
        send(connection, opened)
        return
    report = opened.report()
    send(connection, Ready(report))
    while True:
        order = inbox.get()
        if not isinstance(order, WorkOrder):
            raise RemoteProtocolError(f"the daemon sent '{type(order).__name__}'; expected was 'WorkOrder'")
        answer = _answer(opened, order, _ProgressSender(connection))
        if (now := opened.report()) != report:
            report = now
            send(connection, Ready(report))
        send(connection, answer)
        if isinstance(answer, Failed) and answer.is_final:
            return


def _read(connection: socket.socket, inbox: "queue.SimpleQueue[Frame]") -> None:
    """Fill the inbox; end the process when the daemon is gone."""
    try:
        while (frame := receive(connection)) is not None:
            inbox.put(frame)
    except (OSError, RemoteProtocolError) as error:
        log.error("the connection to the daemon failed: %s", error)
    os._exit(0)  # the main thread may be deep in a kernel, and there is no one left to tell


class _ProgressSender:
    """Passes progress on, at most ten times a second, and the last step always."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._next = 0.0

    def __call__(self, done: int, planned: int) -> None:
        now = time.monotonic()
        if now >= self._next or 0 < planned <= done:
            self._next = now + PROGRESS_INTERVAL
            send(self._connection, Progress(done, planned))


def _answer(bench: Bench, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome | Failed:
    answer = _guarded(lambda: bench.perform(order, on_progress))
    if isinstance(answer, Misconfigured):
        log.error("%s", answer.message)
        return Failed(FailureReason.INTERNAL, "this silo is configured wrongly; its log says how", is_final=True)
    return answer


def _guarded(work: Callable[[], T]) -> T | Misconfigured | Failed:
    """The one boundary where any exception becomes a frame. Details go to stderr only: they may name files."""
    try:
        return work()
    except Exception as error:
        return _frame_of(error)


def _frame_of(error: Exception) -> Misconfigured | Failed:
    match error:
        case WorkError():
            return Failed(error.reason, str(error), is_final=False)
        case SpecError():
            return Failed(FailureReason.INTERNAL, str(error), is_final=False)
        case TensorError():
            return Failed(FailureReason.PAYLOAD_CORRUPT, str(error), is_final=False)
        case ConfigurationError():
            return Misconfigured(str(error))
    log.error("unexpected failure", exc_info=error)
    if _is_out_of_memory(error):
        return Failed(FailureReason.OUT_OF_MEMORY, "memory ran out on this silo's device or machine", is_final=True)
    # After an unknown failure (a CUDA fault, say) the process cannot be trusted: a fresh one serves the next order.
    return Failed(
        FailureReason.INTERNAL, f"an unexpected {type(error).__name__} stopped the work; see the silo's log", True
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Told by name and text, because torch is not imported here; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
