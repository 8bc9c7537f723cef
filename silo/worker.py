"""Runs orders in a child process and survives whatever becomes of it; the daemon's half of the worker. No torch here.

A child is started when it is first needed and again after it has died, was cancelled or gave up. There is at most one,
it serves one order at a time, and it never outlives this process (see `silo.worker_main`).
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import silo
from fedrt.errors import ConfigurationError, FailureReason, RemoteProtocolError, WorkError
from silo.sources import DataSource, FeatureSource, ModelSource
from silo.work import OnProgress, WorkerReport, WorkOrder, WorkOutcome
from silo.worker_frames import (
    Failed,
    Load,
    Misconfigured,
    Progress,
    Ready,
    receive_async,
    send_async,
)

TERMINATION_LIMIT = 2.0  # seconds between SIGTERM and SIGKILL
LINE_LIMIT = 4096  # characters of one line of the child's output
LEVELS = ("INFO", "WARNING", "ERROR", "CRITICAL")
PROGRAM = (sys.executable, "-P", "-m", "silo.worker_main")  # -P: what lies in the working directory is not imported


class WorkerLog(Protocol):
    """What the child's output goes to; structlog's loggers fit."""

    def info(self, event: str, **fields: object) -> object:
        """Log at level info."""

    def warning(self, event: str, **fields: object) -> object:
        """Log at level warning."""

    def error(self, event: str, **fields: object) -> object:
        """Log at level error."""


class _ChildEnded(Exception):
    """The child closed its end of the connection."""


@dataclass
class _Child:
    """One running process with its connection and the task that passes its output on."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    output: "asyncio.Task[None]"
    is_stopping: bool = False


class ProcessWorker:
    """A `Worker` that keeps one child process. `program` is the child's command line but for the file descriptor.

    `data`: the images of each virtual silo by name, or the daemon's own under `OWN`. `features`: where those of images
    are kept.
    """

    def __init__(
        self,
        model: ModelSource,
        data: Mapping[str, DataSource],
        threads: int | None,
        log: WorkerLog,
        program: Sequence[str] = PROGRAM,
        features: FeatureSource | None = None,
    ) -> None:
        self._load = Load(model, data, threads, features)
        self._log = log
        self._program = tuple(program)
        self._turn = asyncio.Lock()  # one conversation with the child at a time
        self._child: _Child | None = None
        self._report: WorkerReport | None = None
        self._outputs: set[asyncio.Task[None]] = set()

    @property
    def process_id(self) -> int | None:
        """Of the child, if one runs."""
        return None if self._child is None else self._child.process.pid

    @property
    def report(self) -> WorkerReport | None:
        """What the last child said it holds; None until a fresh one has said it."""
        return self._report

    async def describe(self) -> WorkerReport:
        """What the child holds, at once if one runs, even while it works; otherwise one is started first.

        Raises `ConfigurationError` if the model or the data cannot be loaded, `WorkError` if the process dies on it.
        """
        if self._report is None or self._child is None or self._child.process.returncode is not None:
            async with self._turn:
                await self._ready_child()
        assert self._report is not None
        return self._report

    async def run(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        """Do the work; waits for its turn. Raises `WorkError`, also when the child dies. Cancelling kills the child."""
        async with self._turn:
            try:
                child = await self._ready_child()
            except ConfigurationError as error:
                self._log.error("worker cannot start", problem=str(error))
                raise WorkError(
                    FailureReason.INTERNAL, "this silo's worker cannot load its model or data; its log says why"
                ) from error
            answer = await self._converse(child, order, on_progress)
            if isinstance(answer, WorkOutcome):
                return answer
            if answer.is_final:
                await self._end(child)
            raise WorkError(answer.reason, answer.message)

    async def stop(self) -> None:
        """End the child, if there is one; an order that it is at fails as cancelled."""
        if self._child is not None:
            self._child.is_stopping = True
            await self._end(self._child)

    async def _ready_child(self) -> _Child:
        """The running child, or a fresh one that has loaded everything."""
        if self._child is not None:
            if self._child.process.returncode is None:
                return self._child
            await self._end(self._child)  # it died between two orders
        self._report = None
        child = self._child = await self._spawn()
        async with self._guarding(child):
            await send_async(child.writer, self._load)
            match await receive_async(child.reader):
                case Ready(report):
                    self._report = report
                case Misconfigured(message):
                    raise ConfigurationError(message)
                case Failed(reason, message):
                    raise WorkError(reason, message)
                case None:
                    raise _ChildEnded
                case frame:
                    raise RemoteProtocolError(f"the worker answered with '{type(frame).__name__}'")
        return child

    async def _converse(self, child: _Child, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome | Failed:
        async with self._guarding(child):
            await send_async(child.writer, order)
            while True:
                match await receive_async(child.reader):
                    case Progress(done, planned):
                        on_progress(done, planned)
                    case Ready(report):
                        self._report = report
                    case WorkOutcome() | Failed() as answer:
                        return answer
                    case None:
                        raise _ChildEnded
                    case frame:
                        raise RemoteProtocolError(f"the worker answered with '{type(frame).__name__}'")

    @contextlib.asynccontextmanager
    async def _guarding(self, child: _Child) -> AsyncIterator[None]:
        """End the child if anything goes wrong meanwhile, a cancellation included: its state is then unknown."""
        try:
            try:
                yield
            except (_ChildEnded, RemoteProtocolError, ConnectionError) as error:
                raise await self._cause_of_death(child) from error
        except BaseException:
            await self._end(child)
            raise

    async def _cause_of_death(self, child: _Child) -> WorkError:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERMINATION_LIMIT):
                await child.process.wait()
        code = child.process.returncode
        self._log.error("worker died", exit_code=code, process_id=child.process.pid)
        if child.is_stopping:
            return WorkError(FailureReason.CANCELLED, "the worker process was stopped")
        if code == -signal.SIGKILL:
            return WorkError(
                FailureReason.OUT_OF_MEMORY,
                "the worker process was killed by signal 9, often the kernel's out-of-memory killer",
            )
        if code is not None and code < 0:
            return WorkError(FailureReason.INTERNAL, f"the worker process was killed by signal {-code}")
        return WorkError(FailureReason.INTERNAL, f"the worker process ended unexpectedly with exit code {code}")

    async def _end(self, child: _Child) -> None:
        """SIGTERM, and SIGKILL after two seconds; cancelling the wait kills at once. Can be called again."""
        process = child.process
        try:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TERMINATION_LIMIT):
                        await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            child.writer.close()
            if self._child is child:
                self._child = None
        await process.wait()
        await asyncio.wait({child.output}, timeout=TERMINATION_LIMIT)

    async def _spawn(self) -> _Child:
        ours, theirs = socket.socketpair()
        process: asyncio.subprocess.Process | None = None
        try:
            process = await asyncio.create_subprocess_exec(
                *self._program,
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # Ctrl-C reaches the daemon alone, which decides
                env=_environment(),
            )
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException as error:
            ours.close()
            if process is not None and process.returncode is None:
                process.kill()
            if isinstance(error, OSError):
                raise WorkError(FailureReason.INTERNAL, "the worker process could not be started") from error
            raise
        finally:
            theirs.close()
        assert process.stdout is not None
        output = asyncio.create_task(self._pass_on(process.stdout), name="worker output")
        self._outputs.add(output)
        output.add_done_callback(self._outputs.discard)
        return _Child(process, reader, writer, output)

    async def _pass_on(self, stream: asyncio.StreamReader) -> None:
        """Log the child's output line by line; a line longer than the limit is cut into pieces.

        A line without a level of its own has that of the line before: a traceback follows the error that it explains.
        """
        waiting, level = b"", "INFO"
        while piece := await stream.read(LINE_LIMIT):
            *lines, waiting = (waiting + piece).split(b"\n")
            if len(waiting) >= LINE_LIMIT:
                lines, waiting = [*lines, waiting], b""
            for line in lines:
                level = self._log_line(line, level)
        self._log_line(waiting, level)

    def _log_line(self, line: bytes, level: str) -> str:
        """Log a line at its own level or else at this one; returns which."""
        text = line.decode(errors="replace").rstrip()
        first, _, rest = text.partition(" ")
        if first in LEVELS:
            level, text = first, rest
        if text:
            match level:
                case "WARNING":
                    self._log.warning("worker", line=text)
                case "ERROR" | "CRITICAL":
                    self._log.error("worker", line=text)
                case _:
                    self._log.info("worker", line=text)
        return level


def _environment() -> dict[str, str]:
    """Ours, where this package lies if it is not installed, and what makes cuBLAS add in a fixed order."""
    environment = dict(os.environ)
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    place = Path(silo.__file__).resolve().parent.parent
    if place.name not in ("site-packages", "dist-packages"):
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{place}{os.pathsep}{others}" if others else str(place)
    return environment
